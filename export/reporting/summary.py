"""The report's first paragraph: what the rows say, in plain words, and no stronger than their intervals allow."""

from collections.abc import Mapping, Sequence

from distill.rows import Row
from export.reporting.labels import short_name, target_name
from export.reporting.tables import MISSING, Book, count, digits, percent

MOST_SENTENCES = 3  # on the files of one model; of more only the fastest is told


def summary(rows: Sequence[Row], images_seen: Mapping[str, int | None] | None = None) -> list[str]:
    """Sentences: the teacher against its yardsticks, each student against its control, each artifact against full precision.

    Args:
        images_seen: subject -> images that its training went through, where known.
    """
    book = Book(rows)
    said = [_teacher(book)]
    seen = images_seen or {}
    for subject in [s for s, t in book.subjects() if s.startswith("students/") and t == "torch-fp32"]:
        said.append(_student(book, subject, seen))
    for subject in [s for s, t in book.subjects() if s.startswith(("pruned/", "qad/")) and t == "torch-fp32"]:
        said += _derived(book, subject)
    idle: list[tuple[str, str]] = []
    for subject in dict.fromkeys(s for s, _ in book.artifacts()):
        sentences, not_run = _artifacts(book, subject)
        said += sentences if subject.startswith("students/") else []
        idle += [(subject, target) for target in not_run]
    return said + _idle(idle)


def _idle(files: Sequence[tuple[str, str]]) -> list[str]:
    """On the files that were made and not run."""
    if not files:
        return []
    models = dict.fromkeys(short_name(s) for s, _ in files)
    listed = (
        _and([target_name(t) for _, t in files]) if len(files) <= MOST_SENTENCES and len(models) == 1 else f"{len(files)} files"
    )
    verb = "was" if len(files) == 1 else "were"
    return [f"{listed} of {_and(list(models))} {verb} not run on this machine; below it says why."]


def _teacher(book: Book) -> str:
    row = book.one("knn_top1", "teacher", "torch-fp32")
    if row is None or row.value is None:
        return f"The teacher's accuracy was {MISSING}" + (f": {row.reason}" if row and row.reason else ".")
    first = f"Nearest neighbours among the teacher's features name {_accuracy(row)} of {count(row.n)} test images correctly"
    compared = [
        _against(book, "teacher", "torch-fp32", "random/teacher", "torch-fp32", "the same network untrained"),
        _against(book, "teacher", "torch-fp32", "raw", _stronger_pixels(book), "raw pixels standardised per image"),
    ]
    return first + _listed([c for c in compared if c]) + "."


def _stronger_pixels(book: Book) -> str:
    """Of the two ways to standardise raw pixels, the one that is harder to beat."""
    found = {t: r.value for t in ("pixels", "pixels-joint") if (r := book.one("knn_top1", "raw", t)) and r.value is not None}
    return max(found, key=lambda t: found[t]) if found else "pixels"


def _student(book: Book, subject: str, seen: Mapping[str, int | None]) -> str:
    name = subject.partition("/")[2]
    row = book.one("knn_top1", subject, "torch-fp32")
    if row is None or row.value is None:
        return f"The accuracy of the distilled student {name} was {MISSING}" + (
            f": {row.reason}" if row and row.reason else "."
        )
    control = f"control/{name}"
    mine, its = seen.get(subject) or seen.get("students"), seen.get(control)
    same = "by the same loop"
    if mine and its:
        same = f"on as many images ({mine:,})" if mine == its else f"on {its:,} images where the student saw {mine:,}"
    versus_control = _against(book, subject, "torch-fp32", control, "torch-fp32", f"its control, trained from scratch {same}")
    versus_teacher = _against(book, subject, "torch-fp32", "teacher", "torch-fp32", "the teacher")
    text = f"The student {name} distilled from it reaches {_accuracy(row)}"
    text += _listed([c for c in (versus_control, versus_teacher) if c]) + "."
    return text if versus_control else f"{text} A control trained from scratch was {MISSING}."


def _against(book: Book, subject: str, target: str, other: str, other_target: str, words: str) -> str | None:
    """ "5.6 points (paired 95 % interval 4.1 to 7.1) above its control", or None where either was not measured."""
    paired = book.difference("knn_top1", subject, target, f"{other}/{other_target}")
    if paired is not None and paired.value is not None and paired.low is not None and paired.high is not None:
        return f"{_paired(paired)} {'above' if paired.value >= 0 else 'below'} {words}"
    a, b = book.one("knn_top1", subject, target), book.one("knn_top1", other, other_target)
    if a is None or b is None or a.value is None or b.value is None:
        return None
    gap = f"{abs(a.value - b.value):.1f} points (not paired, no interval)"
    return f"{gap} {'above' if a.value >= b.value else 'below'} {words}"


def _paired(row: Row) -> str:
    """The size of a difference whose direction the sentence tells; an interval that reaches 0 is called what it is."""
    assert row.value is not None
    assert row.low is not None
    assert row.high is not None
    low, high = (row.low, row.high) if row.value >= 0 else (-row.high, -row.low)
    unsure = ", so perhaps not at all" if low <= 0 else ""
    return f"{abs(row.value):.1f} points (paired 95\u00a0% interval {_plain(low)} to {_plain(high)}{unsure})"


