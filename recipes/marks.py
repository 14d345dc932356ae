"""What a stage is, its content key, and what its folder says about itself: `started.json` (in work) and `done.json` (finished).

A folder's state is only ever read from these two files, each of which is whole or absent:

    neither       nothing was done here (files that lie there are leftovers)
    started.json  a run with that key was interrupted; `work` continues in it
    done.json     finished, with that key and those outputs
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.files import read_json, sha256_file, sha256_json, unfinished
from distill.progress import Progress
from distill.rows import Row

STARTED, DONE, SKIPPED = "started.json", "done.json", "skipped.json"


def no_rows(reason: str) -> list[Row]:
    return []


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: unique, e.g. `students/small`; what stands before a slash is its group, which `--until` and `force` accept too.
        folder: where it writes, relative to the run folder; no two stages share one, though one may lie inside another's.
        config: the settings that can change its results, as JSON. Workers, logging and the like do not belong here.
        work: `work(folder, progress)` writes the results into `folder`, numbers to `folder/rows.jsonl`. After an interruption
            it is called again on the same folder and continues from what it finds there.
        inputs: names of the earlier stages whose folders it reads.
        data: name -> fingerprint of the data from outside that it reads.
        schema: raise it when the code changes what it writes: older results then count as stale.
        optional: if `work` raises EnvironmentFailed, the run goes on and `rows_if_skipped(reason)` become its rows. It is
            tried again once other packages or GPUs are there.
        together: in a run of several processes all of them do it; other stages are the first one's.
        needs_gates: not run while a gate of an earlier stage fails (GateFailed): for what ships.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    work: Callable[[Path, Progress], None]
    inputs: tuple[str, ...] = ()
    data: dict[str, str] = field(default_factory=dict)
    schema: int = 1
    optional: bool = False
    rows_if_skipped: Callable[[str], list[Row]] = no_rows
    together: bool = False
    needs_gates: bool = False

    def identity(self, keys: dict[str, str]) -> dict[str, Any]:
        """All that decides its results; `keys` are those of the stages before it."""
        inputs = {name: keys[name] for name in self.inputs}
        return plain({"stage": self.name, "config": self.config, "inputs": inputs, "data": self.data, "schema": self.schema})


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples become lists, keys strings."""
    return json.loads(json.dumps(value))


def key_of(identity: dict[str, Any]) -> str:
    return sha256_json(identity)


def mark(folder: Path, name: str) -> dict[str, Any] | None:
    """The content of a mark, or None where there is none that can be read (a damaged one counts as absent)."""
    try:
        found = read_json(folder / name)
    except (OSError, ValueError):
        return None
    needed = {"key", "identity", "read"} | ({"outputs", "digest", "machine"} if name == DONE else set())
    return found if isinstance(found, dict) and needed <= found.keys() else None


def key_in(folder: Path) -> str | None:
    """The key that the folder's files belong to, finished or not."""
    found = mark(folder, DONE) or mark(folder, STARTED)
    return found["key"] if found else None


def output_files(folder: Path, foreign: Iterable[Path]) -> Iterator[Path]:
    """The files below `folder`, sorted, without marks, unfinished writes and what lies in `foreign` (other stages' folders)."""
    others = {Path(p) for p in foreign}
    for where, dirs, files in os.walk(folder):
        here = Path(where)
        dirs[:] = sorted(d for d in dirs if here / d not in others)
        for name in sorted(files):
            if not unfinished(name) and not (here == folder and name in (STARTED, DONE)):
                yield here / name


def describe_outputs(folder: Path, foreign: Iterable[Path]) -> list[dict[str, Any]]:
    found = []
    for path in output_files(folder, foreign):
        stat = path.stat()
        name = path.relative_to(folder).as_posix()
        found.append({"path": name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_file(path)})
    return found


def digest_of(outputs: list[dict[str, Any]]) -> str:
    """One hash of what a stage wrote. Later stages record it: the same key may still give other bytes when it is forced."""
    return sha256_json([[o["path"], o["sha256"]] for o in outputs])


def damage(folder: Path, done: dict[str, Any]) -> str | None:
    """What is wrong with a finished stage's outputs, or None. A file is hashed only if its time differs from the recorded one;
    if the content is the same, the time in `done` is brought up to date.
    """
    for output in done["outputs"]:
        path = folder / output["path"]
        try:
            stat = path.stat()
        except OSError:
            return f"{output['path']} is missing"
        same_time = stat.st_mtime_ns == output["mtime_ns"]
        if stat.st_size != output["bytes"] or not (same_time or sha256_file(path) == output["sha256"]):
            return f"{output['path']} was changed"
        output["mtime_ns"] = stat.st_mtime_ns
    return None


def move(source: Path, target: Path, foreign: Sequence[Path] = ()) -> None:
    """Move a stage's files, replacing what lies at the target. Marks leave first: a half-moved folder counts as not done."""
    if key_in(source) is None:  # leftovers of nobody: they must not push out a whole version that the target may hold
        for path in list(output_files(source, foreign)):
            path.unlink()
        return
    shutil.rmtree(target, ignore_errors=True)
    names = [n for n in (DONE, STARTED) if (source / n).exists()]
    files = [source / n for n in names] + list(output_files(source, foreign))
    held = target / ".marks"
    held.mkdir(parents=True)
    for path in files:
        to = held / path.name if path.parent == source and path.name in names else target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, to)
    for name in names:
        os.replace(held / name, target / name)
    held.rmdir()


def restore(folder: Path, place: Path, attic: Path, foreign: Sequence[Path]) -> None:
    """Move a stage's present version to `attic`, and the one that lies at `place` (its attic, mostly) here."""
    kept = attic.with_name(attic.name + ".restoring")
    shutil.rmtree(kept, ignore_errors=True)
    attic.parent.mkdir(exist_ok=True)
    os.replace(place, kept)
    move(folder, attic, foreign)
    for path in list(output_files(kept, ())):
        to = folder / path.relative_to(kept)
        to.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, to)
    for name in (STARTED, DONE):
        if (kept / name).exists():
            os.replace(kept / name, folder / name)
    shutil.rmtree(kept)


def sweep(folder: Path) -> None:
    """Remove what interrupted writes left beside their final names."""
    for path in list(folder.rglob(".*")):
        if unfinished(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why two identities differ, one text each: `backbone.heads: 2 -> 4`, `its input teacher changed`, ..."""
    found = []
    before, after = flat(old.get("config", {})), flat(new["config"])
    for path in sorted(before.keys() | after.keys()):
        if (a := before.get(path, "unset")) != (b := after.get(path, "unset")):
            found.append(f"{path}: {_text(a)} -> {_text(b)}")
    for what in ("inputs", "data"):
        was, now = old.get(what, {}), new[what]
        noun = "its input" if what == "inputs" else "the data"
        found += [f"{noun} {name} changed" for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    if old.get("schema") != new["schema"]:
        found.append("this version of decant writes other results here")
    return found


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts as dotted paths; lists and empty dicts stay values."""
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    found: dict[str, Any] = {}
    for name, below in value.items():
        found |= flat(below, f"{path}.{name}" if path else str(name))
    return found


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
