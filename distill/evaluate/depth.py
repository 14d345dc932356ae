"""Monocular depth by a linear head on frozen patch tokens (DINOv2, section 7.4, "lin. 1" and "lin. 4"): classification over bins of depth.

As there: CLS is put beside every patch token, one linear layer scores 256 uniform bins of depth, the prediction is their mean weighted by
probability, upsampled bilinearly; metrics are of each image's valid pixels, then the mean over images. Not as there: the loss is the
cross-entropy of the histogram of bins under each patch, with softmax (see dense_fit.py), where DINOv2 divides by the sum of ReLUs and takes
the scale-invariant logarithmic error; logits vary smoothly over the bins (32 cosines: the same error as free ones in a quarter of the
time); "lin. 4" takes the last four blocks, not four spread over the depth; no augmentation, flip or crop.

Shape legend: n images, N tokens, K bins.
"""

from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from distill.config import Config
from distill.data.maps import MapsConfig, MapSource, SceneMapsConfig
from distill.evaluate.dense_fit import FitSettings, Tokens, cosines, fit, histograms
from distill.evaluate.linear_head import Head, predict_item
from distill.evaluate.scores import Score
from distill.evaluate.segmentation import apart, head_problems, readable
from distill.evaluate.task import Reader, Unfit
from distill.progress import Progress

SMOOTH = 32  # cosines over the bins that logits are made of


