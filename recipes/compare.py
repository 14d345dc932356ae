"""`decant compare`: print the comparison of two runs, write it for pull requests and CI, and judge gates."""

import json
import sys
from pathlib import Path

import typer

from distill.errors import GateFailed, UserError
from distill.files import write_text
from export.compare import Comparison, read_side, settings_changed
from export.compare import compare as differences
from export.reporting.compare_gates import Gate, Judged, judge
from export.reporting.compare_report import change_table, junit, markdown, summary_line


def compare(
    a: Path,
    b: Path,
    gates: list[str],
    strict: bool = False,
    everything: bool = False,
    markdown_file: Path | None = None,
    junit_file: Path | None = None,
    json_file: Path | None = None,
) -> None:
    """Print and write; see the command's help.

    Raises:
        UserError: a run, a gate or a file to write is not what it should be. GateFailed: after everything was written.
    """
    asked = [Gate.parse(g) for g in gates]
    if sum(f == Path("-") for f in (markdown_file, junit_file, json_file)) > 1:
        raise UserError("Only one of --markdown, --junit and --json can go to the standard output.")
    sides = read_side(a), read_side(b)
    found = differences(*sides)
    judged = judge(found, asked, strict)
    settings = settings_changed(*sides)
    written = {
        markdown_file: lambda: markdown(found, judged, settings, everything),
        junit_file: lambda: junit(found, judged),
    }
    for path, text in written.items():
        if path is not None:
            _write(path, text())
    if json_file is not None:
        _write_json(json_file, found, judged, settings)
    if Path("-") not in (markdown_file, junit_file, json_file):
        _show(found, judged, settings, everything)
    if failed := [j for j in judged if not j.passed]:
        raise GateFailed("\n".join(f"Gate {j.gate.text} failed{_on(j)}: {j.why}." for j in failed))


def _on(judged: Judged) -> str:
    return "" if judged.change is None else f" on {judged.change.subject} {judged.change.target}"


def _show(found: Comparison, judged: list[Judged], settings: list[str], everything: bool) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout)
    if (table := change_table(found, judged, everything)) is not None:
        console.print(table)
    typer.echo(f"{found.a} → {found.b}: {summary_line(found)}" + ("" if everything else " --all shows every number."))
    for note in found.notes:
        typer.echo(note)
    for line in settings[:10]:
        typer.echo(f"  {line}")
    if len(settings) > 10:
        typer.echo(f"  and {len(settings) - 10} settings more (--json has them all)")
    for j in judged:
        typer.echo(f"{'passed' if j.passed else 'FAILED'}  {j.gate.text}{_on(j)}: {j.why}")


def _write(path: Path, text: str) -> None:
    if path == Path("-"):
        typer.echo(text, nl=False)
        return
    try:
        write_text(path, text)
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror}); name a file in a folder that may be written.") from e


def _write_json(path: Path, found: Comparison, judged: list[Judged], settings: list[str]) -> None:
    value = {
        "format": "decant-comparison-1",
        "a": found.a,
        "b": found.b,
        "changes": [c.to_json() for c in found.changes],
        "only_a": found.only_a,
        "only_b": found.only_b,
        "notes": found.notes,
        "settings": settings,
        "gates": [
            {"gate": j.gate.text, "on": j.change and j.change.to_json(), "passed": j.passed, "why": j.why} for j in judged
        ],
    }
    _write(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
