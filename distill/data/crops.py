"""Multi-crop views: where each crop is cut and which photometric changes it gets; both depend only on (seed, position in the run).

Cutting, resizing and flipping happen per image in Pillow (antialiased); colours are changed for a whole batch at once in `photometric.py`.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from distill.config import Config
from distill.data.photometric import Changes


class CropsConfig(Config):
    """The views of an image; defaults are DINOv2's.

    Attributes:
        global_size, local_size: side of the crops in pixels, multiples of the patch.
        local_count: local crops an image; there are always 2 global ones.
        global_scale, local_scale: share of the image's area that a crop covers.
        flip: probability of a horizontal flip.
        jitter: strengths of brightness, contrast, saturation and hue; jitter_p: its probability.
        grey: probability of greyscale.
        blur: probability of Gaussian blur for (global 1, global 2, local). As the DINO paper has it: the public code inverts the
            probability by mistake, so that its first crop is never blurred and its second in 90 % of cases.
        blur_sigma: range of the blur's deviation in pixels.
        solarise: probability for the second global crop.
    """

    global_size: int = 224
    local_size: int = 98
    local_count: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grey: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.2

    def problems(self) -> list[str]:
        found = []
        if min(self.global_size, self.local_size) < 1 or self.local_count < 0:
            found.append("global_size and local_size must be at least 1, local_count at least 0")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                found.append(f"{name} must be two shares 0 < low <= high <= 1, got [{low}, {high}]")
        for name, values in (
            ("flip, jitter_p, grey and solarise", (self.flip, self.jitter_p, self.grey, self.solarise)),
            ("blur", self.blur),
        ):
            if not all(0 <= v <= 1 for v in values):
                found.append(f"{name} are probabilities between 0 and 1, got {list(values)}")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            found.append(f"jitter strengths must be at least 0, hue at most 0.5, got {list(self.jitter)}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            found.append(f"blur_sigma must be 0 < low <= high, got {list(self.blur_sigma)}")
        return found


@dataclass(frozen=True)
class Views:
    """The crops of one image: `pixels` as uint8 [h, w, 3] arrays, globals first, and the photometric `changes` of each."""

    pixels: list[np.ndarray]
    changes: list[Changes]


def random_box(g: np.random.Generator, width: int, height: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) covering `scale` of the area with aspect 3/4..4/3; the centre when ten tries fail."""
    for _ in range(10):
        area = width * height * g.uniform(*scale)
        aspect = math.exp(g.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(g.integers(0, width - w + 1)), int(g.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def make_views(image: Image.Image, config: CropsConfig, g: np.random.Generator) -> Views:
    """RGB image -> 2 global and `local_count` local crops, drawn from the random stream `g`."""
    pixels, changes = [], []
    for i in range(2 + config.local_count):
        size, scale = (config.global_size, config.global_scale) if i < 2 else (config.local_size, config.local_scale)
        box = random_box(g, image.width, image.height, scale)
        crop = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
        pixels.append(crop[:, ::-1] if g.random() < config.flip else crop)
        changes.append(Changes.draw(g, config, min(i, 2)))
    return Views(pixels, changes)
