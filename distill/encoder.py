"""The Encoder: the one face that every model and every artifact shows to evaluations, parity checks and benchmarks.

Shape legend: B batch, N patch tokens, D width, H W pixels.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """Frozen features of a batch: `cls` [B, D] after the final norm and `patches` [B, N, D], both float32 on the CPU."""

    cls: Tensor
    patches: Tensor


@runtime_checkable
class Encoder(Protocol):
    """images [B, 3, H, W] float32, preprocessed (see distill/data/preprocess.py) -> Features.

    Attributes:
        target: how the numbers are labelled, e.g. `torch-fp32`, `onnx-int8`.
        conditions: what a row must say about this encoder: runtime and version, precision, device, threads, artifact sha256.
    """

    target: str
    conditions: dict

    def __call__(self, images: Tensor) -> Features: ...


@runtime_checkable
class LayeredEncoder(Encoder, Protocol):
    """An Encoder that can also look inside: a network in PyTorch; an exported file holds only what it returns."""

    @property
    def depth(self) -> int:
        """How many blocks there are."""

    def layers(self, images: Tensor, n: int) -> list[Features]:
        """Features after each of the last n blocks, earliest first, each through the final LayerNorm."""


class RawPixels:
    """The yardstick that needs no network: standardised pixels. `cls` is the flattened image, `patches` its 8 x 8 px cells.

    Args:
        together: standardise all channels of an image together instead of each by itself. Neither is the stronger yardstick on every
            set (kNN on CIFAR-10: 37.4 together, 31.2 apart; on the rendered scenes 25 and 49), so both are reported.
        cell: side of the cells in pixels.
        side: larger images are averaged down to this many pixels a side: kNN and the probe of 150,000 numbers an image would take longer
            than everything else, and say less.

    Images come unnormalised, 0..1.
    """

    def __init__(self, together: bool = False, cell: int = 8, side: int = 48):
        self.target = "pixels-joint" if together else "pixels"
        how = "per image, channels together" if together else "per image and channel"
        self.conditions = {"runtime": f"torch {torch.__version__}", "standardised": how, "pixels_at_most": side}
        self.side = side
        self.axes = (1, 2, 3) if together else (2, 3)
        self.cell = cell

    def __call__(self, images: Tensor) -> Features:
        if max(images.shape[2:]) > self.side:
            images = nn.functional.adaptive_avg_pool2d(images, self.side)
        b, c, h, w = images.shape
        std, mean = torch.std_mean(images.float(), self.axes, correction=0, keepdim=True)
        images = (images - mean) / (std + 1e-3)
        p = self.cell
        cropped = images[:, :, : h // p * p, : w // p * p]
        patches = cropped.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).reshape(b, -1, c * p * p)
        return Features(images.flatten(1), patches)


class TorchEncoder:
    """A backbone in PyTorch as an Encoder: evaluation mode, no gradients, float32 out; on a GPU where there is one."""

    def __init__(self, backbone: nn.Module, device: str | None = None):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone = backbone.to(device).eval()
        self.device = device
        self.target = "torch-fp32"
        self.conditions: dict[str, Any] = {"runtime": f"torch {torch.__version__}", "precision": "fp32", "device": device}
        if device == "cpu":
            self.conditions["threads"] = torch.get_num_threads()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        out = self.backbone(images.to(self.device))
        return Features(out.cls.float().cpu(), out.patches.float().cpu())

    @property
    def depth(self) -> int:
        """Blocks that can be looked into: 0 for networks that are no Vision Transformers of ours."""
        return len(self.backbone.blocks) if hasattr(self.backbone, "intermediate") else 0  # type: ignore[arg-type]

    @torch.inference_mode()
    def layers(self, images: Tensor, n: int) -> list[Features]:
        assert 1 <= n <= self.depth
        found = self.backbone.intermediate(images.to(self.device), list(range(self.depth - n, self.depth)))  # type: ignore[operator]
        return [Features(out.cls.float().cpu(), out.patches.float().cpu()) for out in found]
