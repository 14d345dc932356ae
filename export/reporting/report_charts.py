"""The report's charts, from rows and training logs: accuracy against latency, the bars of the headline table, training curves."""

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from distill.rows import Row
from export.reporting import plots, tables
from export.reporting.labels import METRICS, label_of, precision_of, target_name
from export.reporting.tables import Book

# Quantities of a training log that get a panel, in this order; other keys stay in report.json.
CURVES = {
    "loss": "Loss (sum of the terms)",
    "dino": "DINO term",
    "dino_global": "DINO term, global crops",
    "dino_local": "DINO term, local crops",
    "ibot": "iBOT term",
    "koleo": "KoLeo term",
    "teacher_entropy": "Entropy of the teacher's targets, nats",
    "prototype_entropy": "Entropy of the mean target, nats",
    "effective_rank": "Effective rank of the features",
    "nearest_distance": "Distance to the nearest other image",
    "nearest_distance_min": "Distance to the nearest, least of a batch",
    "feature_std": "Standard deviation of the features",
    "knn_top1": "kNN in training, %",
    "lr": "Learning rate",
}
MOST_POINTS = 300  # of a curve on the page
# By precision; FP16 and BF16 are both halves, and of the last two only the weights are small.
SHAPES = {"fp16": "diamond", "bf16": "diamond", "int8": "square", "fp8": "triangle", "w8": "wedge", "w4": "wedge"}
SHAPE_NAMES = {
    "circle": "circles are FP32",
    "diamond": "diamonds FP16 and BF16",
    "square": "squares INT8",
    "triangle": "triangles FP8",
    "wedge": "triangles on their tip INT8 or INT4 weights",
}
COLOURS = ("c1", "c2", "c3", "c4", "c6", "c7")


def styles_of(subjects: Iterable[str]) -> dict[str, str]:
    """Subject -> CSS classes: the teacher's colour, one a model, dashed in that colour its control and what was just cut, grey the rest."""
    subjects = list(subjects)
    kinds = ("students", "pruned", "qad", "control", "cut")
    parts = [s.partition("/")[::2] for s in subjects]
    names = dict.fromkeys(name for _, name in sorted((kinds.index(kind), name) for kind, name in parts if kind in kinds))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    found = {}
    for subject in subjects:
        kind, _, name = subject.partition("/")
        dashed = " dashed" if kind in ("control", "cut") else ""
        found[subject] = "c0" if kind == "teacher" else f"{colour[name]}{dashed}" if kind in kinds and name else "c5"
    return found


def headline_bars(headline: Sequence[tables.HeadlineRow], styles: dict[str, str]) -> list[Markup | None]:
    """A small bar a row: kNN accuracy and its interval on a scale that all rows share."""
    found = [line.knn for line in headline if line.knn and line.knn.value is not None]
    ends = [v for r in found for v in (r.value, r.low, r.high) if v is not None]
    if not ends:
        return [None] * len(headline)
    span = plots.padded(ends)
    return [
        Markup(plots.interval_bar(line.knn.value, _interval(line.knn), span, styles[line.subject]))
        if line.knn and line.knn.value is not None
        else None
        for line in headline
    ]


def tradeoff_charts(book: Book, metric: str, styles: dict[str, str]) -> tuple[list[Markup], str]:
    """The accuracy-latency chart, once for wide and once for narrow screens, and what its shapes mean; nothing where no model or file
    has both numbers.
    """
    found: list[plots.Point] = []
    name = METRICS[metric]
    models = {subject for subject, _ in book.artifacts()}
    for subject, target in book.subjects():
        latency = book.latency(subject, target, "latency_p50_ms", largest=False)
        accuracy = book.one(metric, subject, target)
        if not (latency and accuracy and latency.value and accuracy.value is not None):
            continue
        whole = label_of(subject, target).replace("Distilled student ", "") + (", PyTorch" if target == "torch-fp32" else "")
        tip = (
            f"{whole}: {tables.significant(latency, 'ms')} at batch {latency.conditions.get('batch', 1)}, "
            f"{name} {tables.percent(accuracy)} %"
        )
        label = target_name(target) if models == {subject} else whole  # of one model only its file needs saying
        shape = SHAPES.get(precision_of(target), "circle")
        intervals = _interval(latency), _interval(accuracy)
        found.append(plots.Point(latency.value, accuracy.value, label, tip, styles[subject], shape, *intervals))
    if not found:
        return [], ""
    title = f"Accuracy ({name}) against latency"
    x, y = "median time of a call, ms (logarithmic)", f"{name} accuracy, %"
    wide, narrow = (plots.scatter(found, title, x, y, *size) for size in ((912, 440, "wide"), (364, 400, "narrow")))
    used = [words for shape, words in SHAPE_NAMES.items() if any(p.shape == shape for p in found)]
    return [Markup(wide), Markup(narrow)], ", ".join(used).capitalize().replace("fp", "FP").replace("int", "INT").replace(
        "bf", "BF"
    )


def curve_panels(curves: dict[str, list[dict[str, Any]]], styles: dict[str, str]) -> list[tuple[str, Markup]]:
    """(title, chart) for every quantity of CURVES that any model logged."""
    panels = []
    for key, title in CURVES.items():
        drawn = []
        for subject, records in curves.items():
            good = [r for r in records if isinstance(r.get(key), int | float)]
            good = good[:: max(1, len(good) // MOST_POINTS)] + good[-1:]
            if good:
                label = label_of(subject, "torch-fp32")
                drawn.append(plots.Line(label, [r["images"] for r in good], [r[key] for r in good], styles[subject]))
        if drawn:
            panels.append((title, Markup(plots.lines(drawn, title, "images seen"))))
    return panels


def _interval(row: Row) -> tuple[float, float] | None:
    return None if row.low is None or row.high is None else (row.low, row.high)
