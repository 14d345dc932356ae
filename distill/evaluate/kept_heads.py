"""Where an evaluation keeps the heads that it trained, one file each: EVALUATION/tasks/TASK/head-SUBJECT-TARGET-SIZE.safetensors."""

from dataclasses import dataclass
from pathlib import Path

from distill.evaluate.reader import Subject

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class KeptHead:
    """A file of a `linear_head.Head`.

    Attributes:
        task: whose it is; `main` is the recipe's own gallery.
        target, resolution: whose features it was trained on, e.g. `torch-fp32` at 224 px.
    """

    task: str
    target: str
    resolution: int
    path: Path


def head_path(folder: Path, task: str, subject: Subject) -> Path:
    """Where an evaluation keeps the head that a task trained on a subject's features."""
    name = f"{_start(subject.subject)}{subject.target}-{subject.preprocess.size}{SUFFIX}"
    return folder / "tasks" / task / name


def kept_heads(folder: Path, subject: str) -> list[KeptHead]:
    """All heads of one subject (`students/small`), in the order of their paths.

    `students/small` and `students/small-2` begin alike: of a head of the latter, `target` is one that does not exist.
    """
    found = []
    for path in sorted(folder.glob(f"tasks/*/{_start(subject)}*{SUFFIX}")):
        target, _, size = path.name.removeprefix(_start(subject)).removesuffix(SUFFIX).rpartition("-")
        if size.isdecimal():
            found.append(KeptHead(path.parent.name, target, int(size), path))
    return found


def _start(subject: str) -> str:
    return f"head-{subject.replace('/', '.')}-"
