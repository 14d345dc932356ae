"""Foreground without any training: the first principal component of patch tokens, thresholded (DINOv2, figure 1 and section 7.5).

Shape legend: n images, N tokens an image on a g x g grid, D width, H W pixels.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from distill.config import Config
from distill.data.maps import MapsConfig, MapSource
from distill.evaluate.scores import Score
from distill.evaluate.segmentation import readable
from distill.evaluate.task import Reader
from distill.progress import Progress

SLICE = 64  # images made float32 at once
BINS = 256  # of Otsu's histogram

Threshold = Literal["zero", "otsu"]


def pca_foreground(patches: np.ndarray, threshold: Threshold = "zero") -> np.ndarray:
    """[n, N, D] on square grids -> [n, N] float32, above 0 where a patch is foreground.

    The first principal component of all tokens of all images together, centred, less the threshold: 0, as in the paper's figure, or Otsu's
    (1979), which parts the values into two groups of least variance. A component leaves its sign open: it is chosen so that the patches at
    the images' borders are background.
    """
    n, per_image, width = patches.shape
    grid = round(per_image**0.5)
    assert grid * grid == per_image, f"{per_image} tokens fill no square grid"
    slices = range(0, n, SLICE)
    mean = sum(_flat(patches, s).sum(0, dtype=np.float64) for s in slices) / (n * per_image)
    covariance = np.zeros((width, width))
    for s in slices:
        x = (_flat(patches, s) - mean).astype(np.float32)
        covariance += x.T @ x
    direction = np.linalg.eigh(covariance)[1][:, -1]
    scores = np.concatenate([(_flat(patches, s) - mean) @ direction for s in slices]).reshape(n, grid, grid)
    border = np.ones((grid, grid), bool)
    border[1:-1, 1:-1] = False
    if grid > 2 and scores[:, border].mean() > scores[:, ~border].mean():
        scores = -scores
    cut = otsu(scores) if threshold == "otsu" else 0.0
    return (scores - cut).reshape(n, per_image).astype(np.float32)


def otsu(values: np.ndarray) -> float:
    """The threshold that parts numbers into two groups with the largest variance between them (Otsu 1979), to 1/256 of their range."""
    counts, edges = np.histogram(values, BINS)
    middle = (edges[:-1] + edges[1:]) / 2
    below, above = counts.cumsum(), counts[::-1].cumsum()[::-1]
    sums = (counts * middle).cumsum()
    low, high = below[:-1], above[1:]  # never empty: the first and last bins hold the extremes
    between = low * high * (sums[:-1] / low - (sums[-1] - sums[:-1]) / high) ** 2
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float(edges[1:-1][best].mean())  # the middle of an empty gap between the groups


def _flat(patches: np.ndarray, start: int) -> np.ndarray:
    return patches[start : start + SLICE].reshape(-1, patches.shape[2]).astype(np.float32)


class ForegroundTask(Config):
    """Attributes:
    test: images with maps of class ids.
    foreground: the ids that are foreground; all others that count are background.
    threshold: of the component, see `pca_foreground`.
    """

    kind: Literal["foreground"] = "foreground"
    test: MapsConfig
    foreground: list[int]
    threshold: Threshold = "zero"

    def problems(self) -> list[str]:
        """Of the task itself: what is wrong in `test`, its own `problems` say."""
        found = []
        if not self.foreground or min(self.foreground) < 0:
            found.append(f"foreground must be one or more class ids of at least 0, got {self.foreground}")
        if getattr(self.test, "scale", None) is not None or getattr(self.test, "map", None) == "depth":
            found.append("test is a depth map, foreground needs class ids")
        return found

    def sources(self) -> dict[str, Any]:
        return {"test": self.test}

    def metrics(self) -> tuple[str, ...]:
        return ("foreground_iou",)

    def judge(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> list[Score]:
        """IoU over the pixels of all images; beside it that of calling every pixel foreground."""
        source: MapSource = sources["test"]
        stored = readable(reader.read(source, patches=True, fit="squash"))
        assert stored.patches is not None
        scores = torch.from_numpy(pca_foreground(stored.patches[-1], self.threshold))
        grid = stored.grid()
        found, everything = [], []
        with progress.task(f"foreground of {source.name}", len(source), unit="images") as task:
            for i in range(len(source)):
                truth = source.map(i)
                up = F.interpolate(scores[i].view(1, 1, grid, grid), size=truth.shape, mode="bilinear", align_corners=False)
                wanted, said = np.isin(truth, self.foreground), up[0, 0].numpy() > 0
                counts = truth >= 0
                found.append(((wanted & said & counts).sum(), ((wanted | said) & counts).sum()))
                everything.append(((wanted & counts).sum(), counts.sum()))
                task.advance()
        about = {"threshold": self.threshold, "foreground": ", ".join(map(str, self.foreground))}
        return [
            Score("foreground_iou", "percent", np.array(found, np.float64), about),
            Score("foreground_iou_everything", "percent", np.array(everything, np.float64), headline=False),
        ]
