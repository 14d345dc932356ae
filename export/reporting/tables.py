"""Rows -> what a reader looks up: the headline table, the table of artifacts, and what was not measured, with the reasons.

Everything here selects and labels rows. No number is computed from others, and none is made up for an absent one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distill.rows import Row
from export.reporting.labels import PLAIN, SHIPPED, label_of, metric_name, order

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "not measured"
FEW = ", few samples"  # after a number of fewer than 30 items


@dataclass(frozen=True)
class HeadlineRow:
    """One line of the headline table; a Row that is None or "not measured" is shown as such.

    Attributes:
        label: in words, e.g. "Student small, distilled". n: test images behind `knn` (else behind `linear`).
        latency: p50 at the smallest batch. size: of the file.
    """

    label: str
    subject: str
    target: str
    knn: Row | None
    linear: Row | None
    latency: Row | None
    size: Row | None

    @property
    def shipped(self) -> bool:
        """Whether it is a file that ships, and no model in PyTorch or yardstick."""
        return self.target not in PLAIN

    @property
    def n(self) -> int | None:
        return next((r.n for r in (self.knn, self.linear) if r and r.n), None)


@dataclass(frozen=True)
class ArtifactRow:
    """One shipped file: a student on a target at a resolution. `throughput` is at the largest batch that was measured."""

    label: str
    subject: str
    target: str
    resolution: int | None
    size: Row | None
    latency: Row | None
    throughput: Row | None
    ratio: Row | None
    cosine: Row | None
    accuracy: Row | None
    difference: Row | None
    memory: Row | None


@dataclass(frozen=True)
class Missing:
    """What one reason kept from being measured: (what, metrics) each."""

    reason: str
    items: list[tuple[str, str]] = field(default_factory=list)


class Book:
    """Rows to look things up in.

    Attributes:
        resolution: the students' own input side; a model that was measured at several is shown at this one.
        general: the rows of no task in particular. Every look-up is among these; tasks have tables of their own.
    """

    def __init__(self, rows: Iterable[Row]):
        self.rows = list(rows)
        general = self.general = [r for r in self.rows if "task" not in r.conditions]
        accuracy = [r for r in general if r.metric in ("knn_top1", "linear_top1") and "resolution" in r.conditions]
        fixed = [r for r in accuracy if r.target == "torch-fp32"] or accuracy
        fixed = [r for r in fixed if r.subject.startswith("students/")] or fixed  # a loaded teacher may see larger images
        timed = [r for r in general if r.metric == "latency_p50_ms" and "resolution" in r.conditions]
        self.resolution: int | None = next((r.conditions["resolution"] for r in [*fixed, *timed]), None)
        self._by_metric: dict[str, list[Row]] = {}  # a run may have thousands of rows, and a page looks up hundreds of times
        for r in general:
            self._by_metric.setdefault(r.metric, []).append(r)
        self._by_key: dict[tuple[str, str], list[Row]] = {}
        for r in self.rows:
            self._by_key.setdefault((r.subject, r.target), []).append(r)
        self._sides: dict[tuple[str, str], set[int]] = {}
        for r in [*accuracy, *timed]:
            self._sides.setdefault((r.subject, r.target), set()).add(r.conditions["resolution"])

    def side(self, subject: str, target: str) -> int | None:
        """The resolution that a subject is shown at: the students', or where it was not measured there its own."""
        sides = self._sides.get((subject, target))
        return self.resolution if not sides or self.resolution in sides else min(sides)

    def of(self, subject: str, target: str) -> list[Row]:
        """All rows of a subject and target, those of tasks too."""
        return self._by_key.get((subject, target), [])

    def all(self, metric: str, subject: str | None = None, target: str | None = None, **conditions: Any) -> list[Row]:
        """Rows in order; a condition that a row does not state does not exclude it."""
        return [
            r
            for r in self._by_metric.get(metric, ())
            if subject in (None, r.subject)
            and target in (None, r.target)
            and all(v is None or r.conditions.get(k, v) == v for k, v in conditions.items())
        ]

    def one(self, metric: str, subject: str, target: str, **conditions: Any) -> Row | None:
        """The row, a measured one before one that says why not, one that states the conditions before one that does not.

        At the resolution that the subject is shown at unless told otherwise.
        """
        wanted = {"resolution": self.side(subject, target)} | conditions
        found = self.all(metric, subject, target, **wanted)
        return max(found, key=lambda r: (r.status == "measured", len(wanted.keys() & r.conditions.keys())), default=None)

    def difference(self, metric: str, subject: str, target: str, versus: str, resolution: int | None = None) -> Row | None:
        """The paired difference to `versus` ("subject/target")."""
        return self.one(
            f"{metric}_difference", subject, target, versus=versus, resolution=resolution or self.side(subject, target)
        )

    def latency(self, subject: str, target: str, metric: str, largest: bool, resolution: int | None = None) -> Row | None:
        """A timing at the smallest (or largest) batch that was measured, of this artifact."""
        found = self.all(metric, subject, target, resolution=resolution or self.side(subject, target))
        measured = sorted((r for r in found if r.status == "measured"), key=lambda r: r.conditions.get("batch", 1))
        return measured[-1 if largest else 0] if measured else found[0] if found else None

    def subjects(self) -> list[tuple[str, str]]:
        """(subject, target) in the order of the story: yardsticks, teacher, students, controls, then artifacts."""
        keys = {(r.subject, r.target) for r in self.general if r.target not in ("all", "preprocess") and r.subject != "all"}
        pruned = {subject.partition("/")[2] for subject, _ in keys if subject.startswith("pruned/")}
        return sorted(keys, key=lambda k: order(k, pruned))

    def artifacts(self) -> list[tuple[str, str]]:
        return [k for k in self.subjects() if k[0].split("/")[0] in SHIPPED and k[1] not in PLAIN]


