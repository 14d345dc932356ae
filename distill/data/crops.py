"""Multi-crop views: where each crop is cut and which photometric changes it gets; both depend only on (seed, step, place in the batch).

Cutting, resizing and flipping happen per image on bytes; colours are changed for many crops at once in `photometric.py`.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

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


TRIES = 10  # of a box of random shape, as torchvision
ASPECT = 4 / 3  # of a box at most, and its inverse at least
DRAWS = 4 * TRIES + 1 + Changes.DRAWS  # uniform numbers that a crop takes, whatever becomes of them


def batch_draws(seed: int, step: int, images: range, crops: int) -> np.ndarray:
    """[len(images), crops, DRAWS] uniform numbers: all that is random in the crops of these images (by place in the global batch) of a
    step. A slice of a batch draws what the whole batch would, wherever it begins.
    """
    bits = np.random.PCG64((seed, 2, step))
    bits.advance(images.start * crops * DRAWS)  # one 64-bit word a number
    return np.random.Generator(bits).random((len(images), crops, DRAWS))


def random_boxes(u: np.ndarray, width: int, height: int, scale: np.ndarray) -> np.ndarray:
    """Random boxes [C, 4] (left, top, right, bottom) of `scale` [C, 2] of the area, aspect 3/4..4/3; the centre when no try fits.

    Args:
        u: [C, TRIES, 4] uniform numbers for area, aspect, left and top.
    """
    low, high = scale[:, :1], scale[:, 1:]
    area = width * height * (low + (high - low) * u[..., 0])
    aspect = np.exp(math.log(ASPECT) * (2 * u[..., 1] - 1))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.arange(len(u)), fits.argmax(1)
    w, h, left, top = w[first], h[first], u[..., 2][first], u[..., 3][first]
    left, top = np.floor(left * (width - w + 1)), np.floor(top * (height - h + 1))
    if not fits[first].all():
        none = ~fits[first]
        w[none], h[none] = min(width, max(1, round(height * ASPECT))), min(height, max(1, round(width * ASPECT)))
        left[none], top[none] = (width - w[none]) // 2, (height - h[none]) // 2
    return np.stack([left, top, left + w, top + h], 1).astype(np.int64)


def useful_side(crops: CropsConfig) -> int:
    """The shorter side in pixels beyond which no crop gains detail: not even the narrowest box has then fewer pixels than its crop."""
    sides = [crops.global_size / (crops.global_scale[0] / ASPECT) ** 0.5]
    sides += [crops.local_size / (crops.local_scale[0] / ASPECT) ** 0.5] if crops.local_count else []
    return math.ceil(max(sides))


def make_views(image: Image.Image, config: CropsConfig, draws: np.ndarray) -> list[Tensor]:
    """RGB image -> its 2 global and `local_count` local crops, uint8 [3, h, w] each.

    Torch resizes bytes with vector instructions: as Pillow (bicubic, antialiased; to 2 of 255 levels), in a sixth of the time.

    Args:
        draws: [2 + local_count, DRAWS] uniform numbers (see `batch_draws`).
    """
    if (excess := min(image.size) // useful_side(config)) > 1:
        image = image.reduce(excess)
    pixels = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(1, image.height, image.width, 3)
        .permute(0, 3, 1, 2)
    )
    scale = np.array([config.global_scale] * 2 + [config.local_scale] * config.local_count)
    boxes = random_boxes(draws[:, : 4 * TRIES].reshape(-1, TRIES, 4), image.width, image.height, scale)
    flips = draws[:, 4 * TRIES] < config.flip
    views = []
    for i, ((left, top, right, bottom), flip) in enumerate(zip(boxes.tolist(), flips.tolist(), strict=True)):
        size = config.global_size if i < 2 else config.local_size
        crop = F.interpolate(pixels[:, :, top:bottom, left:right], (size, size), mode="bicubic", antialias=True)[0]
        views.append(crop.flip(2) if flip else crop)
    return views


def view_changes(config: CropsConfig, draws: np.ndarray, view: int) -> Changes:
    """The photometric changes of crops of view 0 or 1 (global) or 2 (local). draws: [C, DRAWS]."""
    return Changes.draw(draws[:, 4 * TRIES + 1 :], config, view)
