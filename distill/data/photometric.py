"""Photometric changes of a batch of crops: colour jitter, greyscale, blur, solarisation, each with its own parameters per crop.

Operating on the batch costs a tenth of doing it image by image. Shape legend: B crops, H W pixels; values 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from distill.data.crops import CropsConfig

GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow and torchvision
KERNEL = 9  # pixels of the blur kernel, as DINOv2


@dataclass(frozen=True)
class Changes:
    """One crop's parameters. `jitter` holds the factors of brightness, contrast and saturation and the hue shift (turns), applied in
    `order`; sigma 0 is no blur.
    """

    jitter: tuple[float, float, float, float] | None
    order: tuple[int, ...]
    grey: bool
    sigma: float
    solarise: bool

    @staticmethod
    def draw(g: np.random.Generator, config: CropsConfig, view: int) -> Changes:
        """Draw for view 0 or 1 (global) or 2 (local). The number of draws is constant, so settings do not shift the stream."""
        u = g.random(9)
        order = tuple(g.permutation(4).tolist())
        factors = [max(0.0, 1 + s * (2 * x - 1)) for s, x in zip(config.jitter[:3], u[:3], strict=True)]
        jitter = (factors[0], factors[1], factors[2], config.jitter[3] * (2 * u[3] - 1)) if u[4] < config.jitter_p else None
        low, high = config.blur_sigma
        sigma = low + (high - low) * u[8] if u[6] < config.blur[view] else 0.0
        return Changes(jitter, order, bool(u[5] < config.grey), sigma, bool(view == 1 and u[7] < config.solarise))


def apply_changes(x_B3HW: Tensor, changes: list[Changes]) -> Tensor:
    """[B, 3, H, W] float 0..1 -> the same shape, changed crop by crop as `changes` say. May write into its input."""
    for position in range(4):
        for op, function in enumerate((_brightness, _contrast, _saturation, _hue)):
            neutral = 0.0 if op == 3 else 1.0
            chosen = [
                (i, c.jitter[op])
                for i, c in enumerate(changes)
                if c.jitter is not None and c.order[position] == op and c.jitter[op] != neutral
            ]
            if chosen:
                rows = torch.tensor([i for i, _ in chosen])
                factor = torch.tensor([f for _, f in chosen], dtype=x_B3HW.dtype).view(-1, 1, 1, 1)
                x_B3HW[rows] = function(x_B3HW[rows], factor)
    if grey := [i for i, c in enumerate(changes) if c.grey]:
        rows = torch.tensor(grey)
        x_B3HW[rows] = _luma(x_B3HW[rows]).expand(-1, 3, -1, -1)
    if blurred := [(i, c.sigma) for i, c in enumerate(changes) if c.sigma > 0]:
        rows = torch.tensor([i for i, _ in blurred])
        x_B3HW[rows] = gaussian_blur(x_B3HW[rows], torch.tensor([s for _, s in blurred], dtype=x_B3HW.dtype))
    if solarised := [i for i, c in enumerate(changes) if c.solarise]:
        rows = torch.tensor(solarised)
        part = x_B3HW[rows]
        x_B3HW[rows] = torch.where(part >= 128 / 255, 1 - part, part)
    return x_B3HW


def _luma(x: Tensor) -> Tensor:
    r, g, b = GREY
    return r * x[:, 0:1] + g * x[:, 1:2] + b * x[:, 2:3]


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(x).mean((1, 2, 3), keepdim=True)
    return (x * factor + mean * (1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor + _luma(x) * (1 - factor)).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` turns at constant value and saturation (HSV)."""
    high, low = x.amax(1), x.amin(1)
    span = (high - low).clamp_min(1e-8)
    r, g, b = x.unbind(1)
    sector = torch.where(high == r, ((g - b) / span) % 6, torch.where(high == g, (b - r) / span + 2, (r - g) / span + 4))
    sector = (sector + 6 * shift[:, 0]) % 6
    chroma = high - low
    # Each channel is value - chroma * max(0, min(k, 4 - k, 1)) with k = (n + sector) mod 6, n = 5, 3, 1 for r, g, b.
    channels = []
    for n in (5, 3, 1):
        k = (n + sector) % 6
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def gaussian_blur(x_B3HW: Tensor, sigma_B: Tensor) -> Tensor:
    """Separable Gaussian blur of KERNEL pixels, one deviation (pixels) a crop, borders reflected."""
    b, c, h, w = x_B3HW.shape
    half = min(KERNEL // 2, h - 1, w - 1)
    t = torch.arange(-half, half + 1, dtype=x_B3HW.dtype)
    kernel = torch.softmax(-(t**2) / (2 * sigma_B[:, None] ** 2), 1).repeat_interleave(c, 0)
    x = F.pad(x_B3HW, (half, half, half, half), mode="reflect").reshape(1, b * c, h + 2 * half, w + 2 * half)
    x = F.conv2d(x, kernel[:, None, :, None], groups=b * c)
    x = F.conv2d(x, kernel[:, None, None, :], groups=b * c)
    return x.reshape(b, c, h, w)
