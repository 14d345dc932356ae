"""What the report says of devices: RUN/devices/NAME, as `decant device run --run RUN` brought it home."""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.files import read_json, sha256_file
from distill.rows import Row, read_rows
from export.artifact import NAME, read_artifact
from export.devices.results import ABOUT, LAST_ATTEMPT, failed_attempt
from export.reporting.labels import label_of, short_name

FOLDER = "devices"


@dataclass(frozen=True)
class DeviceLine:
    """One file on one device at one resolution and batch. `end_to_end`: from a PNG file, at batch 1."""

    device: str
    latency: Row
    p90: Row | None
    throughput: Row | None
    end_to_end: Row | None
    memory: Row | None
    cosine: Row | None

    @property
    def label(self) -> str:
        """`small, ONNX INT8`; of a device without any number, the model alone."""
        r = self.latency
        return short_name(r.subject) if r.target == "all" else label_of(r.subject, r.target)


def collect(run_folder: Path) -> list[dict[str, Any]]:
    """Every device that something came home from, JSON-ready: name, status, reason, machine, machine_id, checks and rows."""
    found = []
    for path in sorted((run_folder / FOLDER).glob("*/device.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged one is left out: the rest is still a report
            found.append(_device(path, run_folder))
    return found


def _device(path: Path, run_folder: Path) -> dict[str, Any]:
    about, every = read_json(path), read_rows(path.with_name("rows.jsonl"))
    have = {r.subject: set(hashes_in(run_folder, r.subject.partition("/")[2]).values()) for r in every}
    rows = [r for r in every if _of_today(r, have[r.subject])]
    notes = [about["reason"]] if about["reason"] else []
    if len(rows) < len(every):
        notes.append(
            f"{len(every) - len(rows)} numbers are of files that the run no longer has and are left out; measure again"
        )
    if later := failed_attempt(path.parent):
        notes.append(f"a later attempt ({later.get('ended')}) measured nothing: {later.get('reason')}")
    return {
        **{k: about[k] for k in ("name", "status", "machine", "steps", "ended", "bundle_sha256")},
        "reason": "; ".join(notes) or None,
        "machine_id": next((str(r.conditions["machine"]) for r in rows if "machine" in r.conditions), None),
        "rows": [r.model_dump(exclude_none=True) for r in rows],
    }


def _of_today(row: Row, have: Collection[str]) -> bool:
    """Whether the run still has the file that was measured, or that an engine was built from."""
    c = row.conditions
    sha256 = c.get("artifact_sha256") or c.get("built_from_sha256")
    return not sha256 or sha256 in have


def hashes_in(run_folder: Path, student: str) -> dict[tuple[str, int], str]:
    """(target, resolution) -> sha256 of the file that a run has exported for it."""
    found: dict[tuple[str, int], str] = {}
    if Path(student).name != student:  # a bundle's word
        return found
    for path in sorted((run_folder / "export" / student).glob(f"*/{NAME}")):
        with suppress(UserError):  # a damaged one is as good as none
            artifact = read_artifact(path.parent)
            found.update({(artifact.target, f.resolution): f.sha256 for f in artifact.files})
    return found


def rows_of(devices: Sequence[dict[str, Any]]) -> list[Row]:
    return [Row.model_validate(r) for d in devices for r in d["rows"]]


def fingerprints(run_folder: Path) -> dict[str, str]:
    """What decides that the report has other devices to show: hashes of what came home."""
    folders = sorted(p.parent for p in (run_folder / FOLDER).glob("*/rows.jsonl"))
    later = {f"device {p.name}, later attempt": p / LAST_ATTEMPT / ABOUT for p in folders}
    paths = {f"device {p.name}": p / "rows.jsonl" for p in folders} | {k: p for k, p in later.items() if p.is_file()}
    return {name: sha256_file(path) for name, path in paths.items()}


def device_lines(rows: Sequence[Row]) -> list[DeviceLine]:
    """A line for each latency, measured or not, in the order of the rows."""

    def beside(row: Row, metric: str, *same: str, **more: Any) -> Row | None:
        wanted = {k: row.conditions.get(k) for k in ("on_device", "resolution", *same)} | more
        mine = (r for r in rows if r.metric == metric and r.status == "measured" and r.target == row.target)
        return next((r for r in mine if all(r.conditions.get(k) == v for k, v in wanted.items())), None)

    return [
        DeviceLine(
            str(r.conditions.get("on_device", "")),
            r,
            beside(r, "latency_p90_ms", "batch"),
            beside(r, "images_per_s", "batch"),
            beside(r, "end_to_end_p50_ms", **{"from": "PNG file"}),
            beside(r, "peak_memory_mb"),
            beside(r, "cosine_min"),
        )
        for r in rows
        if r.metric == "latency_p50_ms"
    ]


def table_cells(devices: Sequence[dict[str, Any]], write: Callable[[Row | None], str]) -> list[list[str]]:
    """Cells of a table, a line each; `write` puts a number into words."""
    return [
        [
            line.device,
            line.label,
            *(str(line.latency.conditions.get(k, "")) for k in ("resolution", "batch")),
            *(write(r) for r in (line.latency, line.throughput, line.end_to_end)),
        ]
        for line in device_lines(rows_of(devices))
    ]
