"""Models and files as a choice between them sees them: every measured number with its interval and its text, read off the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import hypot

from distill.rows import Row
from export.reporting.labels import PLAIN, RUNTIMES, SHIPPED, label_of, precision_of, target_name
from export.reporting.tables import Book, digits, few_samples


@dataclass(frozen=True)
class Number:
    """A measured number as people and programs read it. `text` has the interval in brackets where there is one."""

    value: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Candidate:
    """A model or file at one resolution, with all that a choice depends on.

    Attributes:
        ships: a file, and no model in PyTorch. Only files are advised.
        latency, throughput: by batch (as text, ascending): ms a call, images a second.
        loss: percentage points below what it is compared with; negative where it is above.
        paired: which of `loss` were measured image by image; the others are differences of two accuracies.
    """

    id: str
    label: str
    subject: str
    target: str
    ships: bool
    runtime: str
    precision: str
    resolution: int | None
    accuracy: Number | None
    n: int | None
    size: Number | None
    latency: dict[str, Number]
    throughput: dict[str, Number]
    loss: dict[str, Number]
    paired: dict[str, bool]
    cosine: Number | None = None
    memory: Number | None = None


@dataclass
class _Rows:
    """Rows of one subject and target at one resolution: looked up once, as a run may have hundreds of files."""

    by_metric: dict[str, list[Row]] = field(default_factory=dict)

    def first(self, metric: str) -> Row | None:
        return next((r for r in self.by_metric.get(metric, ()) if r.status == "measured"), None)

    def by_batch(self, metric: str, unit: str) -> dict[str, Number]:
        rows = [r for r in self.by_metric.get(metric, ()) if r.status == "measured"]
        rows.sort(key=lambda r: r.conditions.get("batch", 1))
        found: dict[str, Number] = {}
        for r in rows:
            found.setdefault(str(r.conditions.get("batch", 1)), _number(r, unit))
        return found


def candidates_of(book: Book, metric: str = "knn_top1") -> list[Candidate]:
    """Every model and file with an accuracy, a latency or a size; files at each of their resolutions."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for r in book.rows:
        if "task" not in r.conditions:
            groups.setdefault((r.subject, r.target), []).append(r)
    teacher = book.one(metric, "teacher", "torch-fp32")
    found = []
    for subject, target in book.subjects():
        rows = groups.get((subject, target), [])
        ships = subject.split("/")[0] in SHIPPED and target not in PLAIN
        sides = sorted({r.conditions["resolution"] for r in rows if "resolution" in r.conditions})
        for side in (sides or [None]) if ships else [book.side(subject, target)]:
            mine = _Rows()
            for r in rows:
                if side is None or r.conditions.get("resolution", side) == side:
                    mine.by_metric.setdefault(r.metric, []).append(r)
            several = len(sides) > 1 and ships
            c = _candidate(book, mine, (subject, target), side, several, metric, teacher)
            if c.accuracy or c.latency or c.size:
                found.append(c)
    return found


def _candidate(
    book: Book, mine: _Rows, key: tuple[str, str], side: int | None, several: bool, metric: str, teacher: Row | None
) -> Candidate:
    subject, target = key
    accuracy = mine.first(metric)
    own = accuracy and book.one(metric, subject, "torch-fp32", resolution=side)
    loss: dict[str, Number] = {}
    paired: dict[str, bool] = {}
    for versus, name, reference in (("fp32", f"{subject}/torch-fp32", own), ("teacher", "teacher/torch-fp32", teacher)):
        differences = mine.by_metric.get(f"{metric}_difference", ())
        row = next((r for r in differences if r.value is not None and r.conditions.get("versus") == name), None)
        number = _lost(row) if row else _unpaired(accuracy, reference)
        if number and name != f"{subject}/{target}":
            loss[versus], paired[versus] = number, row is not None
    parity = [r for r in mine.by_metric.get("cosine_min", ()) if r.value is not None]
    cosine = min(parity, key=lambda r: r.value or 0.0, default=None)
    size, memory = mine.first("size_mb"), mine.first("peak_memory_mb")
    label = label_of(subject, target).replace("Distilled student ", "") + (", PyTorch" if target == "torch-fp32" else "")
    return Candidate(
        id=f"{subject}/{target}" + (f"@{side}" if side else ""),
        label=label + (f", {side} px" if several else ""),
        subject=subject,
        target=target,
        ships=subject.split("/")[0] in SHIPPED and target not in PLAIN,
        runtime=target.partition("-")[0],
        precision=precision_of(target),
        resolution=side,
        accuracy=_number(accuracy, "%", 1) if accuracy else None,
        n=accuracy.n if accuracy else None,
        size=_number(size, "MB") if size else None,
        latency=mine.by_batch("latency_p50_ms", "ms"),
        throughput=mine.by_batch("images_per_s", "images/s"),
        loss=loss,
        paired=paired,
        cosine=Number(cosine.value, None, None, f"{int(cosine.value * 1e5) / 1e5:.5f}") if cosine and cosine.value else None,
        memory=_number(memory, "MB") if memory else None,
    )


def _number(row: Row, unit: str, decimals: int | None = None) -> Number:
    """Its text: 78.4 % (77.2 to 79.5)."""
    assert row.value is not None
    return _worded(row.value, row.low, row.high, unit, decimals, few_samples(row))


def _worded(
    value: float, low: float | None, high: float | None, unit: str, decimals: int | None = None, few: bool = False
) -> Number:
    def text(v: float) -> str:
        said = digits(v) if decimals is None else f"{v:.{decimals}f}"
        return ("0.0" if said == "-0.0" else said).replace("-", "−")

    interval = "" if low is None or high is None else f" ({text(low)} to {text(high)})"
    return Number(value, low, high, f"{text(value)} {unit}{interval}" + (", few samples" if few else ""))


def _lost(row: Row) -> Number:
    """A difference row (this minus the other), turned round."""
    assert row.value is not None
    low, high = (None if v is None else -v for v in (row.high, row.low))
    return _worded(-row.value, low, high, "points", 1, few_samples(row))


def _unpaired(mine: Row | None, other: Row | None) -> Number | None:
    """The difference of two accuracies, its interval as if their images were not the same: wider than a paired one (Newcombe 1998)."""
    if mine is None or other is None or mine.value is None or other.value is None:
        return None
    loss = other.value - mine.value
    if None in (mine.low, mine.high, other.low, other.high):
        return _worded(loss, None, None, "points", 1)
    assert mine.low is not None
    assert mine.high is not None
    assert other.low is not None
    assert other.high is not None
    down = hypot(other.value - other.low, mine.high - mine.value)
    up = hypot(other.high - other.value, mine.value - mine.low)
    return _worded(loss, loss - down, loss + up, "points", 1, few_samples(mine) or few_samples(other))


def runtimes_of(found: Sequence[Candidate]) -> list[tuple[str, str]]:
    """(key, name) of the runtimes that files of this run are for."""
    keys = dict.fromkeys(c.runtime for c in found if c.ships)
    return [(k, RUNTIMES.get(k, target_name(k))) for k in keys]
