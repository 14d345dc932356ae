"""Trained heads for segmentation and depth, read and applied without torch (DINOv2, sections 7.4 and 7.5).

A `.safetensors` file is one of `distill.evaluate.linear_head.Head`; `predict` gives what its `predict` gives. An `.onnx` file is one of
`export/bundling/head_graph.py`, or any that takes patches [1, N, D] and gives logits [1, N, K] and whose metadata `head` is JSON with
`kind`; it may have `values` [K] and `names`.

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
Answer = Callable[[Look], np.ndarray]  # -> logits [N, K], or metres [N]


@dataclass(frozen=True)
class DenseHead:
    """A head's answer as a function of what a model sees.

    Attributes:
        name: of its task and file. kind: `segmentation` or `depth`. names: of the K classes, where the file has them.
        answer: logits [N, K] of segmentation, metres [N] of depth.
        values_K: the class id of an output.
        of: of a run's head the file whose features it was trained on, such as `small-onnx-int8-224`; None where that is not known.
    """

    name: str
    kind: str
    answer: Answer
    names: list[str]
    values_K: np.ndarray | None
    of: str | None = None

    def reads(self, model: str) -> bool:
        """Whether it was trained on this model's features (`small onnx-int8 224 px`), or may have been."""
        return self.of is None or self.of == model.removesuffix(" px").replace(" ", "-").replace("teacher-(torch)", "teacher")

    def predict(self, look: Look, size: int) -> np.ndarray:
        """-> class ids [S, S] int64, or metres [S, S] float32.

        Segmentation: logits, upsampled bilinearly, then the largest. Depth: metres, upsampled.

        Raises:
            UserError: the head was trained on other features than this model gives.
        """
        answer = self.answer(look)
        if self.kind == "depth":
            return bilinear(answer.reshape(look.grid), size)
        best = np.stack([bilinear(logits_N.reshape(look.grid), size) for logits_N in answer.T]).argmax(0)
        return (best if self.values_K is None else self.values_K[best]).astype(np.int64)

    def name_of(self, class_id: int) -> str:
        """What a class id of `predict` is called."""
        ids = list(range(len(self.names))) if self.values_K is None else [int(v) for v in self.values_K]
        known = dict(zip(ids, self.names, strict=False))
        return known.get(class_id, f"class {class_id}")


def mean_of_bins(logits_NK: np.ndarray, metres_K: np.ndarray) -> np.ndarray:
    """-> [N]: the bins' metres weighted by their probabilities."""
    share_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
    return share_NK @ metres_K / share_NK.sum(1)


def bilinear(map_hw: np.ndarray, size: int) -> np.ndarray:
    """[h, w] -> [S, S], half-pixel centres."""
    return np.asarray(Image.fromarray(map_hw.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR))


def kind_of(path: Path) -> str | None:
    """What a head's file says of itself; None where it cannot be read."""
    try:
        if path.suffix == ".onnx":
            return onnx_session(path)[1]["kind"]
        return safetensors_about(path)["kind"]
    except Exception:  # `load_head` says what is wrong with it
        return None


def safetensors_about(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return json.loads((file.metadata() or {})["head"])


def onnx_session(path: Path) -> tuple[Any, dict[str, Any]]:
    """The opened file, and its metadata."""
    import onnxruntime

    from export.sessions import quiet_options

    session = onnxruntime.InferenceSession(str(path), quiet_options(1), providers=["CPUExecutionProvider"])
    return session, json.loads(session.get_modelmeta().custom_metadata_map["head"])


def load_head(path: Path) -> DenseHead:
    """Read a head's file.

    Raises:
        UserError: it is no head that this page can use; the sentence says why.
    """
    task = "" if path.parent.name == "heads" else f"{path.parent.name} "
    try:
        answer, about, values = onnx_answer(path) if path.suffix == ".onnx" else linear_answer(path)
        if about["kind"] not in KINDS:
            raise ValueError(f"its kind is {about['kind']!r}, none of {', '.join(KINDS)}")
    except Exception as e:  # a file from elsewhere, and each reader has errors of its own
        raise UserError(f"{path} holds no head that can be shown ({first_line(e)}).") from e
    name = path.stem.removeprefix("head-")
    of = name.rpartition(".")[2] if task else None  # head-students.small-onnx-int8-224
    of = "teacher" if of is not None and of.startswith("teacher-torch-") else of
    return DenseHead(task.strip() or name, about["kind"], answer, list(about.get("names") or []), values, of)


def linear_answer(path: Path) -> tuple[Answer, dict[str, Any], np.ndarray]:
    from safetensors import safe_open

    about = safetensors_about(path)
    with safe_open(path, framework="numpy") as file:
        weight_KF, bias_K, shift_F, scale_F, values_K = (
            file.get_tensor(key) for key in ("weight", "bias", "shift", "scale", "values")
        )

    def answer(look: Look) -> np.ndarray:
        if about["layers"] != 1:
            raise UserError(
                f"{path.name} reads the last {about['layers']} layers, and the models of this page give the last alone."
            )
        inputs_NF = look.patches_ND
        if about["cls"]:
            inputs_NF = np.concatenate([inputs_NF, np.broadcast_to(look.cls_D, inputs_NF.shape)], 1)
        check_width(path, weight_KF.shape[1], inputs_NF.shape[1])
        logits_NK = (inputs_NF - shift_F) * scale_F @ weight_KF.T + bias_K
        return mean_of_bins(logits_NK, values_K) if about["kind"] == "depth" else logits_NK

    return answer, about, values_K


def onnx_answer(path: Path) -> tuple[Answer, dict[str, Any], np.ndarray | None]:
    session, about = onnx_session(path)
    values = None if about.get("values") is None else np.asarray(about["values"], np.float32)
    (output,) = session.get_outputs()

    def answer(look: Look) -> np.ndarray:
        given = {"patches": look.patches_ND[None].astype(np.float32), "cls": look.cls_D[None].astype(np.float32)}
        for port in session.get_inputs():
            if isinstance(port.shape[-1], int):
                check_width(path, port.shape[-1], given.get(port.name, given["patches"]).shape[-1])
        found = session.run(None, {port.name: given.get(port.name, given["patches"]) for port in session.get_inputs()})[0][0]
        if about["kind"] == "segmentation" or output.name == "metres":
            return found
        return mean_of_bins(found, np.arange(found.shape[1]) if values is None else values)

    return answer, about, values


def check_width(path: Path, wanted: int, got: int) -> None:
    if wanted != got:
        raise UserError(f"{path.name} was trained on {wanted} numbers a patch, and this model gives {got}.")