def headline_table(rows: Iterable[Row]) -> list[HeadlineRow]:
    """Yardsticks, teacher, students, controls and every artifact, each with kNN, linear probe, latency and size."""
    book = Book(rows)
    return [
        HeadlineRow(
            label_of(subject, target)
            + (f", at {side} px" if (side := book.side(subject, target)) != book.resolution and target in PLAIN else ""),
            subject,
            target,
            book.one("knn_top1", subject, target),
            book.one("linear_top1", subject, target),
            book.latency(subject, target, "latency_p50_ms", largest=False),
            book.one("size_mb", subject, target),
        )
        for subject, target in book.subjects()
    ]


def artifact_table(book: Book, metric: str = "knn_top1") -> list[ArtifactRow]:
    """One row a shipped file, all students, all resolutions; differences are to the student in PyTorch, ratios to ONNX FP32."""
    found = []
    for subject, target in book.artifacts():
        mine = [r for r in book.of(subject, target) if "task" not in r.conditions]
        sizes = sorted({r.conditions["resolution"] for r in mine if "resolution" in r.conditions}) or [None]
        for size in sizes:
            parity = book.all("cosine_min", subject, target, resolution=size)
            ratios = book.all("latency_ratio", subject, target, resolution=size)
            found.append(
                ArtifactRow(
                    label_of(subject, target),
                    subject,
                    target,
                    size,
                    book.one("size_mb", subject, target, resolution=size),
                    book.latency(subject, target, "latency_p50_ms", False, size),
                    book.latency(subject, target, "images_per_s", True, size),
                    next((r for r in ratios if str(r.conditions.get("versus", "")).startswith(f"{subject}/")), None),
                    min(parity, key=lambda r: -1.0 if r.value is None else r.value, default=None),
                    book.one(metric, subject, target, resolution=size),
                    book.difference(metric, subject, target, f"{subject}/torch-fp32", size),
                    book.latency(subject, target, "peak_memory_mb", True, size),
                )
            )
    return found


def missing_table(rows: Iterable[Row]) -> list[Missing]:
    """What was not measured, grouped by reason, in the order of appearance."""
    found: dict[str, dict[str, list[str]]] = {}
    for r in rows:
        if r.status == "not measured":
            at = f" at {r.conditions['resolution']} px" if "resolution" in r.conditions else ""
            what = (label_of(r.subject, r.target) if r.subject != "all" else "The whole run") + at
            metrics = found.setdefault(str(r.reason), {}).setdefault(what, [])
            name = metric_name(r)
            if name not in metrics:
                metrics.append(name)
    return [Missing(reason, [(what, ", ".join(ms)) for what, ms in items.items()]) for reason, items in found.items()]


