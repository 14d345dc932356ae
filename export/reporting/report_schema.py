"""What report.json holds, as pydantic models: `decant schema --report` prints the JSON schema that they give.

The schema is wide where the report passes on what other files say (proofs, plans, pruning.json, run.json), and strict where the report
itself speaks. `schema` changes when a reader has to change; `schema_version` counts what was added since.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from distill.rows import Row

SCHEMA: Literal["decant-report-1"] = "decant-report-1"
VERSION: Literal["1.3"] = "1.3"


class Part(BaseModel):
    """Nothing but what is named here."""

    model_config = ConfigDict(extra="forbid")


class Named(BaseModel):
    """What is named here, and more that this schema leaves open."""

    model_config = ConfigDict(extra="allow")


class RunInfo(Named):
    """run.json of the run folder, and the folder's name."""

    name: str


class ArtifactFacts(Part):
    """Parts of one artifact.json, each by resolution where the artifact has several."""

    subject: str
    target: str
    precision: str | None = None
    plan: Any = None
    proof: Any = None
    lint: Any = None
    budget: Any = None


class Compression(Part):
    """artifacts: of every file that has rows. pruned: subject -> its pruning.json."""

    artifacts: list[ArtifactFacts]
    pruned: dict[str, dict[str, Any]]


class LogRecord(Named):
    """A line of train.jsonl; every other key is a logged value, null where it was no finite number."""

    images: float


class Stage(Part):
    """A finished stage. gate: why its gate failed; skipped: why there was nothing to do."""

    stage: str
    seconds: float
    attempts: int | None = None
    gate: Any = None
    skipped: Any = None


class ReproduceFamily(Part):
    """The command that measures these metrics again."""

    name: str
    command: str
    metrics: list[str]
    names: list[str]


class Choice(Part):
    """One preset of "which file should I ship": the id is subject/target@resolution, null where nothing meets it."""

    name: str
    wanted: dict[str, Any]
    best: str | None
    nearest: str | None
    sentence: str
    notes: list[str]


class PictureInfo(Part):
    """A picture of the page, without its bytes."""

    name: str
    caption: str
    alt: str
    type: Literal["image/png", "image/webp", "image/jpeg"]
    bytes: Annotated[int, Field(ge=0)]


class Device(Part):
    """What came home from a device; its rows name it as `on_device`. machine_id: the condition `machine` of its rows."""

    name: str
    status: Literal["done", "failed", "unreachable", "nothing ran", "stopped"]
    reason: str | None
    machine: dict[str, str]
    machine_id: str | None
    steps: dict[str, dict[str, Any]]
    ended: str
    bundle_sha256: str
    rows: list[Row]


class Report(Part):
    """report.json: the truth that report.csv, report.md and index.html are made from.

    Attributes:
        schema_: name and major version of this format. schema_version: the same with its minor version.
        summary: sentences, in order. rows: every number with its conditions; keys without a value are absent.
        fingerprint: of `fingerprint_of`: processor, memory, GPUs, system, packages, commit.
        curves: subject -> the records of its train.jsonl. recipe: the recipe's text.
        commands: what makes the whole run again; reproduce: what measures each family of numbers again.
    """

    model_config = ConfigDict(extra="forbid", title="Decant report")

    schema_: Literal["decant-report-1"] = Field(alias="schema")
    schema_version: Literal["1.3"]
    title: str
    run: RunInfo
    summary: list[str]
    rows: list[Row]
    advice: list[Choice]
    fingerprint: dict[str, Any]
    fingerprint_of: str
    compression: Compression
    devices: list[Device]
    pictures: list[PictureInfo]
    recipe: str | None
    curves: dict[str, list[LogRecord]]
    stages: list[Stage]
    commands: list[str]
    reproduce: list[ReproduceFamily]


def json_schema() -> dict[str, Any]:
    """JSON schema, draft 2020-12."""
    found = Report.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:decant:report:{VERSION}", **found}
