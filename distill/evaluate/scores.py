"""Scores that are more than right or wrong: sums over items, so that each has a bootstrap interval and paired differences.

A score of n items (images, queries, pairs, videos) is a function of the sum over items of S statistics each: mIoU of the classes'
intersections and unions, RMSE of squared errors and pixels, mAP of average precisions. Drawing items with replacement (Efron 1979) is then
a matrix product, and two subjects measured on the same items are drawn together.

Shape legend: n items, S statistics, R draws.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distill.errors import UserError
from distill.evaluate.intervals import paired as paired_shares
from distill.evaluate.intervals import wilson
from distill.files import replacing
from distill.rows import Row, not_measured

RESAMPLES = 2000
DRAWN_AT_ONCE = 2**24  # counts of a slice of draws
THRESHOLDS = 256  # of `micro_ap`
FEW = 30  # below this many items a row says so
SHARED = (  # conditions that must agree where two subjects are compared
    *(
        "task",
        "kind",
        "data",
        "data_fingerprint",
        "gallery",
        "gallery_fingerprint",
        "queries_fingerprint",
        "distractors_fingerprint",
    ),
    *("resolution", "shots", "k", "alpha", "grid", "seed", "protocol"),
)


def _share(sums: np.ndarray) -> np.ndarray:
    return _divided(sums[..., 0], sums[..., 1])


def _mean_iou(sums: np.ndarray) -> np.ndarray:
    """[..., 2 C] intersections, then unions -> the mean over classes that occur (union above 0), in percent."""
    inside, union = np.split(sums, 2, -1)
    there = union > 0
    return 100 * _divided(np.where(there, inside / np.where(there, union, 1), 0).sum(-1), there.sum(-1))


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)


def _micro_ap(sums: np.ndarray) -> np.ndarray:
    """[..., 2 T] relevant pairs, then others, from the most similar down -> area under the precision-recall curve in percent."""
    relevant, others = np.split(sums, 2, -1)
    found = relevant.cumsum(-1)
    precision = _divided(found, found + others.cumsum(-1))
    return 100 * _divided((np.nan_to_num(precision) * relevant).sum(-1), found[..., -1])


REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "share": _share,  # sum of the first statistic by that of the second
    "percent": lambda sums: 100 * _share(sums),
    "root": lambda sums: np.sqrt(_share(sums)),
    "mean_iou": _mean_iou,
    "micro_ap": _micro_ap,
}


@dataclass(frozen=True)
class Score:
    """One score of one subject.

    Attributes:
        metric: as in Row: `miou`, `rmse_m`, `map`, ...; percent where it is a share.
        reduction: a key of `REDUCTIONS`.
        stats: [n, S] float64, finite, one row an item.
        conditions: what belongs to this score alone, such as k.
        headline: kept, and compared between subjects in pairs.
    """

    metric: str
    reduction: str
    stats: np.ndarray
    conditions: dict[str, Any] = field(default_factory=dict)
    headline: bool = True

    def value(self) -> float:
        return float(REDUCTIONS[self.reduction](self.stats.sum(0)))

    def counted(self) -> int:
        """Items that count: of queries, those with something to find."""
        return int((self.stats[:, -1] > 0).sum()) if self.reduction in ("share", "percent", "root") else len(self.stats)


def percent_right(metric: str, right: np.ndarray, **conditions: Any) -> Score:
    """`right` [n], bool or a share 0..1 for each item -> their mean in percent."""
    right = np.asarray(right, np.float64)
    return Score(metric, "percent", np.stack([right, np.ones_like(right)], 1), conditions)


def interval(score: Score, seed: int = 0) -> tuple[float, float] | None:
    """As `intervals`, of one."""
    return intervals([score], seed)[0]


def intervals(scores: Sequence[Score], seed: int = 0) -> list[tuple[float, float] | None]:
    """95 % percentile bootstrap intervals over items, scores of equally many items drawn together; None for fewer than two items. Of items
    that are right or wrong it is Wilson's, which does not shrink to nothing at 0 % and 100 %."""
    found: list[tuple[float, float] | None] = [None] * len(scores)
    together: dict[int, list[int]] = {}
    for i, score in enumerate(scores):
        if len(score.stats) < 2:
            continue
        if is_share_of_right(score):
            low, high = wilson(int(score.stats[:, 0].sum()), int(score.stats[:, 1].sum()))
            found[i] = float(low), float(high)
        else:
            together.setdefault(len(score.stats), []).append(i)
    for group in together.values():
        sums = _drawn(np.concatenate([scores[i].stats for i in group], 1), seed)
        ends = np.cumsum([scores[i].stats.shape[1] for i in group])
        for i, part in zip(group, np.split(sums, ends[:-1], -1), strict=True):
            found[i] = _limits(REDUCTIONS[scores[i].reduction](part))
    return found


def is_share_of_right(score: Score) -> bool:
    """Whether every item counts once, or not at all, and is right or wrong."""
    return score.reduction == "percent" and bool(np.isin(score.stats, (0.0, 1.0)).all())


@dataclass(frozen=True)
class Difference:
    """a minus b over the same n items, with its 95 % interval (None for fewer than two items) and what kind of interval it is."""

    value: float
    interval: tuple[float, float] | None
    n: int
    how: str


