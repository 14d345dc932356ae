"""Two runs, number by number: the difference, what is known of it, and gates that a change must pass.

What was measured on the same test images is compared in pairs (both runs keep their answers image by image); else the two intervals are
joined (MOVER, Zou & Donner 2008: the limits of a difference lie the root of the summed squared half-widths away). Latencies of two runs
were never interleaved, so they are compared only where the machine is the same, and even then load may differ: a note says so.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.errors import UserError
from distill.evaluate.pairs import Predictions
from distill.evaluate.scores import ScoreBook
from distill.evaluate.scores import paired as paired_scores
from distill.files import read_json
from distill.rows import Row, read_rows

Verdict = Literal["BETTER", "WORSE", "INCONCLUSIVE", "EQUAL", "NOT COMPARED"]
HIGHER = frozenset(
    """knn_top1 linear_top1 logistic_top1 few_shot_top1 video_top1 video_knn_top1 miou pixel_accuracy foreground_iou delta1 map recall_at_k
    micro_ap pck images_per_s cosine_min cosine_p1 cosine_mean""".split()  # noqa: SIM905
)
LOWER = frozenset(
    """latency_p50_ms latency_p90_ms latency_p99_ms latency_mean_ms gpu_latency_p50_ms size_mb load_s build_s peak_memory_mb rmse_m abs_rel
    energy_mj_per_image preprocess_p50_ms max_abs mean_abs nan_count""".split()  # noqa: SIM905
)
TIMED = frozenset(
    """latency_p50_ms latency_p90_ms latency_p99_ms latency_mean_ms gpu_latency_p50_ms images_per_s load_s build_s peak_memory_mb
    energy_mj_per_image preprocess_p50_ms""".split()  # noqa: SIM905
)
# What tells two rows of one metric, subject and target apart; the second only where time is measured.
APART = ("task", "resolution", "k", "shots", "alpha", "output", "source", "class_name")
APART_IN_TIME = ("batch", "threads")
# How something was measured. Where both runs say it and it differs, the numbers are of different things.
PROTOCOL = (
    *(
        "min_depth",
        "max_depth",
        "mean_over",
        "seed",
        "foreground",
        "threshold",
        "frames",
        "thresholds",
        "layers",
        "pooling",
        "grid",
    ),
    *("temperature", "gallery_size", "protocol", "classes", "images", "measures"),
)


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    name: str
    rows: list[Row]
    recipe: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    predictions: Predictions | None = None
    scores: ScoreBook | None = None


@dataclass(frozen=True)
class Change:
    """B minus A of one number.

    Attributes:
        where: the conditions that tell it from its sisters, in words.
        a, b: the two values. difference: b - a. low, high: its 95 % interval, where there is one.
        percent: the difference in percent of a.
        how: `paired`, `intervals`, `exact`, or why there is no verdict.
    """

    metric: str
    subject: str
    target: str
    where: dict[str, Any]
    a: float
    b: float
    low: float | None
    high: float | None
    verdict: Verdict
    how: str

    @property
    def difference(self) -> float:
        return self.b - self.a

    @property
    def percent(self) -> float | None:
        return 100 * (self.b - self.a) / abs(self.a) if self.a else None

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "difference": self.difference, "percent": self.percent}


@dataclass(frozen=True)
class Comparison:
    """All changes, in the order of B's rows, and what only one run has.

    Attributes:
        only_a, only_b: "metric of subject on target". notes: sentences on what makes the runs hard to compare.
        lost: what the first run measured and the second did not: no gate on it is passed.
    """

    a: str
    b: str
    changes: list[Change]
    only_a: list[str]
    only_b: list[str]
    notes: list[str]
    lost: list[Row] = field(default_factory=list)


def read_side(path: Path) -> Side:
    """A run folder, or a report.json or rows.jsonl that was kept of one.

    Raises:
        UserError: it is none of these, or holds no rows.
    """
    if path.is_dir():
        rows = read_rows(path / "rows.jsonl")
        if not rows:
            raise UserError(f"{path} is no run folder with results (it has no rows.jsonl). Name one, or a report.json.")
        machine = _json(path / "benchmark" / "fingerprint.json")
        recipe = path / "recipe.yaml"
        predictions, scores = path / "evaluate" / "predictions.safetensors", path / "evaluate" / "scores.safetensors"
        return Side(
            path.resolve().name,
            rows,
            recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
            machine,
            Predictions.load(predictions) if predictions.is_file() else None,
            ScoreBook.load(scores) if scores.is_file() else None,
        )
    try:
        if path.suffix == ".jsonl":
            rows = read_rows(path)
            stored: dict[str, Any] = {}
        else:
            stored = read_json(path)
            rows = [Row.model_validate(r) for r in stored["rows"]]
    except FileNotFoundError as e:
        raise UserError(f"There is no {path}. Name a run folder, its report.json or its rows.jsonl.") from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is neither a run's report.json nor its rows.jsonl ({type(e).__name__}).") from e
    if not rows:
        raise UserError(f"{path} holds no rows: there is nothing to compare.")
    name = str(stored.get("run", {}).get("name") or path.stem)
    return Side(name, rows, stored.get("recipe"), stored.get("fingerprint") or {})


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def compare(a: Side, b: Side) -> Comparison:
    """Every number that both runs measured under the same conditions."""
    mine, theirs = _index(a.rows), _index(b.rows)
    same_machine = _same_machine(a.machine, b.machine)
    changes = [_change(a, b, mine[key], row, same_machine) for key, row in theirs.items() if key in mine]
    only_a, only_b = ([named(r) for k, r in one.items() if k not in other] for one, other in ((mine, theirs), (theirs, mine)))
    lost = [row for key, row in mine.items() if key not in theirs]
    return Comparison(a.name, b.name, changes, only_a, only_b, _notes(a, b, changes, same_machine), lost)


def _index(rows: Iterable[Row]) -> dict[tuple, Row]:
    """Measured rows with a direction, by what they are."""
    found: dict[tuple, Row] = {}
    for row in rows:
        if row.status == "measured" and row.metric in HIGHER | LOWER:
            # A k that was chosen by the run itself is a result; the k of a grid is a condition.
            chosen = row.metric in ("knn_top1", "video_knn_top1")
            where = tuple((n, v) for n, v in _where(row).items() if not (n == "k" and chosen))
            found[(row.metric, row.subject, row.target, where)] = row
    return found


def _where(row: Row) -> dict[str, Any]:
    names = (*APART, *APART_IN_TIME) if row.metric in TIMED else APART
    return {n: row.conditions[n] for n in names if n in row.conditions}


def _data(row: Row) -> dict[str, Any]:
    return {n: v for n, v in row.conditions.items() if n.endswith("_fingerprint")}


def _other_protocol(a: Row, b: Row) -> list[str]:
    return [n for n in PROTOCOL if n in a.conditions and n in b.conditions and a.conditions[n] != b.conditions[n]]


def named(row: Row) -> str:
    """`knn_top1 of students/small on onnx-int8`."""
    return f"{row.metric} of {row.subject} on {row.target}"


def _change(a: Side, b: Side, mine: Row, row: Row, same_machine: bool | None) -> Change:
    assert mine.value is not None
    assert row.value is not None
    where = _where(row)
    low, high, how = _interval(a, b, mine, row)
    better = 1 if row.metric in HIGHER else -1
    verdict: Verdict
    if row.metric in TIMED and not same_machine:
        low = high = None
        verdict, how = "NOT COMPARED", "another machine" if same_machine is False else "the machine is not known"
    elif _data(mine) != _data(row):
        low = high = None
        verdict, how = "NOT COMPARED", "other data"
    elif other := _other_protocol(mine, row):
        low = high = None
        verdict, how = "NOT COMPARED", f"other {', '.join(other)}"
    elif low is None or high is None:
        gain = better * (row.value - mine.value)
        certain = how == "exact"
        verdict = "EQUAL" if gain == 0 else ("BETTER" if gain > 0 else "WORSE") if certain else "INCONCLUSIVE"
    elif low <= 0 <= high:
        verdict = "EQUAL" if low == high == 0 else "INCONCLUSIVE"
    else:
        verdict = "BETTER" if (low > 0) == (better > 0) else "WORSE"
    return Change(row.metric, row.subject, row.target, where, mine.value, row.value, low, high, verdict, how)


def _interval(a: Side, b: Side, mine: Row, row: Row) -> tuple[float | None, float | None, str]:
    """(low, high, how) of b - a."""
    if (found := _paired_predictions(a, b, row)) or (found := _paired_scores(a, b, row)):
        return *found, "paired"
    if row.metric in ("size_mb", "nan_count"):
        return None, None, "exact"
    if None in (mine.low, mine.high, row.low, row.high):
        return None, None, "no interval"
    assert mine.value is not None and row.value is not None  # noqa: PT018
    assert mine.low is not None and mine.high is not None and row.low is not None and row.high is not None  # noqa: PT018
    centre = row.value - mine.value
    down = math.hypot(row.value - row.low, mine.high - mine.value)
    up = math.hypot(row.high - row.value, mine.value - mine.low)
    return centre - down, centre + up, "intervals"


def _paired_predictions(a: Side, b: Side, row: Row) -> tuple[float, float] | None:
    """Tango's interval of two accuracies on the same test images, where both runs kept their answers."""
    from distill.evaluate.intervals import paired

    if a.predictions is None or b.predictions is None or "task" in row.conditions:
        return None
    key = f"{row.subject}/{row.target}@{row.conditions.get('resolution')}/{row.metric}"
    right = []
    for side in (b.predictions, a.predictions):
        if key not in side.said:
            return None
        right.append((side.said[key] == side.labels).numpy())
    one, other = b.predictions, a.predictions
    same = one.about[key].get("data_fingerprint") == other.about[key].get("data_fingerprint")
    if not same or len(one.index) != len(other.index) or not bool((one.index == other.index).all()):
        return None
    found = paired(right[0], right[1])
    return found.low, found.high


