"""The run folder: which stages are done, which run now and why, and what happens when one is stopped. Knows no stage.

RUN/run.json      which recipe's run this is
RUN/recipe.yaml   the recipe with every setting, as of the last command
RUN/rows.jsonl    the rows of all stages that are done
RUN/log.jsonl     what happened when
RUN/replaced/     per stage the version before the present one; it comes back if its settings do
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.errors import DecantError, EnvironmentFailed, GateFailed, UserError
from distill.files import read_json, write_json, write_text
from distill.progress import Progress, duration
from distill.rows import write_rows
from recipes import marks, ranks
from recipes.decide import Book, Decision, decide, names_of
from recipes.lock import locked
from recipes.marks import DONE, SKIPPED, STARTED, Stage
from recipes.signals import exit_code, interrupting

__all__ = ["Decision", "Interrupted", "Stage", "decide", "execute", "run_info"]

FORMAT = "decant-run-1"


class Interrupted(DecantError):
    """Ctrl-C or SIGTERM: nothing is lost, the same command continues."""

    exit_code = 130


def execute(
    run_folder: Path,
    stages: Sequence[Stage],
    progress: Progress,
    *,
    recipe: str,
    text: str,
    until: str | None = None,
    force: Iterable[str] = (),
) -> None:
    """Bring the run folder up to date: do each stage that is not done with its present settings, inputs and data.

    Args:
        run_folder: made if it does not exist.
        stages: in an order in which each stands behind its inputs.
        recipe: the recipe's name; a folder keeps to one.
        text: the resolved recipe, kept as RUN/recipe.yaml.
        until: the last stage or group of stages to do.
        force: stages or groups to do again even though they are done.

    Raises:
        UserError: the folder holds something else, another run is at work in it, or a name in `until` or `force` is unknown.
        GateFailed: everything was done that may be done, but gates failed; also when the stage that failed it was done earlier.
        EnvironmentFailed: a package, memory or disk space is missing. What is done stays done.
        Interrupted: Ctrl-C or SIGTERM.
    """
    if ranks.following():
        ranks.follow(run_folder, stages)
        return
    last = names_of([until], stages) if until is not None else {s.name for s in stages}
    cut = max(i for i, s in enumerate(stages) if s.name in last) + 1
    book = Book(run_folder, stages, force)
    _refuse_foreign(run_folder)
    with _sentences(run_folder), ranks.leading() as crew, locked(run_folder):
        _claim(run_folder, recipe, text)
        for number, stage in enumerate(book.stages[:cut], 1):
            _bring_up_to_date(book, stage, f"[{number}/{len(stages)}] {stage.name}", progress, crew)
        _say_skipped(book, progress)
        for stage in book.stages[cut:]:  # their rows stand, as far as nothing before them changed
            decision = book.decide(stage)
            book.note(decision, decision.done if decision.action == "skip" else None)
        book.write_rows()
        failed = [f"{stage.name}: {book.gates[stage.name]}" for stage in stages[:cut] if stage.name in book.gates]
    if failed:
        raise GateFailed("\n".join(failed))


def run_info(run_folder: Path) -> dict[str, Any]:
    """RUN/run.json.

    Raises:
        UserError: the folder is not a run's.
    """
    try:
        info = read_json(run_folder / "run.json")
    except (OSError, ValueError) as e:
        raise UserError(f"{run_folder} is not a run's folder (no readable run.json in it). `decant run` makes one.") from e
    if not isinstance(info, dict) or info.get("format") != FORMAT or not isinstance(info.get("recipe"), str):
        raise UserError(
            f"{run_folder}/run.json is not what this version of decant writes ({FORMAT}). Choose another folder with --out."
        )
    return info


def _bring_up_to_date(book: Book, stage: Stage, label: str, progress: Progress, crew: ranks.Crew) -> None:
    decision = book.decide(stage)
    if decision.action == "restore":
        progress.say(f"{label}: {decision.why} and comes back")
        assert decision.kept is not None
        marks.restore(stage.folder, decision.kept, book.attic(stage), book.foreign(stage))
        decision = book.decide(stage)
    if decision.action == "skip":
        assert decision.done is not None
        if decision.done != marks.mark(stage.folder, DONE):
            write_json(stage.folder / DONE, decision.done)  # new file times: a copied run folder is hashed once, not each time
        (stage.folder / STARTED).unlink(missing_ok=True)  # killed between the two marks
        book.skipped.append(stage.name)
        book.note(decision, decision.done)
        _log(book.run_folder, "skipped", stage.name, why=decision.why)
        return
    _say_skipped(book, progress)
    if stage.needs_gates and book.gates:
        progress.say(f"{label}: not run, as a gate failed ({', '.join(book.gates)})", warning=True)
        _log(book.run_folder, "not run", stage.name, why=f"gate of {', '.join(book.gates)}")
        book.note(decision, None)
        return
    if lost := [n for n in stage.inputs if book.digests[n] is None]:
        progress.say(f"{label}: not run, as {lost[0]} was not", warning=True)
        book.note(decision, None)
        return
    progress.say(f"{label}: {'continues' if decision.action == 'continue' else 'starts'} ({decision.why})")
    book.write_rows()  # a stage may read the rows of those before it
    done = _work(book, decision, progress, crew)
    book.note(decision, done)
    if reason := done.get("skipped"):
        progress.say(f"{label}: not measured: {reason}", warning=True)
    elif gate := done.get("gate"):
        progress.say(f"{label}: gate failed: {gate}", warning=True)
    else:
        progress.say(f"{label}: done in {duration(done['seconds'])}")


def _work(book: Book, decision: Decision, progress: Progress, crew: ranks.Crew) -> dict[str, Any]:
    """Run the stage and mark it done; returns the mark."""
    stage, run_folder = decision.stage, book.run_folder
    begun = time.monotonic()
    mark = {"stage": stage.name, "key": decision.key, "identity": decision.identity, "read": book.read(stage)}
    before = marks.mark(stage.folder, STARTED) if decision.action == "continue" else None
    if before is None:
        marks.move(stage.folder, book.attic(stage), book.foreign(stage))
    stage.folder.mkdir(parents=True, exist_ok=True)
    marks.sweep(stage.folder)
    attempts = before["attempts"] + 1 if before else 1
    write_json(stage.folder / STARTED, mark | {"attempts": attempts})
    _log(run_folder, "started", stage.name, why=decision.why)
    ending: dict[str, Any] = {}
    try:
        with crew.joining(stage):
            stage.work(stage.folder, progress)
    except GateFailed as e:
        ending = {"gate": str(e)}
    except EnvironmentFailed as e:
        if not stage.optional or _no_space(e):
            raise
        ending = {"skipped": str(e)}
        for path in marks.output_files(stage.folder, book.foreign(stage)):
            path.unlink()
        write_json(stage.folder / SKIPPED, {"reason": str(e)})
        write_rows(stage.folder / "rows.jsonl", stage.rows_if_skipped(str(e)))
    except BaseException as e:
        event = "stopped" if isinstance(e, KeyboardInterrupt | SystemExit) else "failed"
        _log(run_folder, event, stage.name, seconds=round(time.monotonic() - begun, 3), why=str(e) or type(e).__name__)
        raise
    outputs = marks.describe_outputs(stage.folder, book.foreign(stage))
    seconds = round(time.monotonic() - begun, 3)
    results = {"outputs": outputs, "digest": marks.digest_of(outputs), "seconds": seconds, "attempts": attempts}
    done = mark | ending | results | {"machine": book.machine}
    write_json(stage.folder / DONE, done)
    (stage.folder / STARTED).unlink()
    _log(run_folder, "finished", stage.name, seconds=seconds, **ending)
    return done


def _refuse_foreign(run_folder: Path) -> None:
    """Raised before anything is written there."""
    if run_folder.exists() and not run_folder.is_dir():
        raise UserError(f"{run_folder} is a file, not a folder. Choose another place with --out.")
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise EnvironmentFailed(f"The run folder {run_folder} cannot be made ({e.strerror}). Choose another with --out.") from e
    if (run_folder / "run.json").exists():
        run_info(run_folder)
    elif strangers := sorted(p.name for p in run_folder.iterdir() if not p.name.startswith(".")):
        raise UserError(f"{run_folder} is no run's folder and not empty (it holds {strangers[0]}). Choose another with --out.")


def _claim(run_folder: Path, recipe: str, text: str) -> None:
    path = run_folder / "run.json"
    if path.exists():
        if (other := run_info(run_folder)["recipe"]) != recipe:
            what = f"{run_folder} holds a run of the recipe {other!r}, not of {recipe!r}."
            raise UserError(f"{what} Choose another folder with --out, or remove that one.")
    else:
        write_json(path, {"format": FORMAT, "recipe": recipe, "made": _now()})
    target = run_folder / "recipe.yaml"
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        write_text(target, text)


def _say_skipped(book: Book, progress: Progress) -> None:
    if book.skipped:
        progress.say(f"done before, nothing changed: {', '.join(book.skipped)}")
        book.skipped.clear()


def _log(run_folder: Path, event: str, stage: str, **more: Any) -> None:
    """Append one line; a line that a kill cut short is closed first."""
    line = json.dumps({"time": _now(), "event": event, "stage": stage, **more}, ensure_ascii=False)
    with open(run_folder / "log.jsonl", "ab+") as f:
        if f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":
            line = "\n" + line
        f.write(f"{line}\n".encode())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@contextlib.contextmanager
def _sentences(run_folder: Path) -> Iterator[None]:
    """Turn the ways in which a machine stops a run into sentences; SIGTERM ends a run as Ctrl-C does."""
    try:
        with interrupting():
            yield
    except KeyboardInterrupt as e:
        stopped = Interrupted("Stopped. Nothing that was done is lost: the same command continues.")
        stopped.exit_code = exit_code(e)
        raise stopped from e
    except DecantError:
        raise
    except Exception as e:
        again = "Everything that was done is kept: the same command continues."
        if _no_space(e):
            raise EnvironmentFailed(f"The disk is full (run folder {run_folder}). Free some space. {again}") from e
        if isinstance(e, MemoryError) or any(t in str(e).lower() for t in ("out of memory", "can't allocate memory")):
            what = "The memory does not suffice. Lower the batch, the crops (number or size) or the prototypes."
            raise EnvironmentFailed(f"{what} {again}") from e
        raise


def _no_space(error: BaseException | None) -> bool:
    """Whether a full disk is at the root of an error; native writers say so in their text only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "no space left on device" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False
