"""Models derived from a student, for the report: pruned ones before and after recovery, and ones trained for their quantization."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.rows import Row
from export.reporting.labels import SHIPPED, label_of, precision_of, short_name, target_name
from export.reporting.tables import Book


@dataclass(frozen=True)
class PrunedView:
    """One pruned model. `models`: (label, MACs, kNN, linear, its own difference to this one, latency) before, after and beside it."""

    label: str
    sentence: str
    models: Sequence[tuple[str, float | None, Row | None, Row | None, Row | None, Row | None]]
    widths: list[tuple[int, str, str]]
    latency_of: str


@dataclass(frozen=True)
class QadView:
    """A file of a model trained for its quantization, beside the same of the model that it started from."""

    target: str
    ptq_label: str
    ptq: Row | None
    qad_label: str
    qad: Row | None
    difference: Row | None


def pruned_view(subject: str, about: Mapping[str, Any], book: Book) -> PrunedView:
    name = subject.partition("/")[2]
    origin = _subject_named(book, str(about.get("from")))
    before, after = about.get("macs_before"), about.get("macs_after")
    rows = []
    target = "onnx-fp32" if book.latency(subject, "onnx-fp32", "latency_p50_ms", False) else "torch-fp32"
    for one, macs in ((origin, before), (f"cut/{name}", after), (subject, after), (f"control/{name}", after)):
        knn = one and book.one("knn_top1", one, "torch-fp32")
        if not one or not knn:
            continue
        label = label_of(one, "torch-fp32") + (", recovered" if one == subject and f"cut/{name}" in _names(book) else "")
        paired = book.difference("knn_top1", subject, "torch-fp32", f"{one}/torch-fp32") if one != subject else None
        linear = book.one("linear_top1", one, "torch-fp32")
        rows.append((label, macs, knn, linear, paired, book.latency(one, target, "latency_p50_ms", False)))
    parts = []
    if isinstance(before, int | float) and isinstance(after, int | float) and before:
        parts.append(f"{100 * after / before:.0f}\u00a0% of the multiply-adds of {about.get('from')}")
    asked = about.get("asked") or {}
    parts += [f"asked were {asked['macs']:g} of them"] if isinstance(asked.get("macs"), int | float) else []
    parts += [f"asked were {asked['latency_ms']:g} ms"] if isinstance(asked.get("latency_ms"), int | float) else []
    parts += [f"importance by {asked['importance']}"] if asked.get("importance") else []
    steps = [s for s in about.get("steps") or [] if isinstance(s, dict)]
    parts += [f"cut in {len(steps)} step{'s' if len(steps) != 1 else ''}"] if steps else []
    old = about.get("before") or {}
    for name_of, was, now in (
        ("width", old.get("dim"), about.get("dim")),
        ("blocks", len(old.get("blocks") or []), len(about.get("blocks") or [])),
    ):
        parts.append(f"{name_of} {now}" if was in (now, None, 0) else f"{name_of} {now} of {was}")
    return PrunedView(short_name(subject), "; ".join(parts) + ".", rows, _widths(about, old), target_name(target))


def _widths(about: Mapping[str, Any], old: Mapping[str, Any]) -> list[tuple[int, str, str]]:
    """(block, heads, MLP width), with what it was before where the number of blocks is the same."""
    blocks = [b for b in about.get("blocks") or [] if isinstance(b, dict)]
    was = old.get("blocks") or []
    was = was if len(was) == len(blocks) else [{}] * len(blocks)

    def text(new: Mapping[str, Any], before: Mapping[str, Any], key: str) -> str:
        return f"{new.get(key)} of {before[key]}" if key in before else str(new.get(key))

    return [(i, text(b, w, "heads"), text(b, w, "hidden")) for i, (b, w) in enumerate(zip(blocks, was, strict=True))]


def _names(book: Book) -> set[str]:
    return {s for s, _ in book.subjects()}


def _subject_named(book: Book, name: str) -> str | None:
    return next((f"{kind}/{name}" for kind in SHIPPED if f"{kind}/{name}" in _names(book)), None)


def origin_of(book: Book, subject: str) -> str | None:
    """The model that a QAD subject was trained from: the one that its files are compared with, pair by pair."""
    for row in book.rows:
        if row.subject == subject and row.metric.endswith("_difference") and row.target not in ("torch-fp32",):
            versus, _, target = str(row.conditions.get("versus")).rpartition("/")
            if target == row.target and versus != subject:
                return versus
    return None


def qad_views(book: Book, metric: str) -> list[QadView]:
    found = []
    for subject, target in book.artifacts():
        origin = origin_of(book, subject) if subject.startswith("qad/") else None
        if origin is None or precision_of(target) in ("fp32", "fp16", "bf16"):
            continue
        ptq, qad = (book.one(metric, s, target) for s in (origin, subject))
        paired = book.difference(metric, subject, target, f"{origin}/{target}")
        found.append(QadView(target_name(target), short_name(origin), ptq, short_name(subject), qad, paired))
    return found
