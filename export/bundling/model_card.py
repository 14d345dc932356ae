"""`MODEL_CARD.md` of a bundle: what the model is, what for, from which data, with which numbers, and where it ends.

The headings are those of Mitchell et al., "Model Cards for Model Reporting" (arXiv 1810.03993), section 4. What was not measured is
said to be so; nothing here is a number that is not a row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from distill.rows import Row
from export.artifact import Artifact
from export.bundling.origin import said
from export.reporting.labels import METRICS, target_name

TEMPLATE = Path(__file__).parent.parent / "templates" / "bundle" / "MODEL_CARD.md.j2"
QUALITY = frozenset(METRICS) - {"load_s", "peak_memory_mb", "build_s", "noise_floor_percent", "class_iou", "size_mb"} | {
    "cosine_min"
}
SETTINGS = (
    "task",
    "data",
    "resolution",
    "classes",
    "k",
    "shots",
    "batch",
    "threads",
    "device",
    "runtime",
    "versus",
    "output",
    "source",
)
UNITS = {"_ms": " ms", "_mj_per_image": " mJ", "_m": " m", "images_per_s": " images/s"}
PERCENT = ("_top1", "micro_ap", "miou", "foreground_iou", "pixel_accuracy", "map", "recall_at_k", "pck")
INTENDED = (
    "Features of images like those of the training data: retrieval, nearest-neighbour and linear classification, "
    "and, from the patches, segmentation, depth and matching with a small head trained on top."
)
LIMITS = (
    "The network gives features, not decisions: what a head on top of them does has to be measured with that head.",
    "Images unlike the training data, in content, optics or preprocessing, may give features of any quality; nothing reports it.",
    "Neither fairness towards groups of people nor robustness against deliberate attacks was measured.",
)
WEIGHTS_LICENCE = "follows from the training data and the teacher; this file grants none"


def shown(rows: Sequence[Row], targets: Sequence[str]) -> list[Row]:
    """The measured rows that a reader of the card asks for, target by target, else in the order of the run's rows."""
    wanted = QUALITY | {f"{m}_difference" for m in QUALITY}
    found = [r for r in rows if r.status == "measured" and r.metric in wanted and r.target in targets]
    return sorted(found, key=lambda r: targets.index(r.target))


def missing(rows: Sequence[Row], targets: Sequence[str]) -> list[str]:
    """What was not measured, a line for each target and reason."""
    found: dict[tuple[str, str | None], list[str]] = {}
    for r in rows:
        if r.status == "not measured" and r.metric in QUALITY and r.target in targets:
            found.setdefault((r.target, r.reason), []).append(r.metric)
    return [f"{', '.join(dict.fromkeys(metrics))} of {target}: {reason}" for (target, reason), metrics in found.items()]


def number(row: Row) -> str:
    """ "84.3 % [83.2, 85.3], n = 5000"."""
    if row.metric == "cosine_min":  # what matters is how far it is from 1
        return f"{row.value:.6f}, n = {row.n}"
    metric = row.metric.removesuffix("_difference")
    if metric.endswith(PERCENT):
        unit = " %" if metric == row.metric else " points"
    else:
        unit = next((u for end, u in UNITS.items() if metric.endswith(end)), "")
    interval = "" if row.low is None or row.high is None else f" [{row.low:.4g}, {row.high:.4g}]"
    return f"{row.value:.4g}{unit}{interval}" + ("" if row.n is None else f", n = {row.n}")


def conditions(row: Row) -> str:
    """The settings that tell rows of one metric apart."""
    return ", ".join(f"{name} {row.conditions[name]}" for name in SETTINGS if name in row.conditions)


def model_card(
    student: str,
    artifacts: Sequence[Artifact],
    rows: Sequence[Row],
    about: dict[str, Any],
    heads: Sequence[dict[str, Any]] = (),
) -> bytes:
    """The card.

    Args:
        rows: of this student. about: the value of lineage.json. heads: as the manifest lists them.
    """
    targets = [a.target for a in artifacts]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    made_from = about["lineage"]
    text = template.render(
        student=student,
        dim=artifacts[0].dim,
        patch=artifacts[0].patch,
        sizes=sorted({f.resolution for a in artifacts for f in a.files}),
        artifacts=[{"name": target_name(a.target), "target": a.target} for a in artifacts],
        architecture=cell(architecture(about)),
        weights=about["model"]["weights_sha256"],
        train=made_from.get("train"),
        teacher=made_from.get("teacher_sha256"),
        commit=made_from.get("commit"),
        intended=INTENDED,
        limits=LIMITS,
        heads=heads,
        licence=WEIGHTS_LICENCE,
        teachers_licence=said(made_from.get("teacher_origin")),
        missing=[cell(text) for text in missing(rows, targets)],
        rows=[
            {"target": r.target, "metric": r.metric, "number": number(r), "conditions": cell(conditions(r))}
            for r in shown(rows, targets)
        ],
    )
    return text.encode()


def architecture(about: dict[str, Any]) -> str:
    """The backbone's settings in a line."""
    backbone = about["model"]["backbone"]
    return ", ".join(
        f"{name} {value}" for name, value in backbone.items() if isinstance(value, int | str) and not isinstance(value, bool)
    )


def cell(text: str) -> str:
    """Text that does not end a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")
