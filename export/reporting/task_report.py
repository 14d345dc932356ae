"""Evaluations beside kNN and linear probe, a table a task: subjects and targets against the task's scores, paired differences below.

Everything here is read off the rows that carry `conditions.task`; a metric that this file has never heard of gets a column like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distill.rows import Row
from export.reporting import tables
from export.reporting.labels import METRICS, label_of
from export.reporting.tables import Book

PERCENT = (
    "_top1",
    "_at_k",
    "miou",
    "miou_majority",
    "_iou",
    "delta1",
    "map",
    "micro_ap",
    "pixel_accuracy",
    "pck",
    "pck_by_chance",
    "pck_at_best",
)
LESS_IS_BETTER = ("rmse_m", "abs_rel")
UNITS = {"rmse_m": "m", "rmse_m_constant": "m"}
SETTINGS = {"shots": "{}-shot", "k": "@{}", "alpha": "@{}"}
CLASSES = ("class_iou",)  # one row a class: in a table of their own


@dataclass(frozen=True)
class TaskView:
    """One task. `columns`: (heading, whether less is better). `lines`: (label, a row or None a column).

    Attributes:
        differences: (label, what it is compared with, a row or None a column); only columns that any pair has, named by
            `difference_columns`.
        classes: class names; `class_lines`: (label, a row or None a class).
        few: whether any of its scores is of fewer than 30 items.
    """

    name: str
    kind: str
    about: str
    columns: list[tuple[str, bool]]
    lines: list[tuple[str, list[Row | None]]]
    difference_columns: list[str]
    differences: list[tuple[str, str, list[Row | None]]]
    classes: list[str]
    class_lines: list[tuple[str, list[Row | None]]]
    few: bool


def task_views(book: Book) -> list[TaskView]:
    """A view a task, in the order of the rows."""
    by_task: dict[str, list[Row]] = {}
    for row in book.rows:
        if "task" in row.conditions:
            by_task.setdefault(str(row.conditions["task"]), []).append(row)
    order = {key: i for i, key in enumerate(book.subjects())}
    return [_view(name, sorted(rows, key=lambda r: order.get((r.subject, r.target), 0))) for name, rows in by_task.items()]


def _view(name: str, rows: Sequence[Row]) -> TaskView:
    scores = [r for r in rows if not r.metric.endswith("_difference") and r.metric not in CLASSES]
    paired = [r for r in rows if r.metric.endswith("_difference")]
    classes = [r for r in rows if r.metric in CLASSES]
    columns = list(dict.fromkeys(_column(r) for r in sorted(scores, key=lambda r: _setting(r))))
    columns.sort(key=lambda c: list(dict.fromkeys(r.metric for r in scores)).index(c[0]))
    lines = _lines(scores, columns)
    compared = [c for c in columns if any(_column(r) == c for r in paired)]
    names = list(dict.fromkeys(str(r.conditions.get("class_name", r.conditions.get("class"))) for r in classes))
    by_class: dict[tuple[str, str, object], dict[str, Row]] = {}
    for r in classes:
        key = (r.subject, r.target, r.conditions.get("resolution"))
        by_class.setdefault(key, {})[str(r.conditions.get("class_name", r.conditions.get("class")))] = r
    sides = _several(classes)
    return TaskView(
        name=name,
        kind=next((str(r.conditions["kind"]) for r in rows if "kind" in r.conditions), ""),
        about=_about(scores or rows),
        columns=[(heading(c), c[0] in LESS_IS_BETTER) for c in columns],
        lines=lines,
        difference_columns=[heading(c, difference=True) for c in compared],
        differences=_differences(paired, compared),
        classes=names,
        class_lines=[(_label(s, t, side, sides), [found.get(n) for n in names]) for (s, t, side), found in by_class.items()],
        few=any(tables.few_samples(r) for r in rows),
    )


Column = tuple[str, tuple[tuple[str, object], ...]]  # metric, settings


def _column(row: Row) -> Column:
    settings = tuple((k, row.conditions[k]) for k in SETTINGS if k in row.conditions)
    return row.metric.removesuffix("_difference"), settings


def _setting(row: Row) -> tuple[float, ...]:
    """Few shots before many."""
    return tuple(float(row.conditions.get(k, 0) or 0) for k in SETTINGS)


def heading(column: Column, difference: bool = False) -> str:
    """ "recall@5, %", "RMSE, m", "1-shot, %"; of a difference the unit is points where the score's is percent."""
    metric, settings = column
    text = METRICS.get(metric, metric.replace("_", " "))
    for key, value in settings:
        said = SETTINGS[key].format(value)
        text = (
            said if metric == "few_shot_top1" and key == "shots" else f"{text}{said}" if said[0] == "@" else f"{text}, {said}"
        )
    unit = UNITS.get(metric, ("points" if difference else "%") if is_percent(metric) else "")
    return text + (f", {unit}" if unit else "")


def is_percent(metric: str) -> bool:
    return metric.removesuffix("_difference").endswith(PERCENT)


def _lines(scores: Sequence[Row], columns: Sequence[Column]) -> list[tuple[str, list[Row | None]]]:
    found: dict[tuple[str, str, object], dict[Column, Row]] = {}
    for r in scores:
        mine = found.setdefault((r.subject, r.target, r.conditions.get("resolution")), {})
        if _column(r) not in mine or mine[_column(r)].status != "measured":
            mine[_column(r)] = r
    sides = _several(scores)
    return [(_label(s, t, side, sides), [cells.get(c) for c in columns]) for (s, t, side), cells in found.items()]


def _differences(paired: Sequence[Row], columns: Sequence[Column]) -> list[tuple[str, str, list[Row | None]]]:
    found: dict[tuple[str, str, str, object], dict[Column, Row]] = {}
    for r in paired:
        key = (r.subject, r.target, str(r.conditions.get("versus")), r.conditions.get("resolution"))
        found.setdefault(key, {})[_column(r)] = r
    sides = _several(paired)
    lines = []
    for (subject, target, versus, side), cells in found.items():
        other, _, its = versus.rpartition("/")
        lines.append((_label(subject, target, side, sides), label_of(other, its), [cells.get(c) for c in columns]))
    return lines


def _label(subject: str, target: str, side: object, several: set[tuple[str, str]]) -> str:
    return label_of(subject, target) + (f", {side} px" if (subject, target) in several and side else "")


def _several(rows: Sequence[Row]) -> set[tuple[str, str]]:
    """What was scored at more than one resolution."""
    sides: dict[tuple[str, str], set[object]] = {}
    for r in rows:
        sides.setdefault((r.subject, r.target), set()).add(r.conditions.get("resolution"))
    return {key for key, found in sides.items() if len(found) > 1}


def _about(rows: Sequence[Row]) -> str:
    """On what data, how many items."""
    data = list(dict.fromkeys(str(r.conditions["data"]) for r in rows if r.conditions.get("data")))
    ns = sorted({r.n for r in rows if r.n is not None})
    parts = [f"on {', '.join(data)}"] if data else []
    if ns:
        parts.append(
            f"n = {tables.count(ns[0])}" if len(ns) == 1 else f"n from {tables.count(ns[0])} to {tables.count(ns[-1])}"
        )
    return "; ".join(parts)
