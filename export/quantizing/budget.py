"""The accuracy budget: the fewest layers left in floating point with which a quantized artifact keeps what the recipe asks for.

Every step measures the real artifact on its runtime; nothing is predicted from one layer to several. Each layer is quantized
alone first, which gives the order (`sensitivity`, `ranked`); then the number of layers kept, worst first, is found by doubling
and halving, and layers are given back one by one until no single one can be (`search`). Last, what was found has to hold on images
that no choice was made on. What was measured is written down as it comes, so that a killed search goes on where it was.

    measure(kept) -> {"cosine_min": 0.9991, "cosine_mean": ..., "size_mb": ..., "knn_points": 0.1, "knn_low": ..., ...}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.progress import Progress, Task
from export.quantizing.budget_config import POINTS, BudgetConfig, Measured, met, shortfalls
from export.quantizing.budget_ledger import LEDGER, Kept, Ledger, Measure

__all__ = [
    "LEDGER",
    "BudgetConfig",
    "BudgetResult",
    "Kept",
    "Ledger",
    "Measure",
    "Measured",
    "Sensitivity",
    "met",
    "ranked",
    "search",
    "sensitivity",
]


@dataclass(frozen=True)
class Sensitivity:
    """One layer quantized, all others in floating point: what that alone costs.

    Attributes:
        cosine_min, cosine_mean: to the full-precision artifact; None where an output is not finite.
        flops_share: this layer's, of all layers', 0..1.
    """

    layer: str
    cosine_min: float | None
    cosine_mean: float | None
    flops_share: float


def sensitivity(
    layers: Mapping[str, float], measure: Measure, ledger: Ledger, progress: Progress, title: str = "sensitivity"
) -> list[Sensitivity]:
    """Quantize every layer alone, in the order of `layers`.

    Alone, and not "all but one": beside 47 quantized layers the gain of keeping one drowns in the others' rounding. On a trained
    ViT-S/14 keeping the 8 (16) worst by the mean cosine of this leaves a mean of .99923 (.99937), by the other .99902 (.99880).

    Args:
        layers: name -> its multiply-adds, for the shares; all that could be quantized.
        measure: needs to give cosine_min and cosine_mean only.
    """
    total, everything = sum(layers.values()) or 1.0, frozenset(layers)
    found = []
    with progress.task(title, len(layers), "layers") as task:
        for layer, work in layers.items():
            measured = ledger.at(everything - {layer}, measure, "alone")
            found.append(Sensitivity(layer, measured["cosine_min"], measured["cosine_mean"], work / total))
            task.advance(1, cosine_min=measured["cosine_min"])
    return found


def ranked(config: BudgetConfig, found: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Most damaging first: by the worst vector where the budget has a limit for it, else by the mean, which accuracy follows.

    On a trained ViT-S/14 keeping the 8 (24) worst by the minimum leaves a cosine_min of .9939 (.9960), by the mean .9896 (.9878).
    """
    by = ("cosine_mean", "cosine_min") if config.cosine_min is None else ("cosine_min", "cosine_mean")

    def damage(s: Sensitivity) -> tuple[float | str, ...]:
        values = (getattr(s, name) for name in by)
        return (*(-1.0 if v is None else v for v in values), s.layer)

    return sorted(found, key=damage)


class _Spent(Exception):
    """The evaluations are used up."""


