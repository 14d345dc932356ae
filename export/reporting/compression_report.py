"""What the report shows about compression: which precision runs, the plans, the budgets' searches, lint, pruning, QAD.

`collect` reads artifact.json and pruning.json of the run, as far as they belong to subjects that have rows; `view` turns them and
the rows into what the template writes. Files may be damaged or of a half-finished run: what is not there is not shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from distill.files import read_json
from distill.rows import Row
from export.artifact import NAME
from export.reporting import bars, tables
from export.reporting.budget_report import BudgetView, budget_views
from export.reporting.derived_report import PrunedView, QadView, pruned_view, qad_views
from export.reporting.labels import label_of, short_name, target_name
from export.reporting.not_faster import attention_text, not_faster, shares_text
from export.reporting.plan_report import PlanView, plan_views
from export.reporting.tables import Book

PARTS = ("plan", "proof", "lint", "budget")
PRUNING = "pruning.json"


def collect(run_folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """{"artifacts": [{"subject", "target", "precision", "plan", "proof", "lint", "budget"}], "pruned": {subject: pruning.json}}."""
    book = Book(rows)
    artifacts = []
    for subject, target in book.artifacts():
        found = _object(run_folder / "export" / subject.partition("/")[2] / target / NAME)
        details = found.get("details")
        if isinstance(details, dict):
            kept = {part: details[part] for part in PARTS if details.get(part)}
            artifacts.append({"subject": subject, "target": target, "precision": found.get("precision"), **kept})
    subjects = dict.fromkeys(s for s, _ in book.subjects() if s.startswith("pruned/"))
    pruned = {s: about for s in subjects if (about := _object(run_folder / s / PRUNING))}
    return {"artifacts": artifacts, "pruned": pruned}


def _object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Fastest:
    """The fastest file of a model at a batch, and the next one. `verdict`: FASTER or INCONCLUSIVE, None with nothing to compare."""

    model: str
    where: str
    batch: int
    first: str
    latency: Row
    second: str | None
    next_latency: Row | None
    verdict: str | None
    difference: Row | None


@dataclass(frozen=True)
class ProofView:
    """What one file's matrix products run in."""

    label: str
    bar: Markup
    shares: str
    casts: int | None
    reformats: int | None
    attention: str
    source: str
    notes: list[str]


@dataclass(frozen=True)
class LintView:
    """A finding, and the files that have it."""

    severity: str
    rule: str
    message: str
    cure: str
    where: str
    files: str


@dataclass(frozen=True)
class View:
    """All parts; an empty one is not shown."""

    fastest: list[Fastest] = field(default_factory=list)
    proofs: list[ProofView] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    plans: list[PlanView] = field(default_factory=list)
    budgets: list[BudgetView] = field(default_factory=list)
    lint: list[LintView] = field(default_factory=list)
    linted: str = ""
    pruned: list[PrunedView] = field(default_factory=list)
    qad: list[QadView] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(
            (self.fastest, self.proofs, self.slow, self.plans, self.budgets, self.lint, self.linted, self.pruned, self.qad)
        )


def view(facts: Mapping[str, Any], book: Book, metric: str = "knn_top1", fingerprint: Mapping[str, Any] | None = None) -> View:
    """What the template writes. `metric`: the accuracy that stands beside latencies. `fingerprint`: of the machine that measured."""
    artifacts = facts["artifacts"]
    findings, linted = _lint(artifacts, book)
    return View(
        fastest=_fastest(book, metric),
        proofs=[p for a in artifacts if (p := _proof(a, book))],
        slow=_slow(artifacts, book, fingerprint),
        plans=plan_views(artifacts, lambda a: at_size(a, "plan", book)),
        budgets=budget_views(artifacts),
        lint=findings,
        linted=linted,
        pruned=[pruned_view(subject, about, book) for subject, about in facts["pruned"].items()],
        qad=qad_views(book, metric),
    )


def at_size(artifact: Mapping[str, Any], part: str, book: Book) -> Any:
    """A part's value at the resolution that the model is shown at, else at the first that there is."""
    by_size = artifact.get(part)
    if not isinstance(by_size, dict) or not by_size:
        return None
    side = book.side(artifact["subject"], artifact["target"])
    return by_size.get(str(side), next(iter(by_size.values())))


# The fastest.