def paired(a: Score, b: Score, seed: int = 0) -> Difference:
    """Both scores over the same draws of items: what makes an item hard is in both, and cancels. Tango's interval where items are right or
    wrong."""
    assert (a.metric, a.reduction, a.stats.shape) == (b.metric, b.reduction, b.stats.shape)
    reduce = REDUCTIONS[a.reduction]
    found = None
    there = a.stats[:, -1] == 1
    if is_share_of_right(a) and is_share_of_right(b) and there.any() and (a.stats[:, 1] == b.stats[:, 1]).all():
        exact = paired_shares(a.stats[there, 0] == 1, b.stats[there, 0] == 1)
        return Difference(exact.difference, (exact.low, exact.high), exact.n, "Tango")
    if len(a.stats) > 1:
        both = _drawn(np.concatenate([a.stats, b.stats], 1), seed)
        mine, theirs = np.split(both, 2, -1)
        found = _limits(reduce(mine) - reduce(theirs))
    return Difference(a.value() - b.value(), found, a.counted(), "paired bootstrap over items")


def _drawn(stats: np.ndarray, seed: int) -> np.ndarray:
    """[n, S] -> [R, S]: sums over R draws of n items, a slice of draws at a time."""
    n, generator = len(stats), np.random.default_rng(seed)
    step = max(1, min(200, DRAWN_AT_ONCE // n))
    slices = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate([generator.multinomial(n, np.full(n, 1 / n), size=r) @ stats for r in slices])


def _limits(values: np.ndarray) -> tuple[float, float] | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


@dataclass
class ScoreBook:
    """All scores of an evaluation, so that any two subjects can be compared later on the same items.

    Attributes:
        stats: key -> [n, S]. about: key -> subject, target, metric, reduction, and the conditions that must agree. Keys:
            `camvid/students/small/onnx-int8@224/miou`.
    """

    stats: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    def rows(self, subject: str, target: str, conditions: dict[str, Any], scores: Iterable[Score]) -> list[Row]:
        """Rows with intervals; headlines are kept for paired differences. `conditions` has `task` and `resolution`."""
        found = []
        scores = list(scores)
        for score, limits in zip(scores, intervals(scores), strict=True):
            said, value = {**conditions, **score.conditions}, score.value()
            if not np.isfinite(value):
                found.append(not_measured(score.metric, subject, target, "No item of the test set can be scored.", **said))
                continue
            if score.headline:
                extra = "".join(
                    f"-{name}{score.conditions[name]}" for name in ("shots", "k", "alpha") if name in score.conditions
                )
                key = f"{said['task']}/{subject}/{target}@{said['resolution']}/{score.metric}{extra}"
                self.stats[key] = np.asarray(score.stats, np.float64)
                self.about[key] = {"subject": subject, "target": target, "metric": score.metric, "reduction": score.reduction}
                self.about[key] |= {name: said[name] for name in SHARED if name in said}
            n = score.counted()
            few: dict[str, Any] = {"few_samples": True} if n < FEW else {}
            few |= {"items_left_out": len(score.stats) - n} if n < len(score.stats) else {}
            low, high = limits or (None, None)
            how = "Wilson" if is_share_of_right(score) else "bootstrap over items"
            found.append(
                Row(
                    metric=score.metric,
                    value=value,
                    low=low,
                    high=high,
                    n=n,
                    subject=subject,
                    target=target,
                    conditions={"interval": how, **said, **few} if limits else {**said, **few},
                )
            )
        return found

    def differences(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Rows `<metric>_difference`, first minus second of `subject/target` pairs, wherever both have the same score of the same items."""
        found = []
        for first, second in pairs:
            mine, theirs = self._of(first), self._of(second)
            for what in (w for w in mine if w in theirs):
                a, b = mine[what], theirs[what]
                same = [(a[size], b[size]) for size in a if size in b]
                if not same and len(a) == len(b) == 1:  # as a teacher that sees the same images larger
                    same = [(next(iter(a.values())), next(iter(b.values())))]
                found += [self._difference(x, y, second) for x, y in same if self.stats[x].shape == self.stats[y].shape]
        return found

    def _of(self, name: str) -> dict[str, dict[Any, str]]:
        """What was scored -> resolution -> key, of one `subject/target`."""
        found: dict[str, dict[Any, str]] = {}
        for key, about in self.about.items():
            if f"{about['subject']}/{about['target']}" == name:
                same = {k: v for k, v in about.items() if k not in ("subject", "target", "resolution")}
                found.setdefault(json.dumps(same, sort_keys=True), {})[about.get("resolution")] = key
        return found

    def score(self, key: str) -> Score:
        about = self.about[key]
        return Score(about["metric"], about["reduction"], self.stats[key])

    def _difference(self, a: str, b: str, second: str) -> Row:
        about = self.about[a]
        found = paired(self.score(a), self.score(b))
        low, high = found.interval or (None, None)
        conditions: dict[str, Any] = {"versus": second} | ({"interval": found.how} if found.interval else {})
        conditions |= {name: about[name] for name in SHARED if name in about}
        if (other := self.about[b].get("resolution")) != about.get("resolution"):
            conditions["versus_resolution"] = other
        return Row(
            metric=f"{about['metric']}_difference",
            value=found.value,
            low=low,
            high=high,
            n=found.n,
            subject=about["subject"],
            target=about["target"],
            conditions=conditions | ({"few_samples": True} if found.n < FEW else {}),
        )

    def save(self, path: Path) -> None:
        with replacing(path) as part:
            save_file(
                {k: np.ascontiguousarray(v) for k, v in self.stats.items()},
                part,
                metadata={"about": json.dumps(self.about, sort_keys=True)},
            )

    @staticmethod
    def load(path: Path) -> "ScoreBook":
        """Raises UserError where the file is absent or damaged."""
        try:
            with safe_open(path, "np") as f:
                stats = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
                return ScoreBook(stats, json.loads((f.metadata() or {})["about"]))
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as e:
            raise UserError(f"{path} holds no scores ({e}). Run the evaluation that writes it again.") from e