@dataclass
class _Trials:
    """What a search has asked for so far. A remembered measurement counts like a new one: a resumed search decides the same."""

    config: BudgetConfig
    measure: Measure
    ledger: Ledger
    task: Task
    confirm: Measure | None = None
    asked: dict[Kept, Measured] = field(default_factory=dict)
    confirmed: dict[Kept, Measured] = field(default_factory=dict)

    def meets(self, kept: Kept) -> bool:
        if kept not in self.asked:
            if len(self.asked) >= self.config.evaluations:
                raise _Spent
            measured = self.asked[kept] = self.ledger.at(kept, self.measure)
            shown = {name: measured[name] for name in self.config.asked() if measured.get(name) is not None}
            self.task.advance(1, kept=len(kept), **shown)
        return met(self.config, self.asked[kept])

    def holds(self, kept: Kept) -> bool:
        """Whether the budget is met, on the other images too."""
        if not self.meets(kept):
            return False
        if self.confirm is not None and kept not in self.confirmed:
            self.confirmed[kept] = self.ledger.at(kept, self.confirm, "confirm")
        return met(self.config, self.reached(kept))

    def reached(self, kept: Kept) -> Measured:
        """Its measurements; those that were made again on other images, from there."""
        return self.asked[kept] | self.confirmed.get(kept, {})

    def best(self) -> Kept:
        """Of those that hold the one with fewest layers kept, else the one that comes nearest, cosine first."""

        def rank(kept: Kept) -> tuple[Any, ...]:
            measured = self.reached(kept)
            unsure = self.confirm is not None and kept not in self.confirmed
            return (unsure or not met(self.config, measured), shortfalls(self.config, measured), len(kept), sorted(kept))

        # Where some were confirmed and failed, those are what is known best: a lucky number of the search is no reason.
        return min(self.confirmed or self.asked, key=rank)


@dataclass(frozen=True)
class BudgetResult:
    """What a search found.

    Attributes:
        kept: the layers to leave in floating point, those of the best artifact found; most damaging first.
        reached: that artifact's measurements.
        minimal: the budget is met, and giving back any single one of the kept layers was measured to break it.
        sensitivity: of all layers, most damaging first.
        curve: every artifact measured, fewest layers kept first: {"kept": [...], "met": bool, measurements...}.
        layers: how many there were to choose from. most: how many were allowed to stay.
        naive: measurements of a plan that quantizes everything, residual additions and attention included, for comparison.
    """

    config: BudgetConfig
    met: bool
    kept: list[str]
    reached: Measured
    minimal: bool
    confirmed: bool
    sensitivity: list[Sensitivity]
    curve: list[dict[str, Any]]
    layers: int
    most: int
    naive: Measured | None = None

    def to_json(self) -> dict[str, Any]:
        """What `artifact.json` holds as details.budget[resolution]."""
        return {
            "asked": self.config.asked() | {"within_noise": self.config.within_noise, "most_kept": self.most},
            "met": self.met,
            "minimal": self.minimal,
            "confirmed": self.confirmed,
            "reached": self.reached,
            "kept": self.kept,
            "layers": self.layers,
            "sensitivity": [vars(s) for s in self.sensitivity],
            "curve": self.curve,
            "naive": self.naive,
        }

    def failure(self, what: str = "The quantized artifact") -> str | None:
        """The sentence of a `GateFailed`: what was asked, what was reached, what to do. None where the budget is met."""
        if self.met:
            return None
        asked = " and ".join(_limit(name, value) for name, value in self.config.asked().items())
        reached = " and ".join(_reached(name, self.reached) for name in self.config.asked())
        lucky = any(point["met"] for point in self.curve)
        on = " on images that the search did not see" if lucky else ""
        if len(self.curve) >= self.config.evaluations:
            cure = "raise budget.evaluations, loosen the budget"
        elif self.most < self.layers - 1:
            cure = f"raise budget.most_kept above {self.most}, loosen the budget"
        else:
            cure = "loosen the budget"
        return (
            f"{what} misses its accuracy budget: {asked} {'was' if len(self.config.asked()) == 1 else 'were'} asked, and the best "
            f"of {len(self.curve)} tried, with {len(self.kept)} of {self.layers} layers in floating point, has {reached}{on}; {cure}, "
            "try another calibration, or distil with quantization."
        )


def _limit(name: str, value: float) -> str:
    return f"cosine_min {value:g}" if name == "cosine_min" else f"at most {value:g} {POINTS[name]} points lost"


def _reached(name: str, measured: Measured) -> str:
    value = measured.get(name)
    if name == "cosine_min":
        return "no finite cosine" if value is None else f"cosine_min {value:.5f}"
    return f"a {POINTS[name]} loss that was not measured" if value is None else f"{value:.2f} {POINTS[name]} points lost"


