"""Which stages are done, and which must run and why: read from the run folder, changing nothing in it."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distill.errors import UserError
from distill.files import write_text
from export.fingerprint import fingerprint
from recipes import marks
from recipes.marks import DONE, STARTED, Stage

Action = Literal["skip", "continue", "restore", "run"]


@dataclass(frozen=True)
class Decision:
    """What will be done about a stage, and why in a few words.

    Attributes:
        action: `skip` (it is done), `continue` (it was interrupted), `restore` (an earlier version with these very settings is
            kept) or `run` (from the start).
        done: the mark of the results that stay as they are; None where there is work to do.
        kept: where a version that is restored lies.
    """

    stage: Stage
    action: Action
    why: str
    identity: dict[str, Any]
    key: str
    done: dict[str, Any] | None = None
    kept: Path | None = None


def decide(run_folder: Path, stages: Sequence[Stage], force: Iterable[str] = ()) -> list[Decision]:
    """What `execute` would do, changing nothing."""
    book = Book(run_folder, stages, force)
    found = []
    for stage in book.stages:
        found.append(book.decide(stage))
        book.note(found[-1], found[-1].done)
    return found


class Book:
    """What is known about the stages so far, in plan order. A `digest` of None stands for a stage that did not get done."""

    def __init__(self, run_folder: Path, stages: Sequence[Stage], force: Iterable[str]):
        self.run_folder = run_folder
        self.stages = [replace(s, folder=run_folder / s.folder) for s in stages]
        self.forced = names_of(force, stages)
        self.keys: dict[str, str] = {}
        self.digests: dict[str, str | None] = {}
        self.gates: dict[str, str] = {}
        self.skipped: list[str] = []  # done before, not yet told
        self.machine = fingerprint()
        names, folders = [s.name for s in stages], [s.folder for s in self.stages]
        assert len(set(names)) == len(names), "two stages share a name"
        assert len(set(folders)) == len(folders), "two stages share a folder"
        assert all(n in names[:i] for i, s in enumerate(stages) for n in s.inputs), "a stage stands before one of its inputs"

    def foreign(self, stage: Stage) -> list[Path]:
        """Other stages' folders inside this one's."""
        return [s.folder for s in self.stages if stage.folder in s.folder.parents]

    def attic(self, stage: Stage) -> Path:
        return self.run_folder / "replaced" / stage.name.replace("/", "--")

    def read(self, stage: Stage) -> dict[str, str | None]:
        return {name: self.digests[name] for name in stage.inputs}

    def decide(self, stage: Stage) -> Decision:
        identity = stage.identity(self.keys)
        key = marks.key_of(identity)

        def decision(action: Action, why: str, done: dict[str, Any] | None = None) -> Decision:
            return Decision(stage, action, why, identity, key, done)

        done, started = marks.mark(stage.folder, DONE), marks.mark(stage.folder, STARTED)
        here, forced = done or started, stage.name in self.forced
        if here is None or here["key"] != key:
            for place in () if forced else self._places(stage):
                kept = marks.mark(place, DONE) or marks.mark(place, STARTED)
                if kept and kept["key"] == key and kept["read"] == self.read(stage):
                    finished = kept if "digest" in kept else None
                    why = "an earlier version with these settings is kept"
                    return Decision(stage, "restore", why, identity, key, finished, place)
            return decision("run", "; ".join(marks.changes(here["identity"], identity)) if here else "not done yet")
        if again := [n for n in stage.inputs if self.digests[n] is None]:
            return decision("run", f"its input {again[0]} is made again")
        if other := [n for n in stage.inputs if here["read"].get(n) != self.digests[n]]:
            return decision("run", f"its input {other[0]} was made again and came out different")
        if done is None:
            return decision("continue", "was interrupted")
        if forced:
            return decision("run", "asked for")
        if done.get("skipped") and any(done["machine"].get(part) != self.machine[part] for part in ("gpus", "packages")):
            return decision("run", "what is installed here has changed since it was skipped")
        if bad := marks.damage(stage.folder, done):
            return decision("run", bad)
        return decision("skip", f"skipped before: {done['skipped']}" if done.get("skipped") else "nothing changed", done)

    def _places(self, stage: Stage) -> list[Path]:
        """Where an earlier version of a stage may lie: its attic, or the folder that it had in another recipe (a pretraining leaves
        `teacher/` to the phase that goes on with it). Keys hold the stage's name, so nothing else is taken for it.
        """
        homes = (self.run_folder, self.run_folder / "replaced")
        found = {p.parent for home in homes for p in home.glob(f"*/{DONE}") if p.parent.suffix != ".restoring"}
        return [self.attic(stage), *sorted(found - {self.attic(stage), stage.folder})]

    def note(self, decision: Decision, done: dict[str, Any] | None) -> None:
        name = decision.stage.name
        self.keys[name] = decision.key
        self.digests[name] = done["digest"] if done else None
        if done and done.get("gate"):
            self.gates[name] = done["gate"]

    def write_rows(self) -> None:
        """RUN/rows.jsonl: the rows of the stages known to be done, in plan order."""
        files = [s.folder / "rows.jsonl" for s in self.stages if self.digests.get(s.name)]
        lines = [line for f in files if f.exists() for line in f.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows, path = "".join(f"{line}\n" for line in lines), self.run_folder / "rows.jsonl"
        if not path.exists() or path.read_text(encoding="utf-8") != rows:
            write_text(path, rows)


def names_of(wanted: Iterable[str], stages: Sequence[Stage]) -> set[str]:
    """Names of stages from names of stages or groups."""
    names = [s.name for s in stages]
    known = list(dict.fromkeys([*names, *(n.split("/")[0] for n in names)]))
    found: set[str] = set()
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"There is no stage {name!r} in this recipe; {hint}Its stages are {', '.join(names)}.")
        found |= {n for n in names if n == name or n.startswith(f"{name}/")}
    return found
