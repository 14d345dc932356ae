"""What a device may answer: everything else is refused here, before anything works with it."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from export.bundling.archive import Refused, shown
from export.bundling.strict_json import parse_json
from export.bundling.strict_model import Several, Sha256, Strict

DEEPEST = 30  # of what a device may nest
Count = Annotated[int, Field(ge=0, le=1 << 50)]
Scalar = str | int | float | bool | None


class Told(BaseModel):
    """A part of a report, which another version of the bundle's scripts may have written: keys may be added, not changed."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


class Answer(Strict):
    ok: Literal[True]


class Whole(Answer):
    whole: Literal[True]


class Part(Answer):
    whole: Literal[False]
    changed: bool
    bytes: Count
    sha256: Sha256


class Received(Answer):
    bytes: Count


class Unpacked(Answer):
    folder: str
    again: bool


class Absent(Answer):
    absent: Literal[True]


class Worked(Answer):
    code: int | None
    late: bool
    seconds: Annotated[float, Field(ge=0)]
    stdout: str
    has_engines: bool


class About(Answer):
    about: dict[str, Scalar]


FORMS = {form.__name__ for form in (Whole, Part, Absent, Worked)}  # of which an error says which was tried
ANSWERS: dict[str, TypeAdapter] = {
    "hold": TypeAdapter(Answer),
    "offer": TypeAdapter(Whole | Part),
    "receive": TypeAdapter(Received),
    "unpack": TypeAdapter(Unpacked),
    "work": TypeAdapter(Absent | Worked),
    "about": TypeAdapter(About),
    "clean": TypeAdapter(Received),
}


class ReportLine(Told):
    """A result of a check, or a row."""

    check: str | None = None
    target: str | None = None
    text: str | None = None
    reason: str | None = None
    status: str | None = None
    conditions: dict[str, Any] = Field(default_factory=dict)
    files: Several[dict[str, Any]] = Field(default_factory=list)


class Report(Told):
    """What build_engine.py, bench.py and selftest.py print with --json."""

    format: str
    exit_code: int
    machine: dict[str, Scalar] = Field(default_factory=dict)
    rows: Several[ReportLine] = Field(default_factory=list)
    results: Several[ReportLine] = Field(default_factory=list)


def read_answer(do: str, text: bytes) -> dict[str, Any]:
    """The answer to a request.

    Raises:
        ValueError: it is none that this version reads; the message is a clause.
    """
    found = sound(text, "answer")
    if found.get("ok") is False:
        return found
    try:
        return ANSWERS[do].validate_python(found).model_dump()
    except ValidationError as e:
        raise ValueError(a_problem(e, "answer")) from e


def read_report(text: str, form: str) -> dict[str, Any]:
    """A script's report.

    Raises:
        ValueError: there is none of that form, or it is damaged; the message is a clause.
    """
    found = sound(text.encode("utf-8", "replace"), "report")
    if found.get("format") != form:
        raise ValueError("its report has another format")
    try:
        Report.model_validate(found)
    except ValidationError as e:
        raise ValueError(a_problem(e, "report")) from e
    return found


def a_problem(error: ValidationError, name: str) -> str:
    problem = error.errors(include_url=False, include_input=False)[-1]  # of several forms, the last is the usual one
    where = [str(part) for part in problem["loc"] if part not in FORMS]
    return f"its {name} has a wrong {shown('.'.join(where)) or 'form'}"


def sound(text: bytes, name: str) -> dict[str, Any]:
    """A JSON object whose numbers are finite and of 64 bits and whose texts are Unicode, nested no deeper than reports are."""
    try:
        found = parse_json(text, name)
    except Refused as e:
        raise ValueError(str(e)) from e
    left: list[tuple[Any, int]] = [(found, 0)]
    while left:
        value, depth = left.pop()
        if depth > DEEPEST:
            raise ValueError(f"its {name} is nested too deep")
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"its {name} has text that is not Unicode")
        if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= 1 << 63):
            raise ValueError(f"its {name} has a number that is none")
        if isinstance(value, dict):
            left += [(v, depth + 1) for pair in value.items() for v in pair]
        elif isinstance(value, list):
            left += [(v, depth + 1) for v in value]
    return found
