"""One subject's features, as evaluations read them: from the store, and from its encoder only where something must be computed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.data.preprocess import Preprocess
from distill.data.sources import Source
from distill.encoder import Encoder
from distill.evaluate.features import Images
from distill.evaluate.store import FeatureStore, Wish, depth_of, identity
from distill.evaluate.task import Fit, Stored
from distill.progress import Progress


@dataclass(frozen=True)
class Subject:
    """Something to evaluate.

    Attributes:
        subject, target: how its rows are labelled, e.g. `students/small`, `onnx-int8`.
        open: makes the encoder; called where features must be computed, at most once for each evaluation; the encoder is dropped
            afterwards.
        preprocess: how its images are made; subjects that share one share the preprocessed images.
        weights: hash of what is measured (model weights or artifact file): names its stored features. None keeps nothing.
    """

    subject: str
    target: str
    open: Callable[[], Encoder]
    preprocess: Preprocess
    weights: str | None = None


class ImageSets:
    """Images by source and preprocessing, so that subjects that share both share the decoded images."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, Preprocess], Images] = {}

    def __call__(self, source: Source, preprocess: Preprocess) -> Images:
        key = source.fingerprint(), preprocess
        if key not in self._made:
            self._made[key] = Images(source, preprocess)
        return self._made[key]


class SubjectReader:
    """The `task.Reader` of a subject. Close it, or use it as a context: features of a subject without weights are kept until then.

    Attributes:
        resolution: side of its input in pixels.
        conditions: what rows must say about the encoder whose features were read: runtime, precision, threads, ...
    """

    def __init__(self, subject: Subject, store: FeatureStore, images: ImageSets, batch: int, progress: Progress):
        self.subject, self.images, self.batch, self.progress = subject, images, batch, progress
        self.resolution = subject.preprocess.size
        self.conditions: dict[str, Any] = {}
        self._temporary = store.temporary() if subject.weights is None else None
        self.store = store if self._temporary is None else FeatureStore(Path(self._temporary.name))
        self._encoder: Encoder | None = None

    def __enter__(self) -> "SubjectReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._encoder = None
        if self._temporary is not None:
            self._temporary.cleanup()

    @cached_property
    def depth(self) -> int:
        """How many layers from the end can be read. Opens the encoder where no features of it are stored."""
        known = self.store.depth(self._weights)
        return depth_of(self._open()) if known is None else known

    def read(self, source: Source, *, patches: bool = False, layers: int = 1, fit: Fit = "crop") -> Stored:
        """Features of every image of a source; see `task.Reader`."""
        images = self.images(source, replace(self.subject.preprocess, fit=fit))
        kept = self.store.features(
            identity(self._weights, self.subject.target, images, self.batch),
            Wish(layers, layers if patches else 0),
            images,
            self._open,
            self.progress,
            f"{self.subject.subject} on {self.subject.target}, {images.name}",
        )
        self.conditions |= kept.encoder["conditions"]
        return kept.stored

    @property
    def _weights(self) -> str:
        return self.subject.weights or "none"

    def _open(self) -> Encoder:
        if self._encoder is None:
            encoder = self.subject.open()
            assert encoder.target == self.subject.target, f"{encoder.target} measured as {self.subject.target}"
            self._encoder = encoder
        return self._encoder