# How numbers are written. A missing one is always the words, never a dash.


def measured(row: Row | None) -> bool:
    return row is not None and row.status == "measured"


def few_samples(row: Row | None) -> bool:
    """Whether so few items stand behind a score that its value says little; the evaluation marks such rows."""
    return row is not None and row.conditions.get("few_samples") is True


def percent(row: Row | None) -> str:
    """78.4 (77.2–79.5)."""
    return _with_interval(row, lambda v: f"{v:.1f}")


def significant(row: Row | None, unit: str = "") -> str:
    """1.23 ms (1.20–1.27)."""
    return _with_interval(row, digits, unit)


def plus_minus(row: Row | None) -> str:
    """78.4 ±1.2: the larger side of the interval."""
    if row is None or row.value is None:
        return MISSING
    sides = [abs(end - row.value) for end in (row.low, row.high) if end is not None]
    return f"{row.value:.1f}" + (f" ±{max(sides):.1f}" if sides else "") + (FEW if few_samples(row) else "")


def points(row: Row | None) -> str:
    """+5.6 (4.1 to 7.1), percentage points."""
    if row is None or row.value is None:
        return MISSING
    interval = "" if row.low is None or row.high is None else f" ({signed(row.low)} to {signed(row.high)})"
    return signed(row.value) + interval + (FEW if few_samples(row) else "")


def difference(row: Row | None) -> str:
    """+0.031 (0.012 to 0.050), in the unit of the score."""
    if row is None or row.value is None:
        return MISSING

    def text(v: float) -> str:
        return ("+" if v > 0 else "") + digits(v).replace("-", "−")

    interval = "" if row.low is None or row.high is None else f" ({text(row.low)} to {text(row.high)})"
    return text(row.value) + interval + (FEW if few_samples(row) else "")


def cosine(row: Row | None) -> str:
    """Five decimals, rounded down: 0.99999 and not a false 1.00000."""
    if row is None or row.value is None:
        return MISSING
    return "1" if row.value >= 1 else f"{int(row.value * 1e5) / 1e5:.5f}"


def signed(value: float) -> str:
    text = f"{value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def digits(value: float) -> str:
    """Three significant digits, thousands separated: 0.0123, 1.23, 12.3, 1,230."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def count(n: int | None) -> str:
    return MISSING if n is None else f"{n:,}"


def plain(row: Row | None) -> str:
    """1.23, without the interval."""
    return MISSING if row is None or row.value is None else digits(row.value)


def _with_interval(row: Row | None, write: Any, unit: str = "") -> str:
    if row is None or row.value is None:
        return MISSING
    interval = "" if row.low is None or row.high is None else f" ({write(row.low)}–{write(row.high)})"
    return write(row.value) + (f" {unit}" if unit else "") + interval + (FEW if few_samples(row) else "")


def console_table(rows: Sequence[Row]) -> "Table":
    """The headline table for a terminal of 80 columns (rich): what `decant run` ends with."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = headline_table(rows)
    ns = {line.n for line in lines if line.n is not None}
    batches = {b for line in lines if measured(line.latency) and line.latency and (b := line.latency.conditions.get("batch"))}
    caption = "±: 95 % interval."
    caption += f" n = {count(ns.pop())} test images." if len(ns) == 1 else ""
    caption += f" Latency: median of a call at batch {batches.pop()}." if len(batches) == 1 else ""
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False, padding=0)
    names = ["kNN %", "linear %", *(["n"] if ns else []), "latency ms", "size MB"]
    table.add_column("Frozen features", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    shipped = [line.shipped for line in lines]
    for i, line in enumerate(lines):
        if i and shipped[i] and not shipped[i - 1]:
            table.add_section()
        cells = [plus_minus(line.knn), plus_minus(line.linear), *([count(line.n)] if ns else [])]
        cells += [plain(line.latency), plain(line.size)]
        table.add_row(Text(line.label), *(f"[dim]{c}[/dim]" if c == MISSING else c for c in cells))
    return table