def _paired_scores(a: Side, b: Side, row: Row) -> tuple[float, float] | None:
    if a.scores is None or b.scores is None or "task" not in row.conditions:
        return None
    c = row.conditions
    extra = "".join(f"-{n}{c[n]}" for n in ("shots", "k", "alpha") if n in c)
    key = f"{c['task']}/{row.subject}/{row.target}@{c.get('resolution')}/{row.metric}{extra}"
    if key not in a.scores.stats or key not in b.scores.stats:
        return None
    if a.scores.stats[key].shape != b.scores.stats[key].shape:
        return None
    return paired_scores(b.scores.score(key), a.scores.score(key)).interval


def _same_machine(a: dict[str, Any], b: dict[str, Any]) -> bool | None:
    """Whether processor, GPUs and usable threads are the same; None where one side does not say."""
    if not a or not b:
        return None
    parts = ("model", "usable_threads", "cores")
    cpu = all((a.get("cpu") or {}).get(p) == (b.get("cpu") or {}).get(p) for p in parts)
    gpus = [[g.get("name") for g in side.get("gpus") or []] for side in (a, b)]
    return cpu and gpus[0] == gpus[1]


def _notes(a: Side, b: Side, changes: Sequence[Change], same_machine: bool | None) -> list[str]:
    notes = []
    if any(c.metric in TIMED for c in changes):
        if same_machine is False:
            models = [str((s.machine.get("cpu") or {}).get("model")) for s in (a, b)]
            notes.append(f"The runs were measured on different machines ({models[0]}; {models[1]}): times are not compared.")
        elif same_machine is None:
            notes.append("One run does not say on which machine it was measured: times are not compared.")
        else:
            notes.append(
                "Times come from two runs that did not take turns: what else the machine did then is in them. For a verdict that "
                "is free of it, time both files in one `decant bench`."
            )
    versions = [s.machine.get("packages") or {} for s in (a, b)]
    changed = sorted(n for n in versions[0].keys() & versions[1].keys() if versions[0][n] != versions[1][n])
    if changed:
        notes.append("Other versions: " + ", ".join(f"{n} {versions[0][n]} → {versions[1][n]}" for n in changed) + ".")
    if any(c.how == "other data" for c in changes):
        notes.append("Some accuracies are of other test or gallery images: those are not compared.")
    return notes


def settings_changed(a: Side, b: Side) -> list[str]:
    """Lines `a.b: old → new` of the two recipes; empty where either is not known."""
    import yaml

    if a.recipe is None or b.recipe is None:
        return []
    old, new = (dict(_flat(yaml.safe_load(s.recipe or "") or {})) for s in (a, b))
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k) and k != "name"]
    return [f"{k}: {_text(old.get(k))} → {_text(new.get(k))}" for k in keys]


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _text(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)