class DepthTask(Config):
    """Attributes:
    train, test: images with maps of depth in metres.
    min_depth, max_depth: metres; pixels outside do not count, and the bins lie between.
    bins: of depth, equally wide.
    layers: the tokens of the last so many blocks are the head's input, 1 or 4. Exported files give the last alone.
    cls: put CLS beside every token, where it is as wide as they are (raw pixels have none that is). Few training images are
        told apart by it, and learned by heart.
    lrs, steps, batch: of the head, see dense_fit.FitSettings; batch counts tokens.
    seed: of the held-out images and the order of the tokens.
    """

    kind: Literal["depth"] = "depth"
    train: MapsConfig
    test: MapsConfig
    min_depth: float = 0.001
    max_depth: float = 10.0
    bins: int = 256
    layers: int = 1
    cls: bool = True
    lrs: list[float] = Field(default_factory=lambda: [10.0, 30.0, 100.0, 300.0])
    steps: int = 600
    batch: int = 512
    seed: int = 0

    def problems(self) -> list[str]:
        """Of the task itself: what is wrong in `train` and `test`, their own `problems` say."""
        found = head_problems(self.layers, self.lrs, self.steps, self.batch, self.seed)
        if not 0 < self.min_depth < self.max_depth < float("inf"):
            found.append(f"min_depth must be above 0 and below max_depth, got {self.min_depth} and {self.max_depth}")
        if self.bins < 2:
            found.append(f"bins must be at least 2, got {self.bins}")
        for role, maps in (("train", self.train), ("test", self.test)):
            if maps.map != "depth" if isinstance(maps, SceneMapsConfig) else maps.scale is None:
                key = "map: depth" if isinstance(maps, SceneMapsConfig) else "a scale (metres of one unit of its maps)"
                found.append(f"{role} needs {key}")
        return found

    def sources(self) -> dict[str, Any]:
        return {"train": self.train, "test": self.test}

    def metrics(self) -> tuple[str, ...]:
        return "rmse_m", "abs_rel", "delta1"

    def judge(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> list[Score]:
        return self.scores(self.fit(reader, sources, progress), reader, sources, progress)

    def fit(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> Head:
        """A head trained on `sources["train"]`. Raises: Unfit, with the sentence why."""
        source: MapSource = sources["train"]
        apart(sources)
        stored = reader.read(source, patches=True, layers=self.layers, fit="squash")
        assert stored.patches is not None
        with progress.task(f"depths of {source.name}", len(source), unit="images") as task:
            shares = histograms((self._binned(source.map(i), task) for i in range(len(source))), stored.grid())
        # Bins beyond the deepest that occurs would only be learned to be empty.
        width = (self.max_depth - self.min_depth) / self.bins
        values = torch.from_numpy((self.min_depth + (np.arange(shares.shape[1]) + 0.5) * width).astype(np.float32))
        cls = self.cls and stored.cls.shape[2] == stored.patches.shape[3]
        settings = FitSettings(tuple(self.lrs), self.steps, self.batch, self.seed)
        tokens = Tokens(stored, cls)

        def mean(logits: Tensor) -> Tensor:
            return logits.softmax(-1) @ values

        def minus_rmse(said: Tensor, truth: sparse.csr_matrix) -> float:
            return -_rmse(said.numpy(), truth, values.numpy(), tokens.per_image)

        mass = np.asarray(shares.sum(0)).ravel()
        found = fit(tokens, shares, settings, mean, minus_rmse, cosines(SMOOTH, shares.shape[1]))
        return Head(
            "depth",
            found.weight.T.contiguous().numpy(),
            found.bias.numpy(),
            found.shift.numpy(),
            found.scale.numpy(),
            values.numpy(),
            self.layers,
            cls,
            [],
            float(mass @ values.numpy() / mass.sum()),
            {
                **asdict(settings),
                "lrs": list(self.lrs),
                "lr": found.lr,
                "held_out_rmse_m": -found.held_out,
                "images": len(source),
            },
        )

    def scores(self, head: Head, reader: Reader, sources: dict[str, Any], progress: Progress) -> list[Score]:
        """A head judged on `sources["test"]`."""
        assert head.constant is not None, "heads of patches have one"
        source: MapSource = sources["test"]
        stored = readable(reader.read(source, patches=True, layers=head.layers, fit="squash"), cls=head.cls)
        errors, constant, there = [], [], np.zeros(len(source))
        with progress.task(f"depth of {source.name}", len(source), unit="images") as task:
            for i in range(len(source)):
                metres = source.map(i)
                valid = self._valid(metres)
                there[i] = valid.any()
                errors.append(depth_errors(metres[valid], predict_item(head, stored, i, metres.shape)[valid]))
                constant.append(depth_errors(metres[valid], np.full(int(valid.sum()), head.constant))[0])
                task.advance()
        said = {"layers": head.layers, "cls": head.cls, "protocol": f"linear-{head.layers}, {self.bins} bins"}
        said |= {"lr": head.training["lr"], "steps": head.training["steps"], "train_images": head.training["images"]}
        said |= {"min_depth": self.min_depth, "max_depth": self.max_depth, "mean_over": "images"}
        rmse, rel, delta = np.array(errors, np.float64).T
        if lost := int((there > np.isfinite(rmse)).sum()):
            raise Unfit(f"The head's depths of {lost} test images hold NaN or infinity: the features are too large for it.")
        held = {"held_out_rmse_m": head.training["held_out_rmse_m"]}
        return [
            Score("rmse_m", "share", _each(rmse, there), {**said, **held}),
            Score("abs_rel", "share", _each(rel, there), said),
            Score("delta1", "percent", _each(delta, there), said),
            Score("rmse_m_constant", "share", _each(np.array(constant), there), {"constant_m": head.constant}, headline=False),
        ]

    def _binned(self, metres: np.ndarray, task: Any) -> np.ndarray:
        """[H, W] metres -> int64 bins, -1 where a pixel does not count."""
        task.advance()
        at = (metres - self.min_depth) * (self.bins / (self.max_depth - self.min_depth))
        return np.where(self._valid(metres), at.clip(0, self.bins - 1), -1).astype(np.int64)

    def _valid(self, metres: np.ndarray) -> np.ndarray:
        return (metres >= self.min_depth) & (metres <= self.max_depth)


def depth_errors(truth: np.ndarray, said: np.ndarray) -> tuple[float, float, float]:
    """Metres of the valid pixels of one image, two times [P] -> root mean squared error (m), mean |error| / truth, share with a ratio below
    1.25 (Eigen et al. 2014). NaN for an image without a valid pixel."""
    if not len(truth):
        return np.nan, np.nan, np.nan
    truth, said = truth.astype(np.float64), said.astype(np.float64)
    error = said - truth
    ratio = np.maximum(said / truth, truth / said)
    return float(np.sqrt((error**2).mean())), float((abs(error) / truth).mean()), float((ratio < 1.25).mean())


def _each(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """[n, 2]: a value and a one for each image that has one."""
    return np.stack([np.where(there > 0, values, 0.0), there], 1)


def _rmse(said: np.ndarray, truth: sparse.csr_matrix, values: np.ndarray, per_image: int) -> float:
    """Mean over images of the RMSE in metres of one depth a patch, over the pixels of its histogram."""
    share, first, second = (np.asarray(truth @ v, np.float64) for v in (np.ones_like(values), values, values**2))
    squares = (second - 2 * said * first + said**2 * share).reshape(-1, per_image).sum(1)
    count = share.reshape(-1, per_image).sum(1)
    return float(np.sqrt(squares[count > 0].clip(min=0) / count[count > 0]).mean()) if (count > 0).any() else float("nan")