def search(
    config: BudgetConfig,
    sensitivities: Sequence[Sensitivity],
    measure: Measure,
    ledger: Ledger,
    progress: Progress,
    title: str = "budget",
    naive: Measured | None = None,
    confirm: Measure | None = None,
) -> BudgetResult:
    """Find the fewest layers to keep in floating point, by measuring artifacts.

    Nothing kept; then 1, 2, 4, ... of the most damaging layers until the budget is met; then halving between the last that
    failed and the first that met; then each kept layer, least damaging first, is given back where the budget allows, again and
    again until none can be. Of all that met it the one with fewest layers that holds under `confirm` too is taken, or a longer
    beginning of the order. A budget that is not met is no exception here: `BudgetResult.failure` says so.

    The least of thousands of cosines is an accident of the images, and a search picks the lucky ones: on a trained ViT-S/14 the
    artifact found for 0.994 on 20 images had 0.978 on 30 others.

    Args:
        sensitivities: of all layers that could be quantized, in any order.
        measure: kept layers -> measurements of the artifact with these in floating point. It may leave out the dear ones
            (accuracy) where a cheap one (cosine) breaks the budget already.
        confirm: kept layers -> the measurements that can be made again on other images; asked of few artifacts.
    """
    order = ranked(config, sensitivities)
    names, most = [s.layer for s in order], config.most(len(order))
    minimal = False
    with progress.task(title, None, "artifacts") as task:
        trials = _Trials(config, measure, ledger, task, confirm)
        try:
            kept = _smallest_prefix(trials, names, most)
            smallest = None if kept is None else _give_back(trials, kept, names)
            minimal = smallest is not None and trials.holds(smallest)
            if smallest is not None and not minimal:
                _confirmed(trials, names, most)
        except _Spent:
            progress.say(f"{title}: stopped after {config.evaluations} artifacts (budget.evaluations)", warning=True)
            _confirmed(trials, [], 0)
    best = trials.best()
    curve = [{"kept": [n for n in names if n in k], "met": met(config, m), **m} for k, m in trials.asked.items()]
    for point in curve:
        if (again := trials.confirmed.get(frozenset(point["kept"]))) is not None:
            point |= {f"confirmed_{name}": value for name, value in again.items() if name in ("cosine_min", "cosine_mean")}
    return BudgetResult(
        config=config,
        met=met(config, trials.reached(best)) and (confirm is None or best in trials.confirmed),
        kept=[n for n in names if n in best],
        reached=trials.reached(best),
        minimal=minimal,
        confirmed=best in trials.confirmed,
        sensitivity=order,
        curve=sorted(curve, key=lambda point: (len(point["kept"]), point["kept"])),
        layers=len(names),
        most=most,
        naive=naive,
    )


def _smallest_prefix(trials: _Trials, names: list[str], most: int) -> Kept | None:
    """The shortest of the beginnings of `names` that meets the budget, if accuracy grew with length; None: not even the longest."""
    low, high = -1, 0
    while not trials.meets(frozenset(names[:high])):
        if high >= most:
            return None
        low, high = high, min(most, max(1, 2 * high))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if trials.meets(frozenset(names[:middle])) else (middle, high)
    return frozenset(names[:high])


def _give_back(trials: _Trials, kept: Kept, names: list[str]) -> Kept:
    """Quantize single layers of `kept` again, least damaging first, until every single removal was measured to fail."""
    changed = True
    while changed:
        changed = False
        for layer in [n for n in reversed(names) if n in kept]:
            if trials.meets(kept - {layer}):
                kept, changed = kept - {layer}, True
    return kept


def _confirmed(trials: _Trials, names: list[str], most: int) -> None:
    """Of those that met the budget, fewest layers first, find one that holds; else try longer beginnings of the order."""
    ready = [k for k, m in trials.asked.items() if met(trials.config, m)]
    tried = sorted(ready, key=lambda k: (len(k), sorted(k)))
    if any(trials.holds(k) for k in tried):
        return
    longest = max((len(k) for k in tried), default=most)
    while longest < most:
        longest = min(most, 2 * longest + 1)
        if trials.holds(frozenset(names[:longest])):
            return
