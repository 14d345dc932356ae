"""A comparison as Markdown for a pull request, as JUnit XML for CI, and as lines for a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from export.compare import TIMED, Change, Comparison
from export.reporting.compare_gates import Judged
from export.reporting.labels import METRICS, label_of
from export.reporting.tables import digits

if TYPE_CHECKING:
    from rich.table import Table

MARKS = {
    "BETTER": "better",
    "WORSE": "**worse**",
    "INCONCLUSIVE": "no difference shown",
    "EQUAL": "equal",
    "NOT COMPARED": "not compared",
}
SHOWN = ("BETTER", "WORSE")


def interesting(comparison: Comparison, judged: Sequence[Judged], everything: bool) -> list[Change]:
    """What a reader must see: what changed, and what a gate looked at; or all."""
    gated = {id(j.change) for j in judged}
    return [c for c in comparison.changes if everything or c.verdict in SHOWN or id(c) in gated]


def what(change: Change) -> str:
    """`kNN of small, ONNX INT8 (batch 8)`."""
    hidden = {"resolution", "threads", "source"} | (set() if change.metric in TIMED else {"batch"})
    hidden |= {"k"} if change.metric.endswith("knn_top1") else set()
    said = {k: v for k, v in change.where.items() if k not in hidden}
    named = [str(v) if k in ("task", "output", "class_name") else f"{k} {v}" for k, v in said.items()]
    return f"{METRICS.get(change.metric, change.metric)} of {label_of(change.subject, change.target)}" + (
        f" ({', '.join(named)})" if named else ""
    )


def numbers(change: Change) -> tuple[str, str, str]:
    """a, b, and their difference with its interval."""
    low, high = change.low, change.high
    interval = "" if low is None or high is None else f" [{_signed(low)}, {_signed(high)}]"
    return digits(change.a), digits(change.b), _signed(change.difference) + interval


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{digits(abs(value))}"


def summary_line(comparison: Comparison) -> str:
    """`3 better, 1 worse, 20 without a shown difference, ...`."""
    words = {"BETTER": "better", "WORSE": "worse", "INCONCLUSIVE": "without a shown difference", "EQUAL": "equal"}
    words["NOT COMPARED"] = "not compared"
    counts = {v: sum(c.verdict == v for c in comparison.changes) for v in words}
    said = [f"{n} {words[v]}" for v, n in counts.items() if n]
    return ", ".join(said) + "." if said else "The runs have no number in common."


def markdown(comparison: Comparison, judged: Sequence[Judged], settings: Sequence[str], everything: bool = False) -> str:
    """For a pull request: gates first, then what changed, then what else to know."""
    lines = [f"### {_safe(comparison.a)} → {_safe(comparison.b)}", "", summary_line(comparison), ""]
    if judged:
        lines += ["| gate | on | | |", "|---|---|---|---|"]
        for j in judged:
            on = "—" if j.change is None else what(j.change)
            lines.append(f"| `{j.gate.text}` | {_safe(on)} | {'passed' if j.passed else '**FAILED**'} | {_safe(j.why)} |")
        lines.append("")
    if chosen := interesting(comparison, judged, everything):
        lines += ["| | before | after | difference [95 %] | |", "|---|---:|---:|---:|---|"]
        for change in chosen:
            a, b, difference = numbers(change)
            how = f" ({change.how})" if change.verdict == "NOT COMPARED" else ""
            lines.append(f"| {_safe(what(change))} | {a} | {b} | {difference} | {MARKS[change.verdict]}{how} |")
        lines.append("")
    lines += [f"> {_safe(note)}" for note in comparison.notes]
    for title, names in (("Only in the first", comparison.only_a), ("Only in the second", comparison.only_b)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"> {title}: {_safe(', '.join(names[:5]))}{more}.")
    if settings:
        lines += [
            "",
            "<details><summary>Settings that differ</summary>",
            "",
            *(f"- {_safe(s)}" for s in settings),
            "",
            "</details>",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _safe(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def junit(comparison: Comparison, judged: Sequence[Judged]) -> str:
    """A test case for each gate on each number; without gates one for each number, failing where it is worse."""
    suite = ElementTree.Element("testsuite", name=f"decant compare {comparison.a} {comparison.b}")
    failures = 0
    cases = [(f"{j.gate.text} on {what(j.change) if j.change else 'nothing'}", j.change, j.passed, j.why) for j in judged]
    if not judged:
        cases = [(what(c), c, c.verdict != "WORSE", " ".join(numbers(c))) for c in comparison.changes]
    for name, change, passed, why in cases:
        group = f"{change.subject}.{change.target}" if change else "gates"
        case = ElementTree.SubElement(suite, "testcase", classname=group, name=name)
        if not passed:
            failures += 1
            ElementTree.SubElement(case, "failure", message=why).text = why
        elif change is not None and change.verdict == "NOT COMPARED":
            ElementTree.SubElement(case, "skipped", message=change.how)
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(failures))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def change_table(comparison: Comparison, judged: Sequence[Judged], everything: bool) -> "Table | None":
    """For a terminal (rich); None where there is nothing to show."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    chosen = interesting(comparison, judged, everything)
    if not chosen:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for name in ("before", "after", "difference [95 %]"):
        table.add_column(name, justify="right", no_wrap=name != "difference [95 %]")
    table.add_column("verdict")
    styles = {"BETTER": "green", "WORSE": "bold red"}
    for change in chosen:
        said = change.verdict if change.verdict != "NOT COMPARED" else f"not compared: {change.how}"
        table.add_row(Text(what(change)), *map(Text, numbers(change)), Text(said, style=styles.get(change.verdict, "")))
    return table
