"""Trained heads for segmentation and depth, read and applied without torch (DINOv2, sections 7.4 and 7.5).

A `.safetensors` file is one of `distill.evaluate.dense_head.Head`; `predict` gives what its `predict` gives. An `.onnx` file takes patches
[1, N, D] and gives logits [1, N, K]; its metadata `head` is JSON with `kind`, and may have `values` [K] and `names`.

Shape legend: N patches, D width, F inputs of the head (D, or 2 D with the CLS vector after the patch), K outputs, h w patch grid, S side.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.errors import UserError
from export.demo.models import Look, first_line

KINDS = ("segmentation", "depth")
Logits = Callable[[Look], np.ndarray]  # -> [N, K]


@dataclass(frozen=True)
class DenseHead:
    """A head's logits as a function of what a model sees.

    Attributes:
        name: of its task and file. kind: `segmentation` or `depth`. names: of the classes, where the file has them.
        values_K: what an output stands for: a class id, or metres.
        of: of a run's head the file whose features it was trained on, such as `small-onnx-int8-224`; None where that is not known.
    """

    name: str
    kind: str
    logits: Logits
    names: list[str]
    values_K: np.ndarray | None
    of: str | None = None

    def reads(self, model: str) -> bool:
        """Whether it was trained on this model's features (`small onnx-int8 224 px`), or may have been."""
        return self.of is None or self.of == model.removesuffix(" px").replace(" ", "-").replace("teacher-(torch)", "teacher")

    def predict(self, look: Look, size: int) -> np.ndarray:
        """-> class ids [S, S] int64, or metres [S, S] float32.

        Segmentation: logits, upsampled bilinearly, then the largest. Depth: the probable mean of the bins,
        upsampled.

        Raises:
            UserError: the head was trained on other features than this model gives.
        """
        logits_NK = self.logits(look)
        values_K = np.arange(logits_NK.shape[1]) if self.values_K is None else self.values_K
        if self.kind == "segmentation":
            best = np.stack([bilinear(logits_N.reshape(look.grid), size) for logits_N in logits_NK.T]).argmax(0)
            return values_K[best].astype(np.int64)
        share_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
        metres_N = share_NK @ values_K / share_NK.sum(1)
        return bilinear(metres_N.reshape(look.grid), size)


def bilinear(map_hw: np.ndarray, size: int) -> np.ndarray:
    """[h, w] -> [S, S], half-pixel centres."""
    return np.asarray(Image.fromarray(map_hw.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR))


def load_head(path: Path) -> DenseHead:
    """Read a head's file.

    Raises:
        UserError: it is no head that this page can use; the sentence says why.
    """
    task = "" if path.parent.name == "heads" else f"{path.parent.name} "
    try:
        logits, about, values = onnx_logits(path) if path.suffix == ".onnx" else linear_logits(path)
        if about["kind"] not in KINDS:
            raise ValueError(f"its kind is {about['kind']!r}, none of {', '.join(KINDS)}")
    except Exception as e:  # a file from elsewhere, and each reader has errors of its own
        raise UserError(f"{path} holds no head that can be shown ({first_line(e)}).") from e
    name = path.stem.removeprefix("head-")
    of = name.rpartition(".")[2] if task else None  # head-students.small-onnx-int8-224
    of = "teacher" if of is not None and of.startswith("teacher-torch-") else of
    return DenseHead(task.strip() or name, about["kind"], logits, list(about.get("names") or []), values, of)


def linear_logits(path: Path) -> tuple[Logits, dict[str, Any], np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        about = json.loads((file.metadata() or {})["head"])
        weight_KF, bias_K, shift_F, scale_F, values_K = (
            file.get_tensor(key) for key in ("weight", "bias", "shift", "scale", "values")
        )

    def logits(look: Look) -> np.ndarray:
        if about["layers"] != 1:
            raise UserError(
                f"{path.name} reads the last {about['layers']} layers, and the models of this page give the last alone."
            )
        inputs_NF = look.patches_ND
        if about["cls"]:
            inputs_NF = np.concatenate([inputs_NF, np.broadcast_to(look.cls_D, inputs_NF.shape)], 1)
        check_width(path, weight_KF.shape[1], inputs_NF.shape[1])
        return (inputs_NF - shift_F) * scale_F @ weight_KF.T + bias_K

    return logits, about, values_K


def onnx_logits(path: Path) -> tuple[Logits, dict[str, Any], np.ndarray | None]:
    import onnxruntime

    from export.sessions import quiet_options

    session = onnxruntime.InferenceSession(str(path), quiet_options(1), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["head"])
    port = session.get_inputs()[0]

    def logits(look: Look) -> np.ndarray:
        if isinstance(port.shape[-1], int):
            check_width(path, port.shape[-1], look.patches_ND.shape[1])
        return session.run(None, {port.name: look.patches_ND[None].astype(np.float32)})[0][0]

    values = about.get("values")
    return logits, about, None if values is None else np.asarray(values, np.float32)


def check_width(path: Path, wanted: int, got: int) -> None:
    if wanted != got:
        raise UserError(f"{path.name} was trained on {wanted} numbers a patch, and this model gives {got}.")
