"""Which file should I ship? Constraints on measured numbers -> the best file, what its intervals leave open, and why the others fail.

`templates/advice.js` answers the same in the page; a test holds the two to equal answers. Measured numbers travel with their text, so that
neither side rounds what the other has rounded differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal

from export.reporting.candidates import Candidate, Number, candidates_of
from export.reporting.labels import METRICS, RUNTIMES
from export.reporting.tables import Book

Versus = Literal["fp32", "teacher"]
Prefer = Literal["accuracy", "latency", "size"]
VERSUS_NAMES: dict[Versus, str] = {"fp32": "the same model in FP32", "teacher": "the teacher"}


@dataclass(frozen=True)
class Constraints:
    """What a file has to meet; None asks nothing.

    Attributes:
        latency_ms, size_mb, loss_points: upper limits, inclusive.
        versus: what `loss_points` is against.
        runtime: "any", or onnx, openvino, rtx, trt.
        batch: of the latency; None takes the smallest that any file was measured at.
        prefer: what the best of those that meet all is best at.
    """

    latency_ms: float | None = None
    size_mb: float | None = None
    loss_points: float | None = None
    versus: Versus = "fp32"
    runtime: str = "any"
    batch: int | None = None
    prefer: Prefer = "accuracy"


@dataclass(frozen=True)
class Advice:
    """The answer.

    Attributes:
        best, nearest: ids; `nearest` only where nothing meets all. met: ids of all that do, best first.
        sentence: the answer in words. notes: what the intervals leave open.
        others: (id, label, reasons) of every other file.
    """

    best: str | None
    nearest: str | None
    met: list[str]
    sentence: str
    notes: list[str]
    others: list[tuple[str, str, list[str]]]


@dataclass(frozen=True)
class _Check:
    """One constraint and one candidate. `excess`: how far above the limit, as a share of it (of a point at least)."""

    reason: str | None = None
    excess: float = 0.0
    note: str | None = None


def advise(candidates: Sequence[Candidate] | Book, wanted: Constraints, metric: str = "knn_top1") -> Advice:
    """The best file that meets all constraints by its measured values; intervals that reach beyond a limit become notes."""
    found = candidates_of(candidates, metric) if isinstance(candidates, Book) else candidates
    files = [c for c in found if c.ships]
    name = METRICS.get(metric, metric)
    if wanted.batch is None:
        wanted = replace(wanted, batch=min((int(b) for c in files for b in c.latency), default=None))
    checks = {c.id: _checks(c, wanted, name) for c in files}
    met = [c for c in files if not any(k.reason for k in checks[c.id])]
    met.sort(key=lambda c: _rank(c, wanted))
    if not met:
        return _nothing(files, checks, wanted, name)
    best = met[0]
    notes = [k.note for k in checks[best.id] if k.note] + _rivals(met, wanted)
    others = []
    for c in files:
        reasons = [k.reason for k in checks[c.id] if k.reason]
        if c is not best:
            others.append((c.id, c.label, reasons or [_behind(c, best, wanted, name)]))
    return Advice(best.id, None, [c.id for c in met], _told(best, wanted, name), notes, others)


def _nothing(files: Sequence[Candidate], checks: dict[str, list[_Check]], wanted: Constraints, name: str) -> Advice:
    """No file meets all: the one whose worst excess is the smallest comes nearest, if any was measured at all."""
    others = [(c.id, c.label, [k.reason for k in checks[c.id] if k.reason]) for c in files]
    worst = {c.id: max(k.excess for k in checks[c.id]) for c in files}
    order = sorted(files, key=lambda c: (worst[c.id], sum(k.excess for k in checks[c.id]), *_rank(c, wanted)))
    nearest = order[0] if order and worst[order[0].id] < inf else None
    said = "Nothing measured meets this."
    if nearest:
        reasons = "; ".join(k.reason for k in checks[nearest.id] if k.reason)
        said += f" Nearest comes {_told(nearest, wanted, name)[:-1]}: {reasons}."
    return Advice(None, nearest.id if nearest else None, [], said, [], others)


def _checks(c: Candidate, w: Constraints, name: str) -> list[_Check]:
    checks = (
        [_Check(f"it does not run on {RUNTIMES.get(w.runtime, w.runtime)}", inf)] if w.runtime not in ("any", c.runtime) else []
    )
    if c.accuracy is None:
        checks.append(_Check(f"its {name} accuracy was not measured", inf))
    batch = _batch(w)
    latency = c.latency.get(batch)
    at = f" at batch {batch}" if batch else ""
    if w.latency_ms is not None or w.prefer == "latency":
        checks.append(_limit(f"latency{at}", latency, w.latency_ms, "ms", abs(w.latency_ms or 0)))
    if w.size_mb is not None or w.prefer == "size":
        checks.append(_limit("size", c.size, w.size_mb, "MB", abs(w.size_mb or 0)))
    if w.loss_points is not None:
        what = f"loss against {VERSUS_NAMES[w.versus]}"
        checks.append(_limit(what, c.loss.get(w.versus), w.loss_points, "points", max(1.0, abs(w.loss_points))))
    return checks


def _limit(what: str, number: Number | None, limit: float | None, unit: str, scale: float) -> _Check:
    if number is None:
        return _Check(f"its {what} was not measured", inf)
    if limit is None:
        return _Check()
    asked = f"{limit:g} {unit}"
    if number.value <= limit:
        beyond = number.high is not None and number.high > limit
        return _Check(note=f"Its {what}, {number.text}, meets {asked}, but the interval reaches beyond." if beyond else None)
    below = number.low is not None and number.low <= limit
    reason = f"its {what}, {number.text}, is above {asked}" + (", though the interval reaches it" if below else "")
    return _Check(reason, (number.value - limit) / scale if scale else inf)


def _batch(w: Constraints) -> str:
    return "" if w.batch is None else str(w.batch)


def _rank(c: Candidate, w: Constraints) -> tuple[Any, ...]:
    """Sorts the best first: by what is preferred, then accuracy or latency, then size, then name."""
    accuracy = -c.accuracy.value if c.accuracy else inf
    number = c.latency.get(_batch(w))
    latency, size = number.value if number else inf, c.size.value if c.size else inf
    first = {"accuracy": (accuracy, latency, size), "latency": (latency, accuracy, size), "size": (size, accuracy, latency)}
    return *first[w.prefer], c.id


def _rivals(met: Sequence[Candidate], w: Constraints) -> list[str]:
    """Of those that meet all: a faster one whose interval of accuracy reaches the best's value is worth a look."""
    best = met[0]
    mine = best.latency.get(_batch(w))
    if w.prefer != "accuracy" or mine is None or best.accuracy is None:
        return []
    faster = []
    for c in met[1:]:
        number = c.latency.get(_batch(w))
        if number and number.value < mine.value and c.accuracy and (c.accuracy.high or c.accuracy.value) >= best.accuracy.value:
            faster.append((number.value, c.id, c, number))
    if not faster:
        return []
    _, _, c, number = min(faster, key=lambda f: f[:2])
    return [f"{c.label} takes less time, {number.text}, and its interval of accuracy reaches the same value."]


