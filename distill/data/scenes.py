"""Rendered scenes: a procedural, seeded image set with labels, segmentation masks and depth, made on the spot without any file.

A scene is a faintly textured wall, a little tilted under strong slanting light, with one plain shape floating before it. The label is
the wall's texture (4 patterns x 2 spatial frequencies = 8 classes); phase, colours, contrast, light, tilt, shape and sensor noise are
nuisances drawn independently of it. The set is tailored so that self-supervision learns it in minutes on a CPU where raw pixels do not
solve it; it says nothing about natural images.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from distill.config import Config
from distill.files import sha256_json

PATTERNS = ("vertical", "horizontal", "checker", "diamond")
PERIODS = (8.0, 5.0)  # pixels at 48 px; scaled with the size
CLASSES = tuple(f"{pattern} {name}" for pattern in PATTERNS for name in ("coarse", "fine"))
# Weak texture under strong light: pixels, and what an untrained or briefly trained network makes of them, follow the light, which says
# nothing of the class. Both are seen in every crop of a scene, so self-supervision alone finds the light first and the texture later.
TILT = 0.1  # radians at most; a vertical stripe stays one
CONTRAST = (0.05, 0.15)  # of the texture, as a share of full scale
LIGHT = (0.5, 1.0)  # brightness falls or rises by this share from the middle to the border
GENERATOR = 2  # raise it whenever other pixels come out: it is part of the fingerprint, and a test watches it
CACHED_BYTES = 2**28  # of rendered images; larger sets are rendered again in each epoch
SHAPES = ("wall", "disc", "square", "triangle")  # mask ids 0..3


class ScenesConfig(Config):
    """Attributes:
    count: number of scenes.
    size: side in pixels.
    seed: of the generator; another seed is another set of the same kind.
    split: `train` and `test` never share a scene.
    noise: deviation of the sensor noise, as a share of full scale.
    """

    kind: Literal["scenes"] = "scenes"
    count: int = 4000
    size: int = 48
    seed: int = 0
    split: Literal["train", "test"] = "train"
    noise: float = 0.03

    def problems(self) -> list[str]:
        found = []
        if self.seed < 0:
            found.append(f"seed must be at least 0, got {self.seed}")
        if self.count < 1:
            found.append(f"count must be at least 1, got {self.count}")
        if self.size > 4096:
            found.append(f"size must be at most 4096 px, got {self.size}")
        if self.size < 16:
            found.append(f"size must be at least 16 px so that the finest texture exists, got {self.size}")
        if not 0 <= self.noise <= 1:
            found.append(f"noise must be between 0 and 1, got {self.noise}")
        return found

    def build(self) -> "ScenesSource":
        return ScenesSource(self)


@dataclass(frozen=True)
class Scene:
    """One scene: `image` [H, W, 3] uint8, `label` 0..7, `mask` [H, W] uint8 (0 wall, 1..3 shape), `depth` [H, W] float32 metres."""

    image: np.ndarray
    label: int
    mask: np.ndarray
    depth: np.ndarray


class ScenesSource:
    """A Source (see sources.py): scene i depends only on (seed, split, size, noise, i), so a larger set begins with the smaller one."""

    def __init__(self, config: ScenesConfig):
        self.config = config
        self.classes: list[str] | None = list(CLASSES)
        self.name = f"scenes-{config.split}-{config.seed}"
        self.skipped: dict[int, str] = {}
        self._images: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.config.count

    def labels(self) -> np.ndarray:
        """[n] int64; drawn first from each scene's own stream, so no image is rendered for it."""
        return np.array([int(self._stream(i).integers(len(CLASSES))) for i in range(len(self))], np.int64)

    def fingerprint(self) -> str:
        return sha256_json({"generator": GENERATOR, **self.config.model_dump()})[:16]

    def shared_with(self, other: Any) -> int:
        """How many scenes of `other` are scenes of this source too, be it at another size."""
        if not isinstance(other, ScenesSource):
            return 0
        same = (self.config.seed, self.config.split) == (other.config.seed, other.config.split)
        return min(len(self), len(other)) if same else 0

    def image(self, index: int) -> Image.Image:
        if index not in self._images:
            rendered = self.scene(index).image
            if len(self._images) * rendered.nbytes >= CACHED_BYTES:
                return Image.fromarray(rendered)
            self._images[index] = rendered
        return Image.fromarray(self._images[index])

    def scene(self, index: int) -> Scene:
        c = self.config
        return render(self._stream(index), c.size, c.noise)

    def _stream(self, index: int) -> np.random.Generator:
        c = self.config
        return np.random.default_rng((c.seed, 0 if c.split == "train" else 1, index))


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres (y, x) [H, W] in units of 1/48 of the side, about the middle."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5) * 48
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x