def _fastest(book: Book, metric: str) -> list[Fastest]:
    """Per model, device, threads and batch: the two smallest medians among the files that ship."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for subject, target in book.artifacts():
        for row in book.all("latency_p50_ms", subject, target, resolution=book.side(subject, target)):
            if row.value is not None:
                c = row.conditions
                groups.setdefault((subject, c.get("device"), c.get("threads"), c.get("batch", 1)), []).append(row)
    found = []
    for (subject, device, threads, batch), rows in groups.items():
        if len(rows) < 2:
            continue
        first, second = sorted(rows, key=lambda r: r.value or 0.0)[:2]
        where = ", ".join([str(device or "this machine").replace("cpu", "CPU")] + ([f"{threads} threads"] if threads else []))
        found.append(
            Fastest(
                model=short_name(subject),
                where=where.replace("1 threads", "1 thread"),
                batch=batch,
                first=target_name(first.target),
                latency=first,
                second=target_name(second.target),
                next_latency=second,
                verdict=verdict(book, first, second),
                difference=book.difference(metric, subject, first.target, f"{subject}/torch-fp32"),
            )
        )
    return found


def verdict(book: Book, first: Row, second: Row) -> str:
    """FASTER where the rows say so: a ratio that was measured between the two, else intervals that lie apart by the noise floor."""
    for a, b, better in ((first, second, "FASTER"), (second, first, "SLOWER")):
        for ratio in book.all("latency_ratio", a.subject, a.target, batch=a.conditions.get("batch")):
            if ratio.conditions.get("versus") == f"{b.subject}/{b.target}" and "verdict" in ratio.conditions:
                return "FASTER" if ratio.conditions["verdict"] == better else "INCONCLUSIVE"
    floor = next((r.value for r in book.all("noise_floor_percent") if r.value is not None), None)
    if first.high is None or second.low is None or floor is None:
        return "INCONCLUSIVE"
    return "FASTER" if first.high * (1 + floor / 100) < second.low else "INCONCLUSIVE"


# What runs in which precision.


def _proof(artifact: Mapping[str, Any], book: Book) -> ProofView | None:
    proof = at_size(artifact, "proof", book)
    if not isinstance(proof, dict):
        return None
    shares = dict(sorted((proof.get("flops_share") or {}).items(), key=lambda s: -s[1]))
    return ProofView(
        label=label_of(artifact["subject"], artifact["target"]),
        bar=Markup(bars.share_bar(shares)),
        shares=shares_text(shares) or tables.MISSING,
        casts=proof.get("casts"),
        reformats=proof.get("reformats"),
        attention=attention_text(proof.get("attention") or {}),
        source={"graph": "graph"}.get(proof.get("source", ""), str(proof.get("source", ""))),
        notes=[str(n) for n in proof.get("notes") or []],
    )


def _slow(artifacts: Sequence[Mapping[str, Any]], book: Book, fingerprint: Mapping[str, Any] | None) -> list[str]:
    """A paragraph on every quantized file that was measured not to be faster, also where its artifact.json is gone."""
    known = {(a["subject"], a["target"]): a for a in artifacts}
    found = []
    for subject, target in book.artifacts():
        artifact = known.get((subject, target), {"subject": subject, "target": target})
        proof, plan = (at_size(artifact, part, book) for part in ("proof", "plan"))
        if said := not_faster(subject, target, book, proof, plan, fingerprint):
            found.append(said)
    return found


# Lint.


def _lint(artifacts: Sequence[Mapping[str, Any]], book: Book) -> tuple[list[LintView], str]:
    """Errors and warnings, those of several files together, and a sentence on all."""
    grouped: dict[LintView, list[str]] = {}
    counts = {"error": 0, "warning": 0, "note": 0}
    checked = 0
    for artifact in artifacts:
        findings = at_size(artifact, "lint", book)
        checked += "lint" in artifact or "proof" in artifact
        for f in findings if isinstance(findings, list) else []:
            if not isinstance(f, dict) or f.get("severity") not in counts:
                continue
            counts[f["severity"]] += 1
            if f["severity"] != "note":
                said = {k: str(f.get(k, "")) for k in ("severity", "rule", "message", "cure", "where")}
                one = LintView(**said, files="")
                grouped.setdefault(one, []).append(label_of(artifact["subject"], artifact["target"]))
    if not checked:
        return [], ""
    numbers = [f"{n} {name}{'s' if n != 1 else ''}" for name, n in counts.items()]
    found = [replace(one, files="; ".join(files)) for one, files in grouped.items()]
    said_all = f"{checked} graph{'s' if checked != 1 else ''} checked: {', '.join(numbers[:2])} and {numbers[2]}."
    return sorted(found, key=lambda f: f.severity), said_all + (" The notes are in report.json." if counts["note"] else "")