def _derived(book: Book, subject: str) -> list[str]:
    """A pruned model, or one trained for its quantization, against what it came from; nothing where it was not measured."""
    row = book.one("knn_top1", subject, "torch-fp32")
    if row is None or row.value is None:
        return []
    versus = _compared(book, subject, "torch-fp32")
    own = next((v for v in versus if v.startswith(("students/", "pruned/")) and v.endswith("/torch-fp32")), None)
    parts = []
    for other, words in (
        (own, "the model that it came from"),
        (f"control/{subject.partition('/')[2]}/torch-fp32", "its control"),
    ):
        if other in versus:
            origin, _, target = str(other).rpartition("/")
            parts.append(_against(book, subject, "torch-fp32", origin, target, words))
    for target in [t for s, t in book.artifacts() if s == subject and subject.startswith("qad/")]:
        for origin in [v.rpartition("/")[0] for v in _compared(book, subject, target) if v.endswith(f"/{target}")]:
            words = f"{short_name(origin)} quantized after training, both as {target_name(target)}"
            parts.append(_against(book, subject, target, origin, target, words))
    name = short_name(subject)
    return [f"{name[0].upper()}{name[1:]} reaches {_accuracy(row)}" + _listed([p for p in parts if p]) + "."]


def _compared(book: Book, subject: str, target: str) -> list[str]:
    """What it was compared with, pair by pair."""
    return [str(r.conditions.get("versus")) for r in book.all("knn_top1_difference", subject, target)]


def _artifacts(book: Book, subject: str) -> tuple[list[str], list[str]]:
    """A sentence on each quantized or converted file that ran here, or on the fastest of many; and the targets that did not run."""
    name = short_name(subject)
    ran: list[tuple[str, Row | None]] = []
    idle = []
    for target in [t for s, t in book.artifacts() if s == subject]:
        latency = book.latency(subject, target, "latency_p50_ms", largest=False)
        accuracy = book.one("knn_top1", subject, target)
        if not any(r is not None and r.status == "measured" for r in (latency, accuracy)):
            idle.append(target)
        elif not target.endswith("fp32"):
            ran.append((target, latency))
    said = [_artifact(book, subject, target, latency) for target, latency in ran]
    if len(ran) > MOST_SENTENCES:
        timed = [(latency.value, target, latency) for target, latency in ran if latency and latency.value]
        best = min(timed, key=lambda t: t[0], default=None)
        if best:
            told = _artifact(book, subject, *best[1:])
            said = [
                f"Of {len(ran)} converted files of {name} the one with the smallest median latency is {target_name(best[1])}. {told}"
            ]
    return said, idle


def _artifact(book: Book, subject: str, target: str, latency: Row | None) -> str:
    name = short_name(subject)
    parts = []
    paired = book.difference("knn_top1", subject, target, f"{subject}/torch-fp32")
    if paired is not None and paired.value is not None and paired.low is not None and paired.high is not None:
        same = f"is as accurate as at full precision (paired 95\u00a0% interval {_plain(paired.low)} to {_plain(paired.high)} points)"
        change = f"{'loses' if paired.value < 0 else 'gains'} {_paired(paired)} against full precision"
        parts.append(same if abs(paired.value) < 0.05 and paired.low <= 0 <= paired.high else change)
    full = f"{subject}/onnx-fp32"
    ratio = next(
        (r for r in book.all("latency_ratio", subject, target, resolution=book.resolution) if _same(r, full, latency)), None
    )
    if ratio is not None and ratio.value:
        parts.append(_speed(ratio))
    size, whole = book.one("size_mb", subject, target), book.one("size_mb", subject, "onnx-fp32")
    if size and whole and size.value and whole.value:
        parts.append(f"takes {digits(size.value)} MB instead of {digits(whole.value)}")
    return f"As {target_name(target)}, {name} {_and(parts)}." if parts else f"{target_name(target)} of {name} ran."


def _same(ratio: Row, versus: str, latency: Row | None) -> bool:
    batch = latency.conditions.get("batch") if latency else None
    return ratio.conditions.get("versus") == versus and ratio.conditions.get("batch") == batch


def _speed(ratio: Row) -> str:
    """What the verdict allows to say; the ratio is of times, 0.5 being twice as fast."""
    assert ratio.value
    batch = f"at batch {ratio.conditions.get('batch', 1)}"
    verdict = ratio.conditions.get("verdict")
    if verdict == "INCONCLUSIVE" or ratio.low is None or ratio.high is None:
        return f"is not measurably faster or slower than FP32 {batch}"
    span = f"×{ratio.value:.2f} of its time, interval {ratio.low:.2f} to {ratio.high:.2f}"
    return f"is {'faster' if verdict == 'FASTER' else 'slower'} than FP32 {batch} ({span})"


def _accuracy(row: Row) -> str:
    """78.6 % (77.5–79.7); the spaces before % do not break."""
    value, bracket, interval = percent(row).partition(" (")
    return f"{value}\u00a0%{bracket}{interval}"


def _plain(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


def _listed(parts: Sequence[str]) -> str:
    return (": " + ", and ".join(parts)) if parts else ""


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
