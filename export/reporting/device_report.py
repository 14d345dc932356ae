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
from export.devices.telling import told_of, unnamed
from export.reporting.labels import label_of, short_name

FOLDER = "devices"
STEPS = {
    "copy": "Copy",
    "unpack": "Unpack",
    "build": "Build engines",
    "bench": "Time",
    "selftest": "Self-test",
}  # in this order
STATES = {
    "done": "Passed",
    "failed": "Failed",
    "unreachable": "Unreachable",
    "nothing ran": "Nothing ran",
    "stopped": "Stopped",
}
FACTS = {
    "model": "{}",
    "machine": "{}",
    "system": "{}",
    "cpu": "processor {}",
    "threads": "{} threads",
    "memory_gb": "memory {} GB",
    "gpu": "GPU {}",
    "jetpack": "JetPack {}",
    "l4t": "L4T {}",
    "power_mode": "power mode {}",
    "python": "Python {}",
    "numpy": "NumPy {}",
    "onnxruntime": "ONNX Runtime {}",
    "openvino": "OpenVINO {}",
    "tensorrt": "TensorRT {}",
    "tensorrt_rtx": "TensorRT for RTX {}",
}


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
    def where(self) -> str:
        """`48 px, batch 1`, as far as it is known."""
        c = self.latency.conditions
        return ", ".join(form.format(c[k]) for k, form in (("resolution", "{} px"), ("batch", "batch {}")) if c.get(k))

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
    told = told_of(about)
    if "told" not in about:  # by a version whose rows had reasons with names of hosts
        general = told["reason"] or "the reason was not kept"
        every = [
            r.model_copy(update={"reason": general if r.target == "all" else unnamed(r.reason)}) if r.reason else r
            for r in every
        ]
    rows = [r for r in every if _of_today(r, have[r.subject])]
    notes = [told["reason"]] if told["reason"] else []
    if len(rows) < len(every):
        notes.append(
            f"{len(every) - len(rows)} numbers are of files that the run no longer has and are left out; measure again"
        )
    if later := failed_attempt(path.parent):
        notes.append(f"a later attempt ({later.get('ended')}) measured nothing: {told_of(later)['reason']}")
    return {
        **{k: about[k] for k in ("name", "status", "machine", "ended", "bundle_sha256")},
        "steps": told["steps"],
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


def views(devices: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page says of each device, in words: state, facts of the machine, steps in their order; whether it has a latency."""
    return [
        d
        | {
            "state": STATES[d["status"]],
            "measured": any(r["metric"] == "latency_p50_ms" and r["status"] == "measured" for r in d["rows"]),
            "facts": _facts(d["machine"]),
            "steps": [_step(name, d["steps"][name]) for name in STEPS if name in d["steps"]],
        }
        for d in devices
    ]


def _facts(machine: dict[str, str]) -> list[str]:
    known = [form.format(machine[k]) for k, form in FACTS.items() if k in machine]
    return known + [f"{k.replace('_', ' ')} {v}" for k, v in machine.items() if k not in FACTS]


def _step(name: str, step: dict[str, Any]) -> str:
    status = {"nothing": "nothing ran", "absent": "not in the bundle"}.get(step["status"], step["status"])
    took = f" in {step['seconds']:.1f} s" if status == "done" and "seconds" in step else ""
    return f"{STEPS[name]}: {status}{took}" + (f": {step['why']}" if step.get("why") and step["status"] != "absent" else "")


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