def _behind(c: Candidate, best: Candidate, w: Constraints, name: str) -> str:
    """Why one that meets all is not the best."""
    mine, its = _rank(c, w), _rank(best, w)
    texts = {
        "accuracy": (f"less accurate ({c.accuracy.text if c.accuracy else ''})", "equal, and not faster or smaller"),
        "latency": ("slower", "as fast, and not more accurate or smaller"),
        "size": ("larger", "as large, and not more accurate or faster"),
    }
    worse, equal = texts[w.prefer]
    return f"meets all, but is {worse if mine[0] > its[0] else equal}"


def _told(c: Candidate, w: Constraints, name: str) -> str:
    parts = [f"{name} accuracy {c.accuracy.text}" if c.accuracy else f"{name} accuracy not measured"]
    batch = _batch(w)
    number = c.latency.get(batch)
    parts.append(f"{number.text} at batch {batch}" if number else "latency not measured")
    parts.append(c.size.text if c.size else "size not measured")
    if loss := c.loss.get(w.versus):
        paired = "" if c.paired[w.versus] else ", not paired"
        parts.append(f"loss against {VERSUS_NAMES[w.versus]} {loss.text}{paired}")
    return f"{c.label}: {', '.join(parts)}."


PRESETS = (
    ("Fastest within 1 point", Constraints(loss_points=1.0, prefer="latency")),
    ("Smallest within 1 point", Constraints(loss_points=1.0, prefer="size")),
    ("Most accurate", Constraints()),
)


@dataclass(frozen=True)
class Preset:
    """One line of the table that answers without a script."""

    name: str
    wanted: Constraints
    advice: Advice
    choice: Candidate | None


def presets(found: Sequence[Candidate], metric: str) -> list[Preset]:
    by_id = {c.id: c for c in found}
    answers = [(name, wanted, advise(found, wanted, metric)) for name, wanted in PRESETS]
    return [Preset(name, wanted, a, by_id[a.best] if a.best else None) for name, wanted, a in answers]
