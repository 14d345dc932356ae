"""Frozen features of a data set. Images are preprocessed once, in threads ahead of the encoder, and reused by every encoder.

Shape legend: n images of a set, B batch, D width, S side of the preprocessed image in pixels.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from torch import Tensor

from distill.data.preprocess import Preprocess
from distill.data.sources import Source
from distill.encoder import Encoder, Features
from distill.errors import EnvironmentFailed
from distill.progress import Progress

CACHE_BYTES = 2**30  # preprocessed images of one set kept in memory, as uint8 before normalisation; larger sets are read again
FEATURE_SHARE = 0.15  # of the free memory, for the features of one set and encoder; the linear probe holds several copies
WORKERS = max(1, min(4, os.cpu_count() or 1))


class Images:
    """A source seen through one Preprocess: n images [3, S, S] float32, equal to the last bit to `preprocess(source.image(i))`.

    The first pass decodes and resizes; what it makes is kept (uint8, n S S 3 bytes) when that stays within `limit` bytes.

    Attributes:
        labels: int64 [n], or None. name, fingerprint: of the source.
    """

    def __init__(self, source: Source, preprocess: Preprocess, limit: int = CACHE_BYTES, workers: int = WORKERS):
        self.source, self.preprocess, self.workers = source, preprocess, workers
        self.labels, self.name, self.fingerprint = source.labels(), source.name, source.fingerprint()
        shape = (len(source), preprocess.size, preprocess.size, 3)
        self._pixels = np.empty(shape, np.uint8) if int(np.prod(shape)) <= limit else None
        self._known = np.zeros(len(source), bool)

    def __len__(self) -> int:
        return len(self._known)

    def batches(self, batch: int, start: int = 0) -> Iterator[Tensor]:
        """[B, 3, S, S] float32 tensors in order from image `start`, the last one shorter. Threads work a few batches ahead."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="images")
        ahead: deque[Future[Tensor]] = deque()
        try:
            for first in range(start, len(self), batch):
                ahead.append(pool.submit(self._batch, first, min(first + batch, len(self))))
                if len(ahead) > self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _batch(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.stack([self._image(i) for i in range(start, stop)]))

    def _image(self, i: int) -> np.ndarray:
        if self._pixels is None:
            return self.preprocess(self.source.image(i))
        if not self._known[i]:
            unit = replace(self.preprocess, normalize="none")(self.source.image(i))
            self._pixels[i] = np.rint(unit * 255.0).astype(np.uint8).transpose(1, 2, 0)
            self._known[i] = True
        # The same memory order as in Preprocess: means over an image are sums whose rounding depends on it.
        pixels = self._pixels[i].astype(np.float32).transpose(2, 0, 1) / 255.0
        return np.ascontiguousarray(self.preprocess.normalized(pixels))


class TooLarge(EnvironmentFailed):
    """The features of one set would not fit in memory."""


@dataclass(frozen=True)
class FeatureSet:
    """Features in memory: `cls` [n, D] and `mean_patch` [n, D'] float32, `labels` int64 [n] or None, `name` and `fingerprint` of it."""

    cls: Tensor
    mean_patch: Tensor
    labels: Tensor | None
    name: str
    fingerprint: str

    def at(self, index: Tensor) -> Features:
        """Some of the images, as Features whose only patch is the mean patch: what `probe_features` expects."""
        return Features(self.cls[index], self.mean_patch[index][:, None])


def extract(encoder: Encoder, images: Images, batch: int, progress: Progress, title: str = "features") -> FeatureSet:
    """Run an encoder over all images and keep the features in memory; those that are worth keeping go to a `store.FeatureStore`.

    Raises:
        TooLarge: raw pixels of large images, usually.
    """
    cls, mean_patch, done = torch.empty(0), torch.empty(0), 0
    with progress.task(title, len(images), unit="images") as task:
        for x in images.batches(batch):
            features = encoder(x)
            parts = features.cls, features.patches.mean(1)
            if done == 0:
                cls, mean_patch = (_room(p, len(images), title) for p in parts)
            cls[done : done + len(x)], mean_patch[done : done + len(x)] = parts
            done += len(x)
            task.advance(len(x))
    return FeatureSet(cls, mean_patch, labels_of(images), images.name, images.fingerprint)


def _room(part: Tensor, n: int, title: str) -> Tensor:
    check_memory(n, part.shape[1], title)
    return torch.empty(n, part.shape[1])


def check_memory(n: int, width: int, title: str) -> None:
    """Raises TooLarge where n features of `width` numbers leave too little memory to work with them."""
    size, free = 4 * n * width, psutil.virtual_memory().available
    if size > FEATURE_SHARE * free:
        raise TooLarge(
            f"{title}: {n} features of {width} numbers take {size / 2**30:.1f} GiB, too much to work with in "
            f"{free / 2**30:.1f} GiB of free memory. Evaluate on fewer images or at a lower resolution."
        )


def labels_of(images: Images) -> Tensor | None:
    return None if images.labels is None else torch.from_numpy(np.asarray(images.labels, np.int64).copy())
