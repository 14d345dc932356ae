"""Findings of `decant lint` for a terminal."""

from collections import Counter
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from export.lint import ORDER, Finding

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def findings_table(path: Path, findings: list[Finding]) -> RenderableType:
    """One file's findings, errors first: severity, rule and place, what it is, and the cure."""
    head = Text.assemble((str(path), "bold"), f": {summary(findings)}")
    if not findings:
        return head
    table = Table.grid(padding=(0, 2, 1, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for f in findings:
        said = Text.assemble((f.rule, "bold"), f"  {f.where}\n{f.message}.\n", ("Cure: ", "bold"), f.cure)
        table.add_row(Text(f.severity, COLOURS[f.severity]), said)
    return Group(head, table)


def summary(findings: list[Finding]) -> str:
    """`1 error, 2 warnings`, or `nothing found`."""
    counts = Counter(f.severity for f in findings)
    parts = [f"{counts[s]} {s}{'s' if counts[s] > 1 else ''}" for s in ORDER if counts[s]]
    return ", ".join(parts) or "nothing found"
