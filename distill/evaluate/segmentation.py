"""Semantic segmentation by a linear head on frozen patch tokens (DINOv2, section 7.4, "lin."): mean intersection over union.

As there: batch norm (here the training tokens' mean and deviation) and one linear layer on the tokens of the last block. Not as there: the
head learns from the histogram of classes under each patch (see dense_fit.py), images are squashed to the network's square, there is no
augmentation, and the learning rate is chosen on a held-out fifth of the training images by mIoU.

Shape legend: n images, C classes, N tokens, K outputs, R learning rates.
"""

from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy import sparse
from torch import Tensor

from distill.config import Config
from distill.data.maps import MapsConfig, MapSource
from distill.evaluate.dense_fit import NOT_FINITE, FitSettings, Tokens, fit, histograms
from distill.evaluate.linear_head import Head, predict_item
from distill.evaluate.scores import Score
from distill.evaluate.split import overlap
from distill.evaluate.task import Reader, Stored, Unfit
from distill.progress import Progress


class SegmentationTask(Config):
    """Attributes:
    train, test: images with maps of class ids.
    layers: the tokens of the last so many blocks are the head's input: 1 (DINOv2's "lin.") or 4 (its "+ms" without the scales). Exported
        files give the last alone.
    lrs, steps, batch: of the head, see dense_fit.FitSettings; batch counts tokens.
    seed: of the held-out images and the order of the tokens.
    """

    kind: Literal["segmentation"] = "segmentation"
    train: MapsConfig
    test: MapsConfig
    layers: int = 1
    lrs: list[float] = Field(default_factory=lambda: [3.0, 10.0, 30.0, 100.0])
    steps: int = 500
    batch: int = 1024
    seed: int = 0

    def problems(self) -> list[str]:
        """Of the task itself: what is wrong in `train` and `test`, their own `problems` say."""
        found = head_problems(self.layers, self.lrs, self.steps, self.batch, self.seed)
        for role, maps in (("train", self.train), ("test", self.test)):
            if getattr(maps, "scale", None) is not None or getattr(maps, "map", None) == "depth":
                found.append(f"{role} is a depth map, segmentation needs class ids")
        return found

    def sources(self) -> dict[str, Any]:
        return {"train": self.train, "test": self.test}

    def metrics(self) -> tuple[str, ...]:
        return "miou", "pixel_accuracy"

    def judge(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> list[Score]:
        return self.scores(self.fit(reader, sources, progress), reader, sources, progress)

    def fit(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> Head:
        """A head trained on `sources["train"]`. Raises: Unfit, with the sentence why."""
        source: MapSource = sources["train"]
        apart(sources)
        stored = reader.read(source, patches=True, layers=self.layers, fit="squash")
        with progress.task(f"classes of {source.name}", len(source), unit="images") as task:
            shares = histograms((_counted(source.map(i), task) for i in range(len(source))), stored.grid())
        mass = np.asarray(shares.sum(0)).ravel()
        ids = np.flatnonzero(mass)
        if len(ids) < 2:
            raise Unfit(f"The maps of {source.name} show {len(ids)} classes: a head needs two or more to tell apart.")
        settings = FitSettings(tuple(self.lrs), self.steps, self.batch, self.seed)
        found = fit(Tokens(stored, cls=False), shares[:, ids].tocsr(), settings, _largest, _miou)
        return Head(
            "segmentation",
            found.weight.T.contiguous().numpy(),
            found.bias.numpy(),
            found.shift.numpy(),
            found.scale.numpy(),
            ids.astype(np.float32),
            self.layers,
            False,
            [_name(source, int(i)) for i in ids],
            float(mass.argmax()),
            {**asdict(settings), "lrs": list(self.lrs), "lr": found.lr, "held_out_miou": found.held_out, "images": len(source)},
        )

    def scores(self, head: Head, reader: Reader, sources: dict[str, Any], progress: Progress) -> list[Score]:
        """A head judged on `sources["test"]`."""
        assert head.constant is not None, "heads of patches have one"
        source: MapSource = sources["test"]
        stored = readable(reader.read(source, patches=True, layers=head.layers, fit="squash"))
        found, majority = [], []
        with progress.task(f"segment {source.name}", len(source), unit="images") as task:
            for i in range(len(source)):
                truth = source.map(i)
                found.append(overlaps(truth, predict_item(head, stored, i, truth.shape)))
                majority.append(overlaps(truth, np.full_like(truth, int(head.constant))))
                task.advance()
        classes = max(int(head.values.max()) + 1, *(len(o[0]) for o in found), *(len(o[0]) for o in majority))
        classes = max(classes, len(source.class_names or ()))
        inside, union, truth_pixels = (np.stack([_padded(o[part], classes) for o in found]) for part in range(3))
        always = np.concatenate([np.stack([_padded(o[part], classes) for o in majority]) for part in range(2)], 1)
        said = {
            "layers": head.layers,
            "protocol": f"linear-{head.layers}",
            "lr": head.training["lr"],
            "steps": head.training["steps"],
        }
        said |= {
            "train_images": head.training["images"],
            "classes": int((truth_pixels.sum(0) > 0).sum()),
            "miou_over": "classes, pixels of all images",
        }
        right = np.stack([inside.sum(1), truth_pixels.sum(1)], 1)
        scores = [
            Score(
                "miou",
                "mean_iou",
                np.concatenate([inside, union], 1),
                {**said, "held_out_miou": head.training["held_out_miou"]},
            ),
            Score("pixel_accuracy", "percent", right, said),
            Score("miou_majority", "mean_iou", always, {"class_name": _name(source, int(head.constant))}, headline=False),
        ]
        for c in np.flatnonzero(union.sum(0)).tolist():
            about = {"class_name": _name(source, c), "class_index": c}
            scores.append(Score("class_iou", "percent", np.stack([inside[:, c], union[:, c]], 1), about, headline=False))
        return scores


def head_problems(layers: int, lrs: list[float], steps: int, batch: int, seed: int) -> list[str]:
    """What is out of range in the settings that dense heads share."""
    found = []
    if layers < 1:
        found.append(f"layers must be at least 1, got {layers}")
    if not lrs or not all(0 < lr < float("inf") for lr in lrs):
        found.append(f"lrs must be one or more numbers above 0, got {lrs}")
    if min(steps, batch) < 1:
        found.append("steps and batch must be at least 1")
    return found + ([f"seed must be at least 0, got {seed}"] if seed < 0 else [])


def apart(sources: dict[str, Any]) -> None:
    """Raises: Unfit: images of `test` are in `train` too."""
    if sentence := overlap(sources["train"], sources["test"]):
        raise Unfit(sentence)


def readable(stored: Stored, cls: bool = False) -> Stored:
    """The same. Raises: Unfit: patches that fill no square, or patches (and with `cls` CLS) that are not finite."""
    stored.grid()
    assert stored.patches is not None
    for features in (stored.patches, stored.cls) if cls else (stored.patches,):
        for layer in features:
            for start in range(0, len(layer), 64):
                if not np.isfinite(layer[start : start + 64]).all():
                    raise Unfit(NOT_FINITE)
    return stored


def overlaps(truth: np.ndarray, said: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two maps [H, W] of class ids -> pixels [C] of each class: intersection, union, truth. Where `truth` is negative, none counts."""
    truth, said = truth[truth >= 0], said[truth >= 0]
    classes = int(max(truth.max(initial=0), said.max(initial=0))) + 1
    inside, true, claimed = (np.bincount(x, minlength=classes) for x in (truth[truth == said], truth, said))
    return inside, true + claimed - inside, true


def _padded(counts: np.ndarray, classes: int) -> np.ndarray:
    return np.pad(counts.astype(np.float64), (0, classes - len(counts)))


def _name(source: MapSource, index: int) -> str:
    names = source.class_names or []
    return names[index] if index < len(names) else str(index)


def _counted(map_HW: np.ndarray, task: Any) -> np.ndarray:
    task.advance()
    return map_HW


def _largest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _miou(said: Tensor, truth: sparse.csr_matrix) -> float:
    """mIoU in percent of one class a patch, over the pixels of its histogram."""
    tokens, outputs = truth.shape
    choice = sparse.csr_matrix((np.ones(tokens, np.float32), (np.arange(tokens), said.numpy())), (tokens, outputs))
    confusion = (truth.T @ choice).toarray()  # [true, said]; dense, the choices would be as large as the logits
    inside, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float(100 * (inside[union > 0] / union[union > 0]).mean()) if union.any() else float("nan")
