"""Where results of a device lie, so that a run that fails loses none that were measured.

OUT/NAME/                device.json, rows.jsonl, build.json, selftest.json, bench.json, log: the last run that measured something
OUT/NAME/previous/       the same of the run before
OUT/NAME/last_attempt/   a later run that measured nothing
OUT/.attempts/NAME/new/  of a run at work
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.files import read_json, unfinished
from distill.rows import read_rows

ABOUT, ROWS, LOG = "device.json", "rows.jsonl", "log"
PREVIOUS, LAST_ATTEMPT = "previous", "last_attempt"
OURS = {ABOUT, ROWS, LOG, "build.json", "bench.json", "selftest.json", PREVIOUS, LAST_ATTEMPT}


def lock_folder(folder: Path) -> Path:
    """The folder to lock while results for `folder` (OUT/NAME) are made."""
    return folder.parent / ".attempts" / folder.name


def check_place(folder: Path) -> None:
    """That results can be put there.

    Raises:
        UserError: it, or a folder above it, is a file; or it holds files of others, which would be moved.
    """
    if found := next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None):
        raise UserError(f"{found} is a file, and results need a folder; choose another --out.")
    if folder.is_dir() and (
        others := sorted(p.name for p in folder.iterdir() if p.name not in OURS and not unfinished(p.name))
    ):
        raise UserError(f"{folder} holds {others[0]}, which is no result of a device; move it, or choose another --out.")


def begin(folder: Path) -> Path:
    """A new folder for results that `place` puts into `folder`. What an earlier run finished and did not place is placed.

    Raises:
        UserError: as `check_place`.
    """
    check_place(folder)
    new = lock_folder(folder) / "new"
    if (new / ABOUT).is_file():
        place(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def place(folder: Path) -> None:
    """Put the finished results into `folder`: folders are renamed as a whole, and what was measured gives way to nothing less."""
    new = lock_folder(folder) / "new"
    if not (new / PREVIOUS).is_dir():  # else it was killed below
        if not measured(new) and measured(folder):
            shutil.rmtree(folder / LAST_ATTEMPT, ignore_errors=True)
            new.rename(folder / LAST_ATTEMPT)
            return
        before = folder if measured(folder) or not measured(folder / PREVIOUS) else folder / PREVIOUS
        if before == folder and folder.is_dir():
            for part in (PREVIOUS, LAST_ATTEMPT):
                shutil.rmtree(folder / part, ignore_errors=True)
        if before.is_dir():
            before.rename(new / PREVIOUS)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def measured(folder: Path) -> bool:
    """Whether a folder of results has a latency."""
    with suppress(OSError, ValueError):
        return any(r.metric == "latency_p50_ms" and r.status == "measured" for r in read_rows(folder / ROWS))
    return False


def failed_attempt(folder: Path) -> dict[str, Any] | None:
    """device.json of a later run than that of `folder`, which measured nothing."""
    with suppress(OSError, ValueError):
        found = read_json(folder / LAST_ATTEMPT / ABOUT)
        return found if isinstance(found, dict) else None
    return None
