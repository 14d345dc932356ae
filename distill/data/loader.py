"""Batches for the training loop. Batch `step` is a pure function of (source, settings, seed, step): resuming at any step needs no state,
the number of worker processes changes nothing, and W training processes together make the batch that one makes. Streams are read in
order and skipped into place.

Workers decode and cut; colours are changed and pixels normalised there too when the training runs on a CPU, else on its device, so that
bytes travel and not floats. Shape legend: B images, L local crops an image, N patches, H W pixels.
"""

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from distill.config import Config
from distill.data.crops import CropsConfig, batch_draws, make_views, useful_side, view_changes
from distill.data.encoded import ImageSource
from distill.data.masks import batch_masks
from distill.data.photometric import Changes, apply_changes
from distill.data.preprocess import CONSTANTS, KINDS
from distill.data.streams import StreamingSource

CPU = torch.device("cpu")
CACHED_PIXELS = 2**18  # that a CPU changes at a time: the few crops of one kind of change among them stay in its cache


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
    """One step's input, crop-major (crop v of image b is row v B + b).

    Attributes:
        global_crops: [2B, 3, H, W] float32, normalised for the student.
        local_crops: [L B, 3, h, w], the same.
        masks: [2B, N] bool, all false without masking.
        teacher_crops: [2B, 3, H, W], the global crops normalised for the teacher; None where that is the same.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    teacher_crops: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda t: t.to(device, non_blocking=True))

    def parts(self, n: int) -> list["Batch"]:
        """n micro-batches of B/n images each (sizes differ by one where n does not divide B), views of an image together."""
        images = self.global_crops.shape[0] // 2
        assert 1 <= n <= images, f"{images} images cannot be split into {n} parts"
        edges = [i * images // n for i in range(n + 1)]

        def part(t: Tensor, a: int, b: int) -> Tensor:
            return t if len(t) == 0 else t.view(-1, images, *t.shape[1:])[:, a:b].flatten(0, 1)

        return [self] if n == 1 else [self._each(partial(part, a=a, b=b)) for a, b in pairwise(edges)]

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, **{f.name: function(t) for f in fields(self) if (t := getattr(self, f.name)) is not None})


@dataclass(frozen=True)
class LoaderSettings:
    """What a batch depends on besides the source.

    Attributes:
        patch: side in pixels of the grid on which masks are drawn.
        normalize, teacher_normalize: kinds of `preprocess.normalize` for student and teacher; None: the teacher's is the student's.
        batch: images a step, over all processes.
        share: (rank, world): each rank makes its own slice of the global batch.
        replay: after so many steps the same batches come again, pixel for pixel: for cached targets.
        device: where colours are changed and pixels normalised; a CPU stands for the workers.
    """

    crops: CropsConfig
    masks: MasksConfig | None
    patch: int
    normalize: str
    batch: int
    seed: int
    share: tuple[int, int] = (0, 1)
    teacher_normalize: str | None = None
    replay: int | None = None
    device: torch.device = CPU

    def images(self) -> range:
        """Places in the global batch of this rank's images."""
        rank, world = self.share
        return range(rank * self.batch // world, (rank + 1) * self.batch // world)

    def positions(self, step: int) -> range:
        """The same as positions in the run."""
        mine = self.images()
        return range(step * self.batch + mine.start, step * self.batch + mine.stop)

    def data_step(self, step: int) -> int:
        return step if self.replay is None else step % self.replay


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, 1, epoch)).permutation(n)


def sample_index(seed: int, position: int, n: int) -> int:
    """The image at a position of the run: every epoch is a fresh permutation of all n images."""
    epoch, offset = divmod(position, n)
    return int(_permutation(seed, epoch, n)[offset])


@dataclass(frozen=True)
class CutBatch:
    """A batch whose crops are bytes of the original colours: uint8 [2B, 3, H, W] and [L B, 3, h, w], and the changes due to each."""

    global_crops: Tensor
    local_crops: Tensor
    global_changes: Changes
    local_changes: Changes
    masks: Tensor

    def pin_memory(self) -> "CutBatch":
        """For DataLoader."""
        pinned = (t.pin_memory() for t in (self.global_crops, self.local_crops, self.masks))
        return CutBatch(next(pinned), next(pinned), self.global_changes, self.local_changes, next(pinned))


