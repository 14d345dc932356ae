"""An image becomes the network's input: resize, centre crop, scale, normalise. The one code for training's evaluation, export, bundles.

Imports nothing but numpy and Pillow: bundles carry a copy of this very file, so what a device runs is what was measured here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Mean and deviation of the channels by kind. Names are those of the field: timm and transformers files give the numbers.
CONSTANTS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "satellite": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),  # DINOv3 on SAT-493M
}
KINDS = (*CONSTANTS, "per_image", "none")
IMAGENET_MEAN, IMAGENET_STD = CONSTANTS["imagenet"]
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes [3, size, size] float32.

    Attributes:
        size: side of the square result in pixels.
        resize: the shorter side is resized to this many pixels (antialiased, Pillow's filter) before the centre crop.
        interpolation: `bicubic`, `bilinear` or `lanczos`.
        normalize: a name of `CONSTANTS` (constant mean and deviation), `per_image` (each channel of each image to mean 0, deviation 1)
            or `none`.
        fit: `crop` (shorter side to `resize`, then the centre), or `squash`: the whole image to the square, its sides scaled apart, as
            dense evaluations need it, which must not lose the borders.
    """

    size: int
    resize: int
    interpolation: str = "bicubic"
    normalize: str = "imagenet"
    fit: str = "crop"

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Pillow image of any mode -> [3, size, size] float32, C-contiguous."""
        image = to_rgb(image)
        if self.fit == "squash":
            image = image.resize((self.size, self.size), FILTERS[self.interpolation])
            return np.ascontiguousarray(self.normalized(np.asarray(image, np.float32).transpose(2, 0, 1) / 255.0))
        w, h = image.size
        scale = self.resize / min(w, h)
        if (w, h) != (new := (max(self.size, round(w * scale)), max(self.size, round(h * scale)))):
            image = image.resize(new, FILTERS[self.interpolation])
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return np.ascontiguousarray(self.normalized(np.asarray(image, np.float32).transpose(2, 0, 1) / 255.0))

    def normalized(self, pixels: np.ndarray) -> np.ndarray:
        """[..., 3, H, W] float32 in 0..1 -> the same shape, normalised."""
        return normalize(pixels, self.normalize)

    def to_json(self) -> dict:
        """What makes the same Preprocess again; the usual `fit` is not mentioned."""
        return {k: v for k, v in asdict(self).items() if (k, v) != ("fit", "crop")}

    @staticmethod
    def from_json(value: dict) -> "Preprocess":
        return Preprocess(**value)


def normalize(pixels: np.ndarray, kind: str) -> np.ndarray:
    """[..., 3, H, W] float32 in 0..1 -> the same shape, normalised by `kind` (see Preprocess)."""
    if kind in CONSTANTS:
        mean, std = (np.array(v, np.float32)[:, None, None] for v in CONSTANTS[kind])
        return (pixels - mean) / std
    if kind == "per_image":
        mean = pixels.mean((-2, -1), keepdims=True, dtype=np.float32)
        std = pixels.std((-2, -1), keepdims=True, dtype=np.float32)
        return (pixels - mean) / (std + np.float32(1e-3))  # a flat channel becomes 0, not noise blown up
    if kind == "none":
        return pixels
    raise ValueError(f"normalize must be one of {', '.join(KINDS)}, got {kind!r}")


def kind_of(mean: Sequence[float], std: Sequence[float]) -> str | None:
    """The kind that subtracts this mean and divides by this deviation (to 1e-4), or None."""
    known = {**CONSTANTS, "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}
    for kind, constants in known.items():
        if np.shape(mean) == np.shape(std) == (3,) and np.allclose((mean, std), constants, rtol=0, atol=1e-4):
            return kind
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB: EXIF rotation applied, 16-bit scaled to 8 (not clipped), alpha laid over white, CMYK converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        top = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
        return Image.fromarray(np.clip(values * (255.0 / top) + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def load_rgb(path: Path) -> Image.Image:
    """Open a file and convert it to RGB; Pillow's own errors pass through."""
    with Image.open(path) as image:
        return to_rgb(image)
