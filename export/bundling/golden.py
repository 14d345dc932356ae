"""Golden data of a bundle: raw images, their tensors, and the outputs that each artifact gave where the bundle was built."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from distill.config import Config
from distill.data.preprocess import to_rgb
from distill.encoder import Encoder, TorchEncoder
from distill.errors import GateFailed
from export.artifact import Artifact, ArtifactFile, Precision, Unrunnable
from export.runtimes import open_artifact

GOLDEN_SIDE = 1024  # longer golden images are reduced: a bundle is no place for 50-megapixel photographs


class Tolerance(Config):
    """How far an output may lie from the expected one.

    Attributes:
        cosine_min: least cosine of a CLS or patch vector.
        max_abs: largest absolute difference, in units of the expected output's root mean square.
    """

    cosine_min: float
    max_abs: float


# The same file on another processor: other kernels and other orders of summation.
SAME: dict[Precision, Tolerance] = {
    "fp32": Tolerance(cosine_min=0.9999, max_abs=0.02),
    "fp16": Tolerance(cosine_min=0.999, max_abs=0.1),
    "bf16": Tolerance(cosine_min=0.995, max_abs=0.3),
    "int8": Tolerance(cosine_min=0.99, max_abs=1.0),
    "fp8": Tolerance(cosine_min=0.99, max_abs=1.0),
    "w8": Tolerance(cosine_min=0.999, max_abs=0.1),
    "w4": Tolerance(cosine_min=0.999, max_abs=0.1),
}
# Against the artifact it was compiled from: the cosines are the parity gates of export.
SOURCE: dict[Precision, Tolerance] = {
    "fp32": Tolerance(cosine_min=0.9999, max_abs=0.05),
    "fp16": Tolerance(cosine_min=0.999, max_abs=0.2),
    "bf16": Tolerance(cosine_min=0.99, max_abs=0.5),
    "int8": Tolerance(cosine_min=0.98, max_abs=2.0),
    "fp8": Tolerance(cosine_min=0.98, max_abs=2.0),
    "w8": Tolerance(cosine_min=0.999, max_abs=0.2),
    "w4": Tolerance(cosine_min=0.98, max_abs=2.0),
}
# Pillow's resize may round a grey level otherwise in another version; per-image normalisation of a dull image enlarges that.
PREPROCESS = Tolerance(cosine_min=0.999, max_abs=0.1)


def golden_image(image: Image.Image) -> Image.Image:
    """RGB without metadata, at most GOLDEN_SIDE px on the longer side."""
    image = Image.fromarray(np.asarray(to_rgb(image)))
    image.thumbnail((GOLDEN_SIDE, GOLDEN_SIDE), Image.Resampling.LANCZOS)
    return image


def expected_outputs(
    artifact: Artifact, entry: ArtifactFile, artifacts: list[Artifact], model: torch.nn.Module, tensor: np.ndarray
) -> tuple[str, dict[str, np.ndarray]]:
    """Outputs for preprocessed images, from the artifact, else from what it was made from, at last from PyTorch.

    Args:
        artifacts: where sources are looked up. model: the backbone itself. tensor: [n, 3, S, S] float32.

    Returns:
        The target that computed them, and `cls` [n, D] and `patches` [n, N, D] float32.

    Raises:
        GateFailed: there is NaN or infinity among them.
    """
    untried = {a.target: a for a in artifacts}
    candidate: Artifact | None = artifact
    encoder: Encoder = TorchEncoder(model)
    while candidate is not None:
        try:
            encoder = open_artifact(candidate, entry.resolution, threads=1)  # one thread: the same sums on every build
            break
        except Unrunnable:
            untried.pop(candidate.target, None)
            candidate = untried.get(candidate.source)
    images = torch.from_numpy(tensor)
    parts = [encoder(images[i : i + artifact.max_batch]) for i in range(0, len(images), artifact.max_batch)]
    outputs = {name: torch.cat([getattr(p, name) for p in parts]).numpy() for name in ("cls", "patches")}
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise GateFailed(f"{encoder.target} gives NaN or infinity in {name} on a golden image; look at its parity rows.")
    return encoder.target, outputs


def limits(tolerance: Tolerance, outputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A tolerance as the manifest has it: `max_abs` per output, in the output's own units."""
    return {
        "cosine_min": tolerance.cosine_min,
        "max_abs": {name: tolerance.max_abs * root_mean_square(value) for name, value in outputs.items()},
    }


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, np.float32), allow_pickle=False)
    return buffer.getvalue()


def as_npz(arrays: dict[str, np.ndarray]) -> bytes:
    """numpy dates every entry with the zip format's first day, so these bytes depend on nothing but the arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{n: np.ascontiguousarray(v, np.float32) for n, v in arrays.items()})
    return buffer.getvalue()
