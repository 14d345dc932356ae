"""Pictures for the report: what teacher, student and quantized file see, side by side. Features come from the evaluation's own store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distill.data.sources import Source, checked
from distill.errors import UserError
from distill.evaluate.features import TooLarge
from distill.evaluate.kept_heads import head_path
from distill.evaluate.linear_head import Head, predict_item
from distill.evaluate.reader import ImageSets, Subject, SubjectReader
from distill.evaluate.retrieval import clean
from distill.evaluate.split import align
from distill.evaluate.store import FeatureStore
from distill.evaluate.task import Unfit
from distill.progress import Progress
from export.artifact import Unrunnable
from export.reporting.labels import label_of, precision_of
from export.reporting.panels import Panel, depth_panel, retrieval_panel, segmentation_panel
from recipes.data import Data
from recipes.schema import Recipe

SHOWN, NEIGHBOURS = 4, 4  # pictures of a dense task; queries are as many, neighbours of each
SIDE = 160  # pixels, as large as a panel shows a picture


def beside(subjects: Sequence[Subject]) -> list[Subject]:
    """Who stands side by side: teacher, first student, and that student's INT8 file (else its last file), at one resolution each."""
    found = [next(s for s in subjects if s.subject == "teacher" and s.target == "torch-fp32")]
    student = next(s for s in subjects if s.subject.startswith("students/"))
    found.append(student)
    files = [s for s in subjects if s.subject == student.subject and s.target != "torch-fp32"]
    files = [s for s in files if s.preprocess.size == student.preprocess.size and s.target.startswith(("onnx-", "openvino-"))]
    quantized = [s for s in files if precision_of(s.target) == "int8"] or files
    return found + quantized[:1]


def panels(r: Recipe, data: Data, evaluated: Path, kept: Path, subjects: Sequence[Subject], progress: Progress) -> list[Panel]:
    """Nearest neighbours in the gallery, and a panel for every task that predicts maps. A subject that cannot be shown is left out.

    Args:
        evaluated: the evaluation's folder, with trained heads. kept: where its features are.
    """
    shown = _Shown(r, evaluated, kept, beside(subjects), progress)
    found = [shown.neighbours(data.gallery, data.test)] if data.test is not None else []
    for name, task in r.evaluate.tasks.items():
        if task.kind in ("segmentation", "depth"):
            found.append(shown.maps(name, task, checked(data.tasks[name]["test"])))
    return [panel for panel in found if panel is not None]


class _Shown:
    """The subjects of the panels and their stored features."""

    def __init__(self, r: Recipe, evaluated: Path, kept: Path, subjects: Sequence[Subject], progress: Progress):
        self.batch, self.folder, self.kept, self.subjects, self.progress = r.evaluate.batch, evaluated, kept, subjects, progress

    def reader(self, subject: Subject) -> SubjectReader:
        return SubjectReader(subject, FeatureStore(self.kept / "features"), ImageSets(), self.batch, self.progress)

    def neighbours(self, gallery: Source, test: Source) -> Panel | None:
        gallery, test = checked(gallery), checked(test)
        split = align(gallery, test)
        if isinstance(split, str):
            return None
        asked = _spread(len(split.test), SHOWN)
        found: dict[str, list[list[np.ndarray]]] = {}
        right: dict[str, list[list[bool]]] = {}
        for subject in self.subjects:
            try:
                with self.reader(subject) as reader:
                    known = torch.nn.functional.normalize(clean(reader.read(gallery).cls[-1])[split.gallery], dim=1)
                    queries = torch.nn.functional.normalize(clean(reader.read(test).cls[-1])[split.test[asked]], dim=1)
            except (Unfit, Unrunnable, TooLarge):
                continue
            nearest = (queries @ known.T).topk(min(NEIGHBOURS, len(known)), dim=1).indices
            label = label_of(subject.subject, subject.target)
            found[label] = [[_small(gallery.image(int(split.gallery[j]))) for j in row] for row in nearest]
            truth = split.test_labels[asked]
            right[label] = [(split.gallery_labels[row] == t).tolist() for row, t in zip(nearest, truth, strict=True)]
        if not found:
            return None
        return retrieval_panel("Nearest neighbours", [_small(test.image(int(split.test[i]))) for i in asked], found, right)

    def maps(self, name: str, task: Any, source: Any) -> Panel | None:
        index = _spread(len(source), SHOWN)
        truth = [source.map(i) for i in index]
        predicted: dict[str, list[np.ndarray]] = {}
        for subject in self.subjects:
            try:
                head = Head.load(head_path(self.folder, name, subject))
                with self.reader(subject) as reader:
                    stored = reader.read(source, patches=True, layers=head.layers, fit="squash")
            except (UserError, Unfit, Unrunnable, TooLarge):
                continue  # the rows say why
            maps = [predict_item(head, stored, i, t.shape) for i, t in zip(index, truth, strict=True)]
            predicted[label_of(subject.subject, subject.target)] = maps
        if not predicted:
            return None
        images = [_small(source.image(i)) for i in index]
        if task.kind == "depth":
            return depth_panel(f"Depth: {name}", images, truth, predicted)
        known = max(int(max(t.max() for t in truth)), *(int(m.max()) for maps in predicted.values() for m in maps)) + 1
        classes = source.class_names or [str(i) for i in range(known)]
        ignored = [np.where((t >= 0) & (t < len(classes)), t, 255) for t in truth]
        return segmentation_panel(f"Segmentation: {name}", images, ignored, predicted, classes)


def _spread(total: int, n: int) -> list[int]:
    """Up to n numbers below `total`, evenly, from the middles of equal parts."""
    return [int((i + 0.5) * total / min(n, total)) for i in range(min(n, total))]


def _small(image: Image.Image) -> np.ndarray:
    """[SIDE, SIDE, 3] uint8, the whole picture."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
