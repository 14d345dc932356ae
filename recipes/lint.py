"""`decant lint`: read the files, print the findings as a table, JSON or SARIF."""

import json
import sys
from pathlib import Path
from typing import get_args

import typer

from distill.errors import UserError
from distill.files import write_json
from export.artifact import Precision
from export.lint import READERS, Finding, lint


def check_files(files: list[Path], precision: str | None, reader: str) -> dict[Path, list[Finding]]:
    """Findings by file.

    Raises:
        UserError: a precision or runtime that does not exist, or a file that is none.
    """
    precisions = get_args(Precision)
    if precision is not None and precision not in precisions:
        raise UserError(f"--precision {precision} is none of {', '.join(precisions)}.")
    if reader not in READERS:
        raise UserError(f"--for {reader} is none of {', '.join(READERS)}.")
    return {path: lint(path, precision=precision, reader=reader) for path in files}  # type: ignore[arg-type]


def show(findings: dict[Path, list[Finding]], as_json: bool, sarif: Path | None) -> None:
    """Print; with `sarif` also write that file, or print it alone when it is `-`.

    Raises:
        UserError: both JSON and SARIF are to go to the standard output, or the SARIF file cannot be written.
    """
    if as_json and sarif == Path("-"):
        raise UserError("--json and --sarif - both print to the standard output; give --sarif a file.")
    if sarif is not None:
        from export.linting.sarif import sarif as to_sarif

        log = to_sarif(findings)
        if sarif == Path("-"):
            typer.echo(json.dumps(log, indent=2))
            return
        try:
            write_json(sarif, log)
        except OSError as e:
            raise UserError(f"{sarif} cannot be written ({e.strerror}); name a file in a folder that may be written.") from e
    if as_json:
        typer.echo(
            json.dumps([{"file": str(p), "findings": [f.to_json() for f in fs]} for p, fs in findings.items()], indent=2)
        )
        return
    from rich.console import Console

    from export.linting.lint_table import findings_table

    console = Console(file=sys.stdout)
    for path, found in findings.items():
        console.print(findings_table(path, found))
