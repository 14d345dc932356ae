"""The accuracy budget: the fewest layers left in floating point with which a quantized artifact keeps what the recipe asks for.

Every step measures the real artifact on its runtime; nothing is predicted from one layer to several. Each layer is quantized
alone first, which gives the order (`sensitivity`, `ranked`); then the number of layers kept, worst first, is found by doubling
and halving, and layers are given back one by one until no single one can be (`search`). What was measured is written down as it
comes, so that a killed search goes on where it was.

    measure(kept) -> {"cosine_min": 0.9991, "cosine_mean": ..., "size_mb": ..., "knn_points": 0.1, "knn_low": ..., ...}
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.files import sha256_json, write_text
from distill.progress import Progress, Task

Kept = frozenset[str]
Measured = dict[str, Any]
Measure = Callable[[Kept], Measured]
LEDGER = "budget.jsonl"
POINTS = {"knn_points": "kNN", "linear_points": "linear probe"}


class BudgetConfig(Config):
    """How much accuracy quantization may cost; at least one of the first three is given.

    Attributes:
        cosine_min: the least cosine, over every CLS and patch vector, to the full-precision artifact on training images.
        knn_points, linear_points: the most percentage points of top-1 accuracy that may be lost; measured inside the labelled
            gallery, never on the test set.
        within_noise: a loss whose paired 95 % interval reaches 0 counts as none.
        images: training images that the cosine is measured on; they are others than those that calibrate.
        gallery: labelled images, spread over the gallery, that the points are measured on.
        most_kept: the most layers that may stay in floating point; half of them where it is not given.
        evaluations: artifacts built by the search at most (those that find the order come on top, one a layer).
    """

    cosine_min: float | None = None
    knn_points: float | None = None
    linear_points: float | None = None
    within_noise: bool = True
    images: int = 32
    gallery: int = 2000
    most_kept: int | None = None
    evaluations: int = 60

    def problems(self) -> list[str]:
        found = []
        if self.cosine_min is None and self.knn_points is None and self.linear_points is None:
            found.append("cosine_min, knn_points and linear_points are all left out: a budget needs at least one of them")
        if self.cosine_min is not None and not -1 < self.cosine_min < 1:
            found.append(f"cosine_min must be above -1 and below 1, got {self.cosine_min}")
        for name in POINTS:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                found.append(f"{name} must be between 0 and 100 percentage points, got {value}")
        if self.most_kept is not None and self.most_kept < 0:
            found.append(f"most_kept must be at least 0, got {self.most_kept}")
        found += [f"{name} must be at least 1, got {v}" for name in ("images", "evaluations") if (v := getattr(self, name)) < 1]
        if self.gallery < 100:
            found.append(f"gallery must be at least 100 images, got {self.gallery}")
        return found

    def asked(self) -> dict[str, float]:
        """The limits that were given, by name."""
        names = ("cosine_min", *POINTS)
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def asks_accuracy(self) -> bool:
        return bool(self.asked().keys() & POINTS.keys())

    def most(self, layers: int) -> int:
        """Layers of so many that may stay in floating point; one at least is quantized."""
        return max(0, min(layers - 1, layers // 2 if self.most_kept is None else self.most_kept))


def met(config: BudgetConfig, measured: Measured) -> bool:
    """Whether every limit holds; what was not measured does not."""
    return all(v <= 0 for v in shortfalls(config, measured))


def shortfalls(config: BudgetConfig, measured: Measured) -> tuple[float, ...]:
    """How far each limit is missed, in its own unit, cosine first; 0 where it holds, infinite where it was not measured."""
    found = []
    for name, limit in config.asked().items():
        value = measured.get(name)
        if value is None or not math.isfinite(value):
            found.append(math.inf)
        elif name == "cosine_min":
            found.append(max(0.0, limit - value))
        else:
            low = measured.get(name.replace("points", "low"))
            noise = config.within_noise and low is not None and low <= 0
            found.append(0.0 if noise else max(0.0, value - limit))
    return tuple(found)


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


class Ledger:
    """Measurements on disk, one JSON line each, in the order in which they were made.

    Args:
        path: of the file; None keeps them in memory only.
        identity: all that the measurements depend on (model, images, settings, versions). A file of another one is begun anew.
    """

    def __init__(self, path: Path | None = None, identity: Mapping[str, Any] | None = None):
        self.path, self.known = path, {}  # type: ignore[var-annotated]
        if path is None:
            return
        first = json.dumps({"identity": sha256_json(dict(identity or {}))})
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        records = [r for line in lines[1:] if (r := _record(line))] if lines[:1] == [first] else []
        self.known = {frozenset(r["kept"]): r["measured"] for r in records}
        write_text(path, "\n".join([first, *map(json.dumps, records)]) + "\n")  # without a line that a kill cut short

    def at(self, kept: Kept, measure: Measure) -> Measured:
        if kept not in self.known:
            self.known[kept] = measured = measure(kept)
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as f:
                    f.write(json.dumps({"kept": sorted(kept), "measured": measured}) + "\n")
        return self.known[kept]


def _record(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("measured"), dict) and "kept" in value else None


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
            measured = ledger.at(everything - {layer}, measure)
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
    asked: dict[Kept, Measured] = field(default_factory=dict)

    def meets(self, kept: Kept) -> bool:
        if kept not in self.asked:
            if len(self.asked) >= self.config.evaluations:
                raise _Spent
            measured = self.asked[kept] = self.ledger.at(kept, self.measure)
            shown = {name: measured[name] for name in self.config.asked() if measured.get(name) is not None}
            self.task.advance(1, kept=len(kept), **shown)
        return met(self.config, self.asked[kept])

    def best(self) -> Kept:
        """Of those that meet the budget the one with fewest layers kept, else the one that comes nearest, cosine first."""

        def rank(kept: Kept) -> tuple[Any, ...]:
            measured = self.asked[kept]
            return (not met(self.config, measured), shortfalls(self.config, measured), len(kept), sorted(kept))

        return min(self.asked, key=rank)


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
        if len(self.curve) >= self.config.evaluations:
            cure = "raise budget.evaluations, loosen the budget"
        elif self.most < self.layers - 1:
            cure = f"raise budget.most_kept above {self.most}, loosen the budget"
        else:
            cure = "loosen the budget"
        return (
            f"{what} misses its accuracy budget: {asked} {'was' if len(self.config.asked()) == 1 else 'were'} asked, and the best "
            f"of {len(self.curve)} tried, with {len(self.kept)} of {self.layers} layers in floating point, has {reached}; {cure}, "
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
) -> BudgetResult:
    """Find the fewest layers to keep in floating point, by measuring artifacts.

    Nothing kept; then 1, 2, 4, ... of the most damaging layers until the budget is met; then halving between the last that
    failed and the first that met; then each kept layer, least damaging first, is given back where the budget allows, again and
    again until none can be. A budget that is not met is no exception here: `BudgetResult.failure` says so.

    Args:
        sensitivities: of all layers that could be quantized, in any order.
        measure: kept layers -> measurements of the artifact with these in floating point. It may leave out the dear ones
            (accuracy) where a cheap one (cosine) breaks the budget already.
    """
    order = ranked(config, sensitivities)
    names, most = [s.layer for s in order], config.most(len(order))
    minimal = False
    with progress.task(title, None, "artifacts") as task:
        trials = _Trials(config, measure, ledger, task)
        try:
            kept = _smallest_prefix(trials, names, most)
            if kept is not None:
                _give_back(trials, kept, names)
                minimal = True
        except _Spent:
            progress.say(f"{title}: stopped after {config.evaluations} artifacts (budget.evaluations)", warning=True)
    best = trials.best()
    curve = [{"kept": [n for n in names if n in k], "met": met(config, m), **m} for k, m in trials.asked.items()]
    return BudgetResult(
        config=config,
        met=met(config, trials.asked[best]),
        kept=[n for n in names if n in best],
        reached=trials.asked[best],
        minimal=minimal,
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
