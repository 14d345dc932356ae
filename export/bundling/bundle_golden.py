"""Golden data of a bundle: which files they become, and what the manifest says of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.data.preprocess import Preprocess
from distill.models.checkpoints import load_backbone
from distill.progress import Progress
from export.artifact import Artifact
from export.bundling import golden
from export.bundling.bundle_config import BundleConfig
from export.bundling.golden import PREPROCESS

STAND_IN = ("fp32", "int8")  # ONNX files of these precisions are run by OpenVINO too, where ONNX Runtime is not installed
Json = dict[str, Any]


@dataclass(frozen=True)
class Vectors:
    """Attributes:
    about: the manifest's `golden`.
    expected: its `expected` by path of an artifact's file.
    features: (target, resolution) -> the expected `cls` [n, D] and `patches` [n, N, D] themselves.
    """

    about: Json
    expected: dict[str, Json]
    features: dict[tuple[str, int], dict[str, np.ndarray]]


def add_golden(
    files: dict[str, Any],
    config: BundleConfig,
    chosen: list[Artifact],
    artifacts: list[Artifact],
    settings: dict[int, Preprocess],
    images: list[Image.Image],
    model_folder: Path,
    progress: Progress,
) -> Vectors:
    """Add images, tensors and expected outputs to `files`."""
    names = [f"golden/image_{i}.png" for i in range(len(images))]
    files |= dict(zip(names, map(golden.as_png, images), strict=True))
    tensors = {r: np.stack([p(image) for image in images]) for r, p in settings.items()}
    files |= {f"golden/input_{r}.npy": golden.as_npy(t) for r, t in tensors.items()}
    expected: dict[str, Json] = {}
    features: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    model = load_backbone(model_folder)
    with progress.task("golden outputs", sum(len(a.files) for a in chosen), "files") as task:
        for artifact in chosen:
            for entry in artifact.files:
                source, outputs = golden.expected_outputs(artifact, entry, artifacts, model, tensors[entry.resolution])
                features[artifact.target, entry.resolution] = outputs
                own = source == artifact.target
                path = f"golden/{artifact.target}/expected_{entry.resolution}.npz"
                files[path] = golden.as_npz(outputs)
                expected[f"artifacts/{artifact.target}/{entry.path}"] = {
                    "path": path,
                    "source": source,
                    **golden.limits(config.tolerance(artifact.precision, own), outputs),
                }
                if own and artifact.runtime == "onnxruntime" and artifact.precision in STAND_IN:
                    other = golden.limits(config.tolerance(artifact.precision, same=False), outputs)
                    expected[f"artifacts/{artifact.target}/{entry.path}"]["stand_in"] = other
                task.advance(target=artifact.target)
    inputs = [{"resolution": r, "path": f"golden/input_{r}.npy"} for r in settings]
    return Vectors({"images": names, "inputs": inputs, **PREPROCESS.model_dump()}, expected, features)