def render(g: np.random.Generator, size: int, noise: float) -> Scene:
    """Draw one scene of size x size pixels from the random stream `g`."""
    label = int(g.integers(len(CLASSES)))
    y, x = _grid(size)
    tilt = g.uniform(-TILT, TILT)
    u, v = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    wave = _texture(label, u, v, g.uniform(0, 2 * np.pi, 2))

    base = g.uniform(0.35, 0.65, 3)
    contrast = g.uniform(*CONTRAST) * g.uniform(0.6, 1.4, 3) * (1 if g.random() < 0.5 else -1)
    wall = np.clip(base + contrast * (wave[..., None] - 0.5), 0, 1).astype(np.float32)
    mask, depth = _shape(g, y, x)
    wall[mask > 0] = g.uniform(0.1, 0.9, 3).astype(np.float32)

    direction = g.uniform(0, 2 * np.pi)
    light = 1 + g.uniform(*LIGHT) * (np.cos(direction) * x + np.sin(direction) * y) / 24
    image = wall * np.clip(light, 0.05, None)[..., None].astype(np.float32) * g.uniform(0.7, 1.0)
    image += g.normal(0, noise, image.shape).astype(np.float32)
    return Scene((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), label, mask, depth)


def _texture(label: int, u: np.ndarray, v: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """The wall's pattern in 0..1 at coordinates (u, v)."""
    pattern, k = PATTERNS[label // 2], 2 * np.pi / PERIODS[label % 2]
    if pattern == "vertical":
        wave = np.sin(k * u + phase[0])
    elif pattern == "horizontal":
        wave = np.sin(k * v + phase[0])
    elif pattern == "checker":
        wave = np.sin(k * u + phase[0]) * np.sin(k * v + phase[1])
    else:  # a checker turned by 45 degrees
        wave = np.sin(k * (u + v) / np.sqrt(2) + phase[0]) * np.sin(k * (u - v) / np.sqrt(2) + phase[1])
    return 0.5 + 0.5 * np.clip(3 * wave, -1, 1)  # steep: nearly two-tone, with soft borders


def _shape(g: np.random.Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A small shape before a slanted wall: mask [H, W] of SHAPES ids, depth [H, W] in metres."""
    kind = int(g.integers(1, len(SHAPES)))
    cy, cx = g.uniform(-16, 16, 2)
    r = g.uniform(4, 8)
    dy, dx = y - cy, x - cx
    if SHAPES[kind] == "disc":
        inside = dy**2 + dx**2 < r**2
    elif SHAPES[kind] == "square":
        inside = (abs(dy) < r * 0.85) & (abs(dx) < r * 0.85)
    else:
        inside = (dy < r * 0.8) & (dy > 2 * abs(dx) - r)
    slant = g.uniform(-0.5, 0.5, 2)
    depth = (4 + slant[0] * y / 24 + slant[1] * x / 24).astype(np.float32)
    depth[inside] = g.uniform(1.5, 2.5)
    return np.where(inside, kind, 0).astype(np.uint8), depth
