"""What the commands share: their common options, and errors as one sentence on stderr with an exit code."""

import gc
import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.errors import DecantError
from recipes.signals import exit_code

if TYPE_CHECKING:
    from distill.progress import Progress

Quiet = Annotated[bool, typer.Option("--quiet", help="Plain lines instead of progress bars.")]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, such as runs/quickstart/bundles/small.tar.gz.")]

Keys = Annotated[
    list[Path],
    typer.Option("--key", metavar="PUB", help="A public key that you trust; may be repeated: one of them must have signed."),
]
RequireSignature = Annotated[bool, typer.Option("--require-signature", help="Refuse a bundle that nobody signed.")]


def collect_garbage() -> None:
    """From here on, for all that is made from here on."""
    gc.freeze()
    gc.enable()


def progress(quiet: bool) -> "Progress":
    from distill.progress import Progress

    return Progress("plain" if quiet else "auto")


class Crash:
    """Where a traceback goes: the run folder, once one is known."""

    folder: Path | None = None

    def write(self, text: str) -> Path:
        if self.folder is not None and (self.folder / "run.json").exists():
            path = self.folder / "crash.txt"
        else:
            path = Path(tempfile.mkdtemp(prefix="decant-")) / "crash.txt"
        path.write_text(text, encoding="utf-8")
        return path


@contextmanager
def sentences() -> Iterator[Crash]:
    """Errors become one sentence on stderr and an exit code; DECANT_DEBUG=1 shows the traceback as well."""
    crash = Crash()
    try:
        yield crash
    except (typer.Exit, BrokenPipeError):
        raise
    except DecantError as e:
        _tell(e, str(e), e.exit_code)
    except KeyboardInterrupt as e:
        _tell(e, "Stopped.", exit_code(e))
    except Exception as e:
        _tell(e, _bug(e, crash), 1)


def _bug(error: Exception, crash: Crash) -> str:
    said = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    try:
        path: Any = crash.write("".join(traceback.format_exception(error)))
    except OSError as e:
        path = f"lost ({e})"
    return f"Decant failed, which is a defect of decant ({what}). The traceback is in {path}: please report it with that file."


def _tell(error: BaseException, sentence: str, code: int) -> None:
    if os.environ.get("DECANT_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    typer.echo(sentence, err=True)
    raise typer.Exit(code) from error
