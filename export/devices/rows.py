"""What a device's scripts printed -> rows. The device may be anyone's: what is no number with its conditions is left out."""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from distill.files import sha256_json
from distill.rows import Row, not_measured
from export.bundling.archive import shown
from export.devices.telling import clause

MOST_ROWS = 5_000
MEASURED = frozenset(
    {
        *(f"latency_{what}_ms" for what in ("p50", "p90", "p99", "mean")),
        *("images_per_s", "end_to_end_p50_ms", "load_s", "peak_memory_mb"),  # so far bench.py's
        *("cosine_min", "max_abs"),
    }
)
Json = dict[str, Any]


def rows_home(
    reports: dict[str, Json], subject: str, about: Json, machine: Json, hashes: Mapping[tuple[str, int], str] | None = None
) -> list[Row]:
    """Rows of a device's bench.py and selftest.py.

    Args:
        reports: `bench` and `selftest`, as far as there are any.
        subject: as in Row. about: conditions of all of them. machine: its description, whose hash goes into each row.
        hashes: (target, resolution) -> sha256 of the bundle's file, the condition `artifact_sha256` of its rows.
    """
    conditions = about | ({"machine": machine_id(machine)} if machine else {})
    found = [row for raw in _list(reports.get("bench"), "rows") if (row := timed_row(raw, subject, conditions))]
    found += selftest_rows(_list(reports.get("selftest"), "results"), subject, conditions)
    return [with_hash(row, hashes or {}) for row in found]


def machine_id(machine: Json) -> str:
    """A short name for a machine's description: rows of the same one can be compared."""
    return sha256_json(machine)[:12]


def with_hash(row: Row, hashes: Mapping[tuple[str, int], str]) -> Row:
    """The row with the hash of the file that was measured; an engine that was built there bears its ONNX file's as `built_from_sha256`."""
    own = {k: v for k, v in row.conditions.items() if k not in ("artifact_sha256", "built_from_sha256")}
    target, name = row.target, "artifact_sha256"
    if target.startswith("engines/"):
        target, name = target.split("/")[1], "built_from_sha256"
    sha256 = hashes.get((target, own.get("resolution", 0)))
    return row.model_copy(update={"conditions": own | ({name: sha256} if sha256 else {})})


def timed_row(raw: Any, subject: str, about: Json) -> Row | None:
    """A row of bench.py; None where it is none."""
    if not isinstance(raw, dict) or not isinstance(raw.get("conditions", {}), dict):
        return None
    own = {shown(str(k)): scalar(v) for k, v in raw.get("conditions", {}).items() if finite(v)}
    found: Json = {k: raw[k] for k in ("value", "low", "high", "n", "status") if k in raw}
    found |= {k: shown(str(raw[k])) for k in ("metric", "target") if raw.get(k) is not None}
    found |= {"reason": clause(str(raw["reason"]))} if raw.get("reason") is not None else {}
    try:
        row = Row(subject=subject, conditions=own | about, **found)
    except (ValidationError, OverflowError):
        return None
    return row if possible(row) else None


def possible(row: Row) -> bool:
    """Whether it is a number that bench.py or selftest.py gives, in its range, with an interval that is one."""
    if row.metric not in MEASURED or (row.n is not None and row.n < 1):
        return False
    least = -1.0 if row.metric == "cosine_min" else 0.0
    numbers = [v for v in (row.low, row.value, row.high) if v is not None]
    return all(v >= least for v in numbers) and (row.low is None or row.high is None or row.low <= row.high)


def finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def selftest_rows(results: list[Any], subject: str, about: Json) -> list[Row]:
    """The least cosine and the largest difference to the golden outputs, of each file that was tested."""
    found = []
    for result in results:
        for file in _list(result, "files"):
            if not isinstance(file, dict):
                continue
            measures = "golden images of the bundle, against the expected features"
            where = {"resolution": scalar(file.get("resolution")), "measures": measures, **about}
            raw = {"target": result.get("check"), "conditions": where, "status": "measured"}
            for metric in ("cosine_min", "max_abs"):
                row = timed_row({**raw, "metric": metric, "value": file.get(metric)}, subject, about)
                found += [row] if row else []
    return found


def lost_row(subject: str, reason: str, about: Json) -> Row:
    return not_measured("latency_p50_ms", subject, "all", clause(reason), **about)


def scalar(value: Any) -> str | int | float | bool | None:
    return value if isinstance(value, int | float | bool) or value is None else shown(str(value))


def _list(report: Any, key: str) -> list[Any]:
    found = report.get(key) if isinstance(report, dict) else None
    return found[:MOST_ROWS] if isinstance(found, list) else []
