"""What an accuracy budget asks for, and whether measurements meet it."""

import math
from typing import Any

from distill.config import Config

Measured = dict[str, Any]
POINTS = {"knn_points": "kNN", "linear_points": "linear probe"}


class BudgetConfig(Config):
    """How much accuracy quantization may cost; at least one of the first three is given.

    Attributes:
        cosine_min: the least cosine, over every CLS and patch vector, to the full-precision artifact on training images.
        knn_points, linear_points: the most percentage points of top-1 accuracy that may be lost; measured inside the labelled
            gallery, never on the test set.
        within_noise: a loss whose paired 95 % interval reaches 0 counts as none.
        images: training images that the cosine is measured on, others than those that calibrate: on half of them the search
            chooses, on the other half its choice has to hold.
        gallery: labelled images, spread over the gallery, that the points are measured on.
        most_kept: the most layers that may stay in floating point; half of them where it is not given.
        evaluations: artifacts built by the search at most (those that find the order come on top, one a layer).
    """

    cosine_min: float | None = None
    knn_points: float | None = None
    linear_points: float | None = None
    within_noise: bool = True
    images: int = 64
    gallery: int = 2000
    most_kept: int | None = None
    evaluations: int = 60

    def problems(self) -> list[str]:
        found = []
        if self.cosine_min is None and self.knn_points is None and self.linear_points is None:
            found.append("cosine_min, knn_points and linear_points are all left out: a budget needs at least one of them")
        if self.cosine_min is not None and not -1 < self.cosine_min < 1:
            found.append(f"cosine_min must be above -1 and below 1, got {self.cosine_min}")
        for name in POINTS:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                found.append(f"{name} must be between 0 and 100 percentage points, got {value}")
        if self.most_kept is not None and self.most_kept < 0:
            found.append(f"most_kept must be at least 0, got {self.most_kept}")
        if self.images < 2:
            found.append(f"images must be at least 2, half to search on and half to confirm on, got {self.images}")
        if self.evaluations < 1:
            found.append(f"evaluations must be at least 1, got {self.evaluations}")
        if self.gallery < 100:
            found.append(f"gallery must be at least 100 images, got {self.gallery}")
        return found

    def asked(self) -> dict[str, float]:
        """The limits that were given, by name."""
        names = ("cosine_min", *POINTS)
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def asks_accuracy(self) -> bool:
        return bool(self.asked().keys() & POINTS.keys())

    def most(self, layers: int) -> int:
        """Layers of so many that may stay in floating point; one at least is quantized."""
        return max(0, min(layers - 1, layers // 2 if self.most_kept is None else self.most_kept))


def met(config: BudgetConfig, measured: Measured) -> bool:
    """Whether every limit holds; what was not measured does not."""
    return all(v <= 0 for v in shortfalls(config, measured))


def shortfalls(config: BudgetConfig, measured: Measured) -> tuple[float, ...]:
    """How far each limit is missed, in its own unit, cosine first; 0 where it holds, infinite where it was not measured."""
    found = []
    for name, limit in config.asked().items():
        value = measured.get(name)
        if value is None or not math.isfinite(value):
            found.append(math.inf)
        elif name == "cosine_min":
            found.append(max(0.0, limit - value))
        else:
            low = measured.get(name.replace("points", "low"))
            noise = config.within_noise and low is not None and low <= 0
            found.append(0.0 if noise else max(0.0, value - limit))
    return tuple(found)
