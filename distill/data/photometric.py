"""Photometric changes of crops: colour jitter, greyscale, blur, solarisation, each with its own parameters per crop, on any device.

Changes are made in place, in parts that stay in a CPU's cache: fresh memory costs more than the arithmetic. Shape legend: B crops, H W
pixels; values 0..1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from distill.data.crops import CropsConfig

GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow and torchvision
KERNEL = 9  # pixels of the blur kernel, as DINOv2
NEUTRAL = (1.0, 1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Changes:
    """Parameters of B crops. `jitter` [B, 4] float32 holds the factors of brightness, contrast and saturation and the hue shift (turns),
    NEUTRAL where a crop has none; `order` [B, 4] is the order in which they are applied; `grey` and `solarise` [B] bool; `sigma` [B]
    float32 is the blur's deviation in pixels, 0 for none.
    """

    jitter: np.ndarray
    order: np.ndarray
    grey: np.ndarray
    sigma: np.ndarray
    solarise: np.ndarray

    DRAWS: ClassVar[int] = (
        13  # uniform numbers that a crop takes: the same for all settings, so that these do not shift the stream
    )

    @staticmethod
    def draw(u: np.ndarray, config: CropsConfig, view: int) -> Changes:
        """From u [B, DRAWS] uniform numbers, for view 0 or 1 (global) or 2 (local)."""
        strength = np.array(config.jitter)
        factors = strength * (2 * u[:, :4] - 1) + NEUTRAL
        factors[:, :3] = np.maximum(factors[:, :3], 0)
        jitter = np.where(u[:, 4:5] < config.jitter_p, factors, NEUTRAL)
        low, high = config.blur_sigma
        sigma = np.where(u[:, 6] < config.blur[view], low + (high - low) * u[:, 8], 0)
        solarise = u[:, 7] < (config.solarise if view == 1 else 0)
        order = u[:, 9:13].argsort(1)
        return Changes(jitter.astype(np.float32), order, u[:, 5] < config.grey, sigma.astype(np.float32), solarise)

    def __len__(self) -> int:
        return len(self.grey)

    def __getitem__(self, rows: slice | int) -> Changes:
        rows = rows if isinstance(rows, slice) else slice(rows, rows + 1)
        return Changes(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __add__(self, other: Changes) -> Changes:
        return Changes(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


def apply_changes(x_B3HW: Tensor, changes: Changes) -> Tensor:
    """Change [B, 3, H, W] float 0..1 crop by crop as `changes` say; writes into its input and returns it."""
    for position in range(4):
        for op, function in enumerate((_brightness, _contrast, _saturation, _hue)):
            chosen = (changes.order[:, position] == op) & (changes.jitter[:, op] != NEUTRAL[op])
            _on(x_B3HW, chosen, function, changes.jitter[:, op])
    _on(x_B3HW, changes.grey, _grey)
    _on(x_B3HW, changes.sigma > 0, _blur, changes.sigma)
    _on(x_B3HW, changes.solarise, _solarise)
    return x_B3HW


def _on(x: Tensor, chosen: np.ndarray, change: Callable[..., None], parameter: np.ndarray | None = None) -> None:
    """Apply an in-place `change` to the chosen crops with their parameters [n, 1, 1, 1]."""
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return
    # Not waiting for the device: these few bytes are copied aside at once.
    values = [] if parameter is None else [_sent(parameter[rows], x).view(-1, 1, 1, 1)]
    if rows[-1] - rows[0] + 1 == len(rows):
        change(x[rows[0] : rows[-1] + 1], *values)
    else:
        index = _sent(rows, x)
        part = x[index]
        change(part, *values)
        x[index] = part


def _sent(values: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(values).to(x.device, non_blocking=True)


def _luma(x: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]."""
    r, g, b = GREY
    return (x[:, 0:1] * r).add_(x[:, 1:2], alpha=g).add_(x[:, 2:3], alpha=b)


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    mean = _luma(x.mean((2, 3), keepdim=True))
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    luma = _luma(x).mul_(1 - factor)
    x.mul_(factor).add_(luma).clamp_(0, 1)


def _grey(x: Tensor) -> None:
    x.copy_(_luma(x).expand_as(x))


def _solarise(x: Tensor) -> None:
    # Not `where`: comparisons that give bool run at a fifth of the speed.
    bright = torch.ge(x, 128 / 255, out=torch.empty_like(x))
    x.sub_(bright).abs_()  # 1 - x where bright


def _hue(x: Tensor, shift: Tensor) -> None:
    """Turn the hue by `shift` turns at constant value and saturation (HSV)."""
    r, g, b = x.unbind(1)
    high, low = torch.maximum(r, g), torch.minimum(r, g)
    torch.maximum(high, b, out=high)
    chroma = torch.sub(high, torch.minimum(low, b, out=low))
    # Sixths of a turn are (g-b)/chroma where r is highest, 2 + (b-r)/chroma where g is, 4 + (r-g)/chroma where b is.
    is_r = torch.eq(high, r, out=torch.empty_like(r))  # 0 or 1; see _solarise
    is_g = torch.eq(high, g, out=torch.empty_like(r))
    is_g.addcmul_(is_g, is_r, value=-1)
    hue, other = torch.sub(r, g), torch.sub(g, b)
    other.sub_(hue)
    hue.addcmul_(is_r, other)
    torch.add(b, g, out=other).sub_(r, alpha=2)  # (b - r) - (r - g)
    hue.addcmul_(is_g, other).div_(torch.clamp_min(chroma, 1e-8, out=low).mul_(6))
    hue.add_(is_r, alpha=-4 / 6).add_(is_g, alpha=-2 / 6).add_(shift[:, 0] + 4 / 6)
    # A channel is high - chroma * clamp(2 - d, 0, 1), d sixths of a turn from the hue at which it is lowest.
    base, turns = high.sub_(chroma, alpha=2), is_g
    for channel, lowest in enumerate((3 / 6, 1 / 6, -1 / 6)):
        torch.add(hue, lowest, out=other)
        other.sub_(torch.round(other, out=turns)).abs_().clamp_(1 / 6, 2 / 6)
        torch.addcmul(base, chroma, other, value=6, out=x[:, channel])


def _blur(x: Tensor, sigma: Tensor) -> None:
    x.copy_(gaussian_blur(x, sigma.view(-1)))


def gaussian_blur(x_B3HW: Tensor, sigma_B: Tensor) -> Tensor:
    """Separable Gaussian blur of KERNEL pixels, one deviation (pixels) a crop, borders reflected.

    A sum of shifted copies of the flattened, padded crops: on a CPU half the cost of a convolution by groups.
    """
    b, c, h, w = x_B3HW.shape
    half = min(KERNEL // 2, h - 1, w - 1)
    t = torch.arange(half + 1, dtype=x_B3HW.dtype, device=x_B3HW.device)
    weights = torch.exp(-(t**2) / (2 * sigma_B[:, None] ** 2))
    weights /= weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdim=True)
    row = w + 2 * half  # pixels
    x = F.pad(x_B3HW, (half, half, half, half), mode="reflect").view(b, -1)
    for shift in (row, 1):
        n = x.shape[1] - 2 * half * shift
        near = x[:, half * shift : half * shift + n] * weights[:, :1]
        for i in range(1, half + 1):
            near.addcmul_(x[:, (half - i) * shift :][:, :n], weights[:, i : i + 1])
            near.addcmul_(x[:, (half + i) * shift :][:, :n], weights[:, i : i + 1])
        x = near
    return x.as_strided((b, c, h, w), (x.stride(0), (h + 2 * half) * row, row, 1))
