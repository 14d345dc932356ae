"""A trained linear head, of images or of their patches: a plain record of arrays that a bundle can carry, and what a dense one says of
every pixel of an image.

Shape legend: B images, N tokens an image on a g x g grid, L layers, D width, F inputs, K outputs, H W pixels.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.evaluate.task import Stored
from distill.files import replacing

ARRAYS = ("weight", "bias", "shift", "scale", "values")


@dataclass(frozen=True, eq=False)
class Head:
    """logits = weight @ ((inputs - shift) * scale) + bias, for each patch by itself, or once for the image.

    Attributes:
        kind: `segmentation` or `depth` (of patches), or `classification` (of the image).
        weight: [K, F] float32. bias: [K]. shift, scale: [F].
        values: [K] float32, what an output stands for: a class id, or metres (the middle of a bin of depth).
        layers: L, the last so many layers' tokens, earliest first, are its inputs; of a classification their CLS.
        cls: the L layers' CLS follow after them.
        names: of the K classes; empty for depth, and where a classification's are not known.
        constant: the best answer without looking, from the training maps: the commonest class id, or the mean depth in metres;
            None of a classification, which is not compared with it.
        training: how it was trained, and its score on the held-out training images. JSON values.
        mean_patch: the mean patch of the last layer follows after a classification's CLS.
    """

    kind: Literal["segmentation", "depth", "classification"]
    weight: np.ndarray
    bias: np.ndarray
    shift: np.ndarray
    scale: np.ndarray
    values: np.ndarray
    layers: int
    cls: bool
    names: list[str]
    constant: float | None = None
    training: dict[str, Any] = field(default_factory=dict)
    mean_patch: bool = False

    def save(self, path: Path) -> None:
        """As safetensors; what is no array is its metadata."""
        about = {k: v for k, v in asdict(self).items() if k not in ARRAYS}
        with replacing(path) as part:
            arrays = {k: np.ascontiguousarray(getattr(self, k), np.float32) for k in ARRAYS}
            save_file(arrays, part, metadata={"head": json.dumps(about, sort_keys=True)})

    @staticmethod
    def load(path: Path) -> "Head":
        """Raises: UserError: absent, damaged, or not a head."""
        try:
            with safe_open(path, "np") as f:
                about = json.loads((f.metadata() or {})["head"])
                return Head(**about, **{k: f.get_tensor(k) for k in ARRAYS})
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as e:
            raise UserError(f"{path} holds no head ({e}). Run the evaluation that writes it again.") from e


def predict(head: Head, patches: np.ndarray, cls: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What a head says of every pixel.

    Segmentation: logits, upsampled bilinearly, then the largest. Depth: the mean of the bins weighted by their probabilities, upsampled
    bilinearly.

    Args:
        patches: [B, N, L D], layers side by side, earliest first. cls: [B, L D]; any where the head does not use it.
        size: H, W of the maps.

    Returns:
        [B, H, W], int64 class ids or float32 metres.
    """
    tokens = _float32(patches)
    if head.cls:
        tokens = torch.cat([tokens, _float32(cls)[:, None].expand(-1, tokens.shape[1], -1)], 2)
    weight, bias, shift, scale, values = (torch.from_numpy(getattr(head, k)) for k in ARRAYS)
    logits_BNK = ((tokens - shift) * scale) @ weight.T + bias
    grid = round(tokens.shape[1] ** 0.5)
    assert grid * grid == tokens.shape[1], f"{tokens.shape[1]} tokens fill no square grid"
    if head.kind == "segmentation":
        up_BKHW = _upsampled(logits_BNK.mT.unflatten(2, (grid, grid)), size)
        return values[up_BKHW.argmax(1)].long().numpy()
    depth_BN = logits_BNK.softmax(2) @ values
    return _upsampled(depth_BN.unflatten(1, (grid, grid))[:, None], size)[:, 0].numpy()


def _float32(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(x, np.float32))  # a copy: torch warns of memory-mapped arrays, which are read-only


def _upsampled(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def predict_item(head: Head, stored: Stored, index: int, size: tuple[int, int]) -> np.ndarray:
    """[H, W] for one image of stored features of as many layers as the head has."""
    assert stored.patches is not None
    patches = np.concatenate(list(stored.patches[:, index]), -1)[None]
    return predict(head, patches, stored.cls[:, index].reshape(1, -1), size)[0]
