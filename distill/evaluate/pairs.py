"""What every subject said about every test image, kept so that any two can be compared later on the same images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import UserError
from distill.evaluate.intervals import agreement, paired
from distill.files import replacing
from distill.rows import Row, not_measured

METRICS = ("knn_top1", "linear_top1")
FEW = 30  # below this many test images a row says so
SHARED = ("data", "data_fingerprint", "gallery", "gallery_fingerprint", "gallery_size", "classes", "resolution")


@dataclass
class Predictions:
    """Predicted labels of n test images by subject, target, resolution and metric.

    Attributes:
        index: int64 [n], which images of the test set. labels: int64 [n], the truth.
        said: key -> int64 [n]; -1 where the features were not finite. Keys: `students/small/onnx-int8@48/knn_top1`.
        about: key -> subject, target, metric, resolution and the data's conditions.
    """

    index: Tensor
    labels: Tensor
    said: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, subject: str, target: str, metric: str, predicted: Tensor, conditions: dict[str, Any]) -> None:
        assert predicted.shape == self.labels.shape
        key = f"{subject}/{target}@{conditions['resolution']}/{metric}"
        self.said[key] = predicted.to(torch.int64)
        shared = {name: conditions[name] for name in SHARED if name in conditions}
        self.about[key] = {"subject": subject, "target": target, "metric": metric, **shared}

    def find(self, name: str, metric: str) -> dict[int, str]:
        """Keys of `subject/target` by resolution."""
        return {
            a["resolution"]: key
            for key, a in self.about.items()
            if a["metric"] == metric and f"{a['subject']}/{a['target']}" == name
        }

    def save(self, path: Path) -> None:
        tensors = {"index": self.index, "labels": self.labels, **{f"said/{key}": v for key, v in self.said.items()}}
        with replacing(path) as part:
            save_file(
                {k: v.contiguous() for k, v in tensors.items()},
                part,
                metadata={"about": json.dumps(self.about, sort_keys=True)},
            )

    @staticmethod
    def load(path: Path) -> "Predictions":
        """Raises UserError where the file is absent or damaged."""
        try:
            with safe_open(path, "pt") as f:
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
                about = json.loads((f.metadata() or {})["about"])
            said = {k.removeprefix("said/"): v for k, v in tensors.items() if k.startswith("said/")}
            return Predictions(tensors["index"], tensors["labels"], said, about)
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as e:
            raise UserError(f"{path} holds no predictions ({e}). Run the evaluation that writes it again.") from e


def paired_rows(predictions: Predictions, pairs: Sequence[tuple[str, str]], metrics: Sequence[str] = METRICS) -> list[Row]:
    """Rows `knn_top1_difference`, `linear_top1_difference`: first minus second, percent points with a paired 95 % interval.

    Pairs of `subject/target`, e.g. ("students/small/torch-fp32", "control/small/torch-fp32"). Each is compared at every
    resolution that both were evaluated at; where there is none but each has one, at those (the images are the same, as for a teacher that
    sees them larger); else the row says that there is none.
    """
    rows = []
    for first, second in pairs:
        for metric in metrics:
            a, b = predictions.find(first, metric), predictions.find(second, metric)
            rows += [_difference(predictions, a[size], b[size], second, metric) for size in a if size in b]
            if not a.keys() & b.keys() and len(a) == len(b) == 1:
                (mine,), (theirs,) = a.items(), b.items()
                row = _difference(predictions, mine[1], theirs[1], second, metric)
                rows.append(row.model_copy(update={"conditions": row.conditions | {"versus_resolution": theirs[0]}}))
            elif not a.keys() & b.keys():
                rows.append(_no_difference(first, second, metric, a, b))
    return rows


def _difference(predictions: Predictions, a: str, b: str, second: str, metric: str) -> Row:
    said_a, said_b, about = predictions.said[a], predictions.said[b], predictions.about[a]
    found = paired((said_a == predictions.labels).numpy(), (said_b == predictions.labels).numpy())
    conditions = {
        "versus": second,
        "gained": found.gained,
        "lost": found.lost,
        "mcnemar_p": found.p,
        "agreement_percent": agreement(said_a.numpy(), said_b.numpy()),
        **{name: about[name] for name in SHARED if name in about},
    }
    return Row(
        metric=f"{metric}_difference",
        value=found.difference,
        low=found.low,
        high=found.high,
        n=found.n,
        subject=about["subject"],
        target=about["target"],
        conditions=conditions | ({"few_samples": True} if found.n < FEW else {}),
    )


def _no_difference(first: str, second: str, metric: str, a: dict[int, str], b: dict[int, str]) -> Row:
    if a and b:
        sizes = [" and ".join(f"{size} px" for size in sorted(side)) for side in (a, b)]
        reason = f"{first} was evaluated at {sizes[0]}, {second} at {sizes[1]}: only the same resolution is compared."
    else:
        missing = " and ".join(name for name, keys in ((first, a), (second, b)) if not keys)
        reason = f"{metric} of {missing} was not measured, so there is nothing to subtract."
    subject, target = first.rsplit("/", 1)
    return not_measured(f"{metric}_difference", subject, target, reason, versus=second)
