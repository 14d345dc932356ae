"""Stored features and maps in memory, for tests of dense evaluations."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from distill.evaluate.task import Stored


@dataclass
class Maps:
    """A MapSource of given maps; its images are never looked at."""

    name: str
    maps: list[np.ndarray]
    class_names: list[str] | None = None
    classes: list[str] | None = None

    def __len__(self) -> int:
        return len(self.maps)

    def image(self, index: int) -> Image.Image:
        raise AssertionError("features are stored")

    def labels(self) -> None:
        return None

    def fingerprint(self) -> str:
        return self.name

    def map(self, index: int) -> np.ndarray:
        return self.maps[index]


@dataclass
class Memory:
    """A Reader of given features: name of a source -> (cls [L, n, D], patches [L, n, N, D])."""

    features: dict[str, tuple[np.ndarray, np.ndarray]]
    resolution: int = 224
    depth: int = 4
    asked: list[str] = field(default_factory=list)

    def read(self, source, *, patches=False, layers=1, fit="crop") -> Stored:
        self.asked.append(fit)
        assert patches
        cls, tokens = self.features[source.name]
        return Stored(cls[-layers:], tokens[-layers:].mean(2, dtype=np.float32), tokens[-layers:])


def tokens_of(values: np.ndarray, rng: np.random.Generator, width: int = 12, noise: float = 0.05) -> np.ndarray:
    """[n, N, V] numbers -> [1, n, N, width] float16 that hold them in a fixed random linear map, far off zero, with noise."""
    mix = np.random.default_rng(99).normal(size=(values.shape[-1], width))
    return (values @ mix + 3 + rng.normal(0, noise, (*values.shape[:2], width)))[None].astype(np.float16)


def enlarged(patches: np.ndarray, times: int) -> np.ndarray:
    """[g, g] -> [g times, g times], each number a square."""
    return np.kron(patches, np.ones((times, times), patches.dtype))
