"""What the report says of devices: RUN/devices/NAME, as `decant device run --run RUN` brought it home."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.files import read_json, sha256_file
from distill.rows import Row, read_rows
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
            found.append(_device(path))
    return found


def _device(path: Path) -> dict[str, Any]:
    about, rows = read_json(path), read_rows(path.with_name("rows.jsonl"))
    return {
        **{k: about[k] for k in ("name", "status", "reason", "machine", "steps", "ended", "bundle_sha256")},
        "machine_id": next((str(r.conditions["machine"]) for r in rows if "machine" in r.conditions), None),
        "rows": [r.model_dump(exclude_none=True) for r in rows],
    }


def rows_of(devices: Sequence[dict[str, Any]]) -> list[Row]:
    return [Row.model_validate(r) for d in devices for r in d["rows"]]


def fingerprints(run_folder: Path) -> dict[str, str]:
    """What decides that the report has other devices to show: hashes of what came home."""
    paths = sorted((run_folder / FOLDER).glob("*/rows.jsonl"))
    return {f"device {p.parent.name}": sha256_file(p) for p in paths}


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
