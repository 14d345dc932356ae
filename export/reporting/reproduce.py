"""The exact command behind each family of numbers, and the ones that make the whole run again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distill.rows import Row
from export.reporting.labels import PARITY, metric_name

EVALUATED, TIMED, BUILT, TRAINED = "decant eval", "decant bench", "decant export", "decant run"
MONITORS = ("effective_rank", "nearest_distance", "feature_std", "teacher_entropy", "prototype_entropy")
TIMINGS = (
    "latency_",
    "gpu_",
    "energy_",
    "images_per_s",
    "peak_memory_mb",
    "load_s",
    "noise_floor_percent",
    "preprocess_",
    "size_mb",
)


@dataclass(frozen=True)
class Family:
    """Rows that one command measures again. `metrics`: as the rows name them; `names`: in words."""

    name: str
    command: str
    metrics: list[str]
    names: list[str]


def whole_run(commit: str | None, name: str) -> list[str]:
    """The commands that make the same run again."""
    modified = bool(commit and commit.endswith("-modified"))
    checkout = [f"git checkout {commit.removesuffix('-modified')}"] if commit else []
    note = ["# the code differed from this commit: see the fingerprint"] if modified else []
    return [
        *note,
        *checkout,
        "python -m pip install .",
        "decant check recipe.yaml",
        f"decant run recipe.yaml --out runs/{name}-again",
    ]


def families(rows: Iterable[Row], run: str) -> list[Family]:
    """Which command measures which of these rows again, on the finished run `run`. Files are made by `decant export` before that."""
    found: dict[str, dict[str, str]] = {}
    names = {
        EVALUATED: "Accuracy, tasks and parity",
        TIMED: "Time, memory and size",
        BUILT: "Building of files",
        TRAINED: "Training and its monitors",
    }
    for row in rows:
        found.setdefault(command_of(row.metric), {}).setdefault(row.metric, _plain(row))
    return [
        Family(names[command], _line(command, run), list(found[command]), list(dict.fromkeys(found[command].values())))
        for command in names
        if command in found
    ]


def command_of(metric: str) -> str:
    """The command whose stage writes rows of this metric."""
    if metric == "build_s":
        return BUILT
    if metric.startswith(MONITORS):
        return TRAINED
    return TIMED if metric.startswith(TIMINGS) else EVALUATED


def _line(command: str, run: str) -> str:
    """Training is done anew in another folder: a finished one would be skipped."""
    return f"{command} {run}/recipe.yaml --out {run}-again" if command == TRAINED else f"{command} {run}"


def _plain(row: Row) -> str:
    """The metric's name without its batch."""
    return "parity" if row.metric in PARITY else metric_name(row).partition(" at batch ")[0]


def artifact_commands(rows: Sequence[Row], run: str) -> list[str]:
    """What makes a file again, and then measures it again."""
    commands = [f.command for f in families(rows, run)]
    build = f"{BUILT} {run}"
    return [build, *(c for c in commands if c != build)]
