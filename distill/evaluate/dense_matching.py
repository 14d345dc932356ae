"""Dense matching between two views of an image: does a patch find the place that it came from?

The second view is a known affine map of the first (crop, scale, rotation, mirror) with other colours. Each patch centre of the second has
a true place in the first; its match is the most similar patch there by cosine. PCK at alpha is the share of patches whose match lies within
alpha times the image's side of the truth (Yang & Ramanan 2013); patches that the first view does not show do not count.

A match is the centre of a patch, so a coarse grid misses small distances whatever the features: `pck_at_best` is the share of patches for
which any centre of the first view lies near enough.

Shape legend: n images, N patch tokens on a grid of g x g.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance
from pydantic import Field
from torch.nn import functional as F

from distill.config import Config
from distill.data.sources import Source, SourceConfig
from distill.evaluate.scores import Score
from distill.evaluate.segmentation import readable
from distill.evaluate.task import Reader
from distill.files import sha256_json
from distill.progress import Progress

SMALLEST, TILT, MIRROR = 0.6, 20.0, 0.5  # least scale of the second view, most rotation in degrees, share that is mirrored
GENERATION = 1  # raise when the views change: features of older ones are then not used


@dataclass(frozen=True)
class View:
    """Where the second view lies: its point (u, v) in 0..1 shows the first view's point `matrix @ (u, v, 1)`, also in 0..1."""

    matrix: np.ndarray  # [2, 3]
    brightness: float
    contrast: float
    colour: float

    def of(self, image: Image.Image) -> Image.Image:
        """The second view of an image, as large as it; what lies outside is grey."""
        w, h = image.size
        (a, b, c), (d, e, f) = self.matrix
        # Pillow asks for every pixel of the result where it comes from, in pixels.
        coefficients = (a, b * w / h, c * w, d * h / w, e, f * h)
        out = image.transform(
            image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=(124, 116, 104)
        )
        for enhancer, factor in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.colour),
        ):
            out = enhancer(out).enhance(factor)
        return out


def view_of(index: int, seed: int, aspect: float = 1.0) -> View:
    """The second view of image `index`: a pure function of its arguments. `aspect`: width by height, so that rotation is one."""
    generator = np.random.default_rng([seed, index])
    scale, angle = generator.uniform(SMALLEST, 1.0), np.deg2rad(generator.uniform(-TILT, TILT))
    mirror = -1.0 if generator.uniform() < MIRROR else 1.0
    cos, sin = np.cos(angle), np.sin(angle)
    # Rotation in pixels, written for coordinates that are shares of width and height.
    turn = scale * np.array([[mirror * cos, -sin / aspect], [mirror * sin * aspect, cos]])
    free = (1 - scale) / 2
    centre = 0.5 + generator.uniform(-free, free, 2)
    matrix = np.concatenate([turn, (centre - turn @ [0.5, 0.5])[:, None]], 1)
    return View(matrix, *generator.uniform(0.7, 1.3, 3))


@dataclass(frozen=True)
class SecondViews:
    """A Source that shows the second view of another's images."""

    source: Source
    seed: int

    @property
    def name(self) -> str:
        return f"{self.source.name} seen again"

    @property
    def classes(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.source)

    def labels(self) -> None:
        return None

    def image(self, index: int) -> Image.Image:
        image = self.source.image(index)
        return view_of(index, self.seed, image.width / image.height).of(image)

    def fingerprint(self) -> str:
        what = {"views": GENERATION, "of": self.source.fingerprint(), "seed": self.seed}
        return sha256_json(what | {"range": [SMALLEST, TILT, MIRROR]})[:16]


class MatchingTask(Config):
    """Dense matching on the images of a set; labels are not needed.

    Attributes:
        alphas: the distances that count as found, as shares of the image's side; the largest is the headline.
        seed: of the second views.
    """

    kind: Literal["matching"] = "matching"
    data: str | SourceConfig
    alphas: list[float] = Field(default_factory=lambda: [0.1, 0.05])
    seed: int = 0

    def problems(self) -> list[str]:
        found = []
        if not self.alphas or not all(0 < a < 1 for a in self.alphas) or len(set(self.alphas)) < len(self.alphas):
            found.append(f"alphas must be one or more different numbers between 0 and 1, got {self.alphas}")
        if self.seed < 0:
            found.append(f"seed must be at least 0, got {self.seed}")
        return found

    def sources(self) -> dict[str, Any]:
        return {"data": self.data}

    def metrics(self) -> tuple[str, ...]:
        return ("pck",)

    def judge(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> list[Score]:
        source = sources["data"]
        first = readable(reader.read(source, patches=True, fit="squash"))
        second = readable(reader.read(SecondViews(source, self.seed), patches=True, fit="squash"))
        assert first.patches is not None
        assert second.patches is not None
        places = grid_centres(first.grid())
        stats: dict[tuple[str, float], list[tuple[float, float]]] = {}
        for i in range(len(source)):
            image = source.image(i)
            truth = places @ (matrix := view_of(i, self.seed, image.width / image.height).matrix)[:, :2].T + matrix[:, 2]
            inside = ((truth >= 0) & (truth <= 1)).all(1)
            match = nearest_patches(second.patches[-1, i], first.patches[-1, i])
            distance = np.linalg.norm(places[match] - truth, axis=1)
            anywhere = np.linalg.norm(places[None] - truth[:, None], axis=2)
            for alpha in self.alphas:
                near = (anywhere <= alpha)[inside]
                found = {"pck": (distance <= alpha)[inside], "pck_by_chance": near.mean(1), "pck_at_best": near.any(1)}
                for metric, shares in found.items():
                    stats.setdefault((metric, alpha), []).append((float(shares.sum()), float(len(shares))))
        about = {"grid": first.grid(), "seed": self.seed}
        return [
            Score(metric, "percent", np.array(v), {"alpha": alpha, **about}, metric == "pck" and alpha == max(self.alphas))
            for (metric, alpha), v in stats.items()
        ]


def grid_centres(side: int) -> np.ndarray:
    """[N, 2] centres (x, y) of a grid's cells, row by row, in 0..1."""
    at = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(at, at, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], 1)


def nearest_patches(asking: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """[N, D], [M, D] -> int64 [N], the most similar of `asked` by cosine."""
    a, b = (F.normalize(torch.from_numpy(np.array(x, np.float32)), dim=1) for x in (asking, asked))
    return (a @ b.T).argmax(1).numpy()