def cut_batch(images: Iterable[Image.Image], s: LoaderSettings, step: int) -> CutBatch:
    """Cut the crops and draw the masks of this rank's images of a step."""
    mine, count = s.images(), 2 + s.crops.local_count
    b, draws = len(mine), batch_draws(s.seed, step, mine, count)
    sides = s.crops.global_size, s.crops.local_size
    crops = [torch.empty(v, b, 3, side, side, dtype=torch.uint8) for v, side in zip((2, count - 2), sides, strict=True)]
    for i, image in zip(range(b), images, strict=True):
        for view, pixels in enumerate(make_views(image, s.crops, draws[i])):
            crops[view >= 2][view - 2 * (view >= 2), i] = pixels
    by_crop = draws.transpose(1, 0, 2).reshape(count * b, -1)
    first, second, local = (view_changes(s.crops, by_crop[v * b : (v + 1) * b if v < 2 else None], v) for v in range(3))
    grid = (s.crops.global_size // s.patch,) * 2
    masks = torch.zeros(2 * b, grid[0] * grid[1], dtype=torch.bool)
    if s.masks is not None:
        g, m = np.random.default_rng((s.seed, 3, step)), s.masks
        chosen = [view * s.batch + i for view in range(2) for i in mine]
        masks = torch.from_numpy(batch_masks(g, 2 * s.batch, grid, m.probability, m.ratio, m.min_block, chosen))
    return CutBatch(crops[0].flatten(0, 1), crops[1].flatten(0, 1), first + second, local, masks)


def finish_batch(cut: CutBatch, s: LoaderSettings, device: torch.device = CPU) -> Batch:
    """Change the colours and normalise, on `device`."""
    kinds = [s.normalize]
    if s.teacher_normalize not in (None, s.normalize):
        kinds.append(str(s.teacher_normalize))
    global_crops, *teacher = _finished(cut.global_crops, cut.global_changes, kinds, device)
    (local_crops,) = _finished(cut.local_crops, cut.local_changes, kinds[:1], device)
    return Batch(global_crops, local_crops, cut.masks.to(device, non_blocking=True), teacher[0] if teacher else None)


def _finished(crops_B3HW: Tensor, changes: Changes, kinds: list[str], device: torch.device) -> list[Tensor]:
    """uint8 crops -> float32, changed, once for each kind of normalisation."""
    b, _, h, w = crops_B3HW.shape
    crops_B3HW = crops_B3HW.to(device, non_blocking=True)
    done = [torch.empty(crops_B3HW.shape, device=device) for _ in kinds]
    rows = max(1, CACHED_PIXELS // (h * w)) if device.type == "cpu" else max(1, b)
    for start in range(0, b, rows):
        part = slice(start, start + rows)
        x = done[0][part].copy_(crops_B3HW[part]).mul_(1 / 255)
        apply_changes(x, changes[part])
        for kind, out in reversed(list(zip(kinds, done, strict=True))):  # the first lies where x does
            normalize_batch(x, kind, out[part])
    return done


def normalize_batch(x_B3HW: Tensor, kind: str, out: Tensor | None = None) -> Tensor:
    """`preprocess.normalize` for tensors (a test holds them equal). `out` may be the input."""
    out = torch.empty_like(x_B3HW) if out is None else out
    if kind in CONSTANTS:
        mean, std = (torch.tensor(v, device=out.device).view(3, 1, 1) for v in CONSTANTS[kind])
        return torch.sub(x_B3HW, mean, out=out).div_(std)
    if kind == "per_image":
        torch.sub(x_B3HW, x_B3HW.mean((2, 3), keepdim=True), out=out)
        std = torch.linalg.vector_norm(out, dim=(2, 3), keepdim=True) / (out.shape[2] * out.shape[3]) ** 0.5
        return out.div_(std + 1e-3)
    if kind == "none":
        return out.copy_(x_B3HW)
    raise ValueError(f"normalize must be one of {', '.join(KINDS)}, got {kind!r}")


class _Steps(Dataset):
    """Map-style: item `step` is the whole batch of that step."""

    def __init__(self, source: Any, settings: LoaderSettings):
        self.source, self.settings = source, settings

    def __getitem__(self, step: int) -> CutBatch | Batch:
        s, step = self.settings, self.settings.data_step(step)
        indices, hint = (sample_index(s.seed, p, len(self.source)) for p in s.positions(step)), _hint(self.source, s)
        return _made(cut_batch((self.source.image(i, **hint) for i in indices), s, step), s)


class _Stream(IterableDataset):
    """A streaming source from step `start` on, read by one worker; other ranks' images are read, but not decoded."""

    def __init__(self, source: Any, settings: LoaderSettings, start: int, total: int):
        self.source, self.settings, self.start, self.total = source, settings, start, total

    def __iter__(self) -> Iterator[CutBatch | Batch]:
        s, step = self.settings, self.start
        while step < self.total:  # once, or once a replay
            first = s.data_step(step)
            last = min(first + self.total - step, s.replay or self.total)
            positions = (p for i in range(first, last) for p in s.positions(i))
            images = self.source.iterate(s.seed, positions, **_hint(self.source, s))
            for i in range(first, last):
                yield _made(cut_batch(islice(images, len(s.images())), s, i), s)
            step += last - first


def _hint(source: Any, s: LoaderSettings) -> dict[str, int]:
    """What lets a source of encoded images decode large ones smaller."""
    return {"shorter_side": useful_side(s.crops)} if isinstance(source, ImageSource | StreamingSource) else {}


def _made(cut: CutBatch, s: LoaderSettings) -> CutBatch | Batch:
    return finish_batch(cut, s) if s.device.type == "cpu" else cut


def batches(source: Any, settings: LoaderSettings, start: int, total: int, workers: int) -> Iterator[Batch]:
    """Batches of steps start..total-1, on the settings' device, made `workers` processes ahead (0: in this process)."""
    for made in made_batches(source, settings, start, total, workers):
        yield finish_batch(made, settings, settings.device) if isinstance(made, CutBatch) else made


def made_batches(source: Any, settings: LoaderSettings, start: int, total: int, workers: int) -> Iterable[CutBatch | Batch]:
    """The same as the workers send them."""
    streams = hasattr(source, "iterate")
    workers = min(workers, 1) if streams else workers
    common: dict[str, Any] = {
        "batch_size": None,
        "num_workers": workers,
        "prefetch_factor": 2 if workers else None,
        "pin_memory": settings.device.type == "cuda",
        "worker_init_fn": _prepare_worker,
    }
    if streams:
        return DataLoader(_Stream(source, settings, start, total), **common)
    return DataLoader(_Steps(source, settings), sampler=range(start, total), **common)


def _prepare_worker(worker: int) -> None:
    """A signal to the whole process group must not take the workers from a loop that is about to write its checkpoint; one that waits for
    data for ever must not outlive the loop either.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
