"""Batches for the training loop. Batch `step` is a pure function of (source, settings, seed, step), so resuming at any step needs no
state, and the number of worker processes changes nothing. Streams are the exception: they are read in order and skipped into place.
"""

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from distill.config import Config
from distill.data.crops import CropsConfig, Views, make_views
from distill.data.encoded import ImageSource
from distill.data.masks import batch_masks
from distill.data.photometric import apply_changes
from distill.data.preprocess import IMAGENET_MEAN, IMAGENET_STD


class MasksConfig(Config):
    """Block masking of the student's global crops.

    Attributes:
        probability: share of the global crops that are masked (exactly that share of every batch).
        ratio: range of the masked share of a masked crop's patches.
        min_block: smallest block in patches.
    """

    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    min_block: int = 4

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.probability <= 1:
            found.append(f"probability must be between 0 and 1, got {self.probability}")
        if not 0 <= self.ratio[0] <= self.ratio[1] <= 1:
            found.append(f"ratio must be two shares 0 <= low <= high <= 1, got {list(self.ratio)}")
        if self.min_block < 1:
            found.append(f"min_block must be at least 1 patch, got {self.min_block}")
        return found


@dataclass(frozen=True)
class Batch:
    """One step's input: `global_crops` [2B, 3, H, W] and `local_crops` [L B, 3, h, w], crop-major, normalised float32;
    `masks` [2B, N] bool (all false without masking).
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in (self.global_crops, self.local_crops, self.masks)))


@dataclass(frozen=True)
class LoaderSettings:
    """What a batch depends on besides the source. `share` is (rank, world): each rank makes its own slice of the global batch."""

    crops: CropsConfig
    masks: MasksConfig | None
    patch: int
    normalize: str
    batch: int
    seed: int
    share: tuple[int, int] = (0, 1)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, 1, epoch)).permutation(n)


def sample_index(seed: int, position: int, n: int) -> int:
    """The image at a position of the run: every epoch is a fresh permutation of all n images."""
    epoch, offset = divmod(position, n)
    return int(_permutation(seed, epoch, n)[offset])


def _collate(images: Iterator[Image.Image], s: LoaderSettings, step: int) -> Batch:
    rank, world = s.share
    mine = range(rank * s.batch // world, (rank + 1) * s.batch // world)
    views = [make_views(im, s.crops, np.random.default_rng((s.seed, 2, step, i))) for i, im in zip(mine, images, strict=True)]
    crops = 2 * len(views)
    grid = (s.crops.global_size // s.patch,) * 2
    masks = torch.zeros(crops, grid[0] * grid[1], dtype=torch.bool)
    if s.masks is not None:
        g = np.random.default_rng((s.seed, 3, step, rank))
        masks = torch.from_numpy(batch_masks(g, crops, grid, s.masks.probability, s.masks.ratio, s.masks.min_block))
    return Batch(_pixels(views, range(2), s.normalize), _pixels(views, range(2, 2 + s.crops.local_count), s.normalize), masks)


def _pixels(views: list[Views], crops: range, normalize: str) -> Tensor:
    """Stack the named crops crop-major, change colours, normalise: [len(crops) B, 3, H, W]."""
    chosen = [(v.pixels[i], v.changes[i]) for i in crops for v in views]
    if not chosen:
        return torch.zeros(0, 3, 1, 1)
    x = torch.from_numpy(np.stack([p for p, _ in chosen])).permute(0, 3, 1, 2).float().div_(255)
    return normalize_batch(apply_changes(x.contiguous(), [c for _, c in chosen]), normalize)


def normalize_batch(x_B3HW: Tensor, kind: str) -> Tensor:
    """`preprocess.normalize` for tensors (a test holds them equal)."""
    if kind == "imagenet":
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (x_B3HW - mean) / std
    if kind == "per_image":
        std, mean = torch.std_mean(x_B3HW, (-2, -1), correction=0, keepdim=True)
        return (x_B3HW - mean) / (std + 1e-3)
    return x_B3HW


class _Steps(Dataset):
    """Map-style: item `step` is the whole batch of that step."""

    def __init__(self, source: Any, settings: LoaderSettings):
        self.source, self.settings = source, settings

    def __getitem__(self, step: int) -> Batch:
        s = self.settings
        rank, world = s.share
        positions = range(step * s.batch + rank * s.batch // world, step * s.batch + (rank + 1) * s.batch // world)
        hint = {"shorter_side": useful_side(s.crops)} if isinstance(self.source, ImageSource) else {}
        return _collate((self.source.image(sample_index(s.seed, p, len(self.source)), **hint) for p in positions), s, step)


class _Stream(IterableDataset):
    """A streaming source from step `start` on, read by one worker; rank r of W takes every W-th position, so nothing is decoded twice."""

    def __init__(self, source: Any, settings: LoaderSettings, start: int, total: int):
        self.source, self.settings, self.start, self.total = source, settings, start, total

    def __iter__(self) -> Iterator[Batch]:
        s = self.settings
        rank, world = s.share
        images = self.source.iterate(s.seed, self.start * s.batch + rank, world)
        for step in range(self.start, self.total):
            yield _collate(islice(images, s.batch // world), s, step)


def batches(source: Any, settings: LoaderSettings, start: int, total: int, workers: int) -> Iterator[Batch]:
    """Batches of steps start..total-1, made `workers` processes ahead (0: in this process)."""
    streams = hasattr(source, "iterate")
    workers = min(workers, 1) if streams else workers
    common: dict[str, Any] = {
        "batch_size": None,
        "num_workers": workers,
        "prefetch_factor": 4 if workers else None,
        "worker_init_fn": _leave_signals_to_the_loop,
    }
    if streams:
        yield from DataLoader(_Stream(source, settings, start, total), **common)
    else:
        yield from DataLoader(_Steps(source, settings), sampler=range(start, total), **common)


def _leave_signals_to_the_loop(worker: int) -> None:
    """A signal to the whole process group must not take the workers from a loop that is about to write its checkpoint; one that waits for
    data for ever must not outlive the loop either.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def useful_side(crops: CropsConfig) -> int:
    """The shorter side in pixels beyond which no crop gains detail: huge JPEGs need not be decoded in full."""
    sides = [crops.global_size / crops.global_scale[0] ** 0.5]
    sides += [crops.local_size / crops.local_scale[0] ** 0.5] if crops.local_count else []
    return math.ceil(max(sides))
