"""Values that change over the steps of a run, and the layer-wise multipliers of parameters.

Pure functions of the step; a run of any length is described by numbers, so resuming needs no state.
"""

import math
from dataclasses import dataclass

SCALES = "_log_scale"  # how names of learned scales of quantization end (distill/models/fake_quant.py)


@dataclass(frozen=True)
class Cosine:
    """zeros for `freeze` steps; linear from `start` to `base` over `warmup` steps with BOTH ends included; then
    final + (base - final)/2 (1 + cos(pi t/T)), t = 0..T-1, T = total - warmup - freeze; from step `total` on: final.
    """

    base: float
    final: float
    total: int
    warmup: int = 0
    start: float = 0.0
    freeze: int = 0

    def __call__(self, step: int) -> float:
        if step >= self.total:
            return self.final
        if step < self.freeze:
            return 0.0
        if (i := step - self.freeze) < self.warmup:
            return self.start + (self.base - self.start) * i / (self.warmup - 1) if self.warmup > 1 else self.start
        t, length = i - self.warmup, self.total - self.warmup - self.freeze
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * t / length))


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` over `steps` steps with both ends included, then constant."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / (self.steps - 1) if self.steps > 1 else self.start


def layer_multiplier(name: str, blocks: int, decay: float, patch_embed: float) -> float:
    """Learning-rate multiplier of a backbone parameter: decay^(blocks + 1 - layer), the embedding being layer 0, block i layer i + 1,
    the final norm layer blocks + 1; the patch embedding is multiplied by `patch_embed` on top (DINOv2).
    """
    name = name.removeprefix("net.")  # a timm network inside its wrapper
    first = name.split(".")[0]
    if first == "blocks":
        layer = int(name.split(".")[1]) + 1
    elif first in (
        "cls_token",
        "pos_embed",
        "mask_token",
        "register_tokens",
        "reg_token",
        "patch_embed",
        "norm_pre",
        "conv_stem",
        "bn1",
        "stem",
    ):
        layer = 0
    else:
        layer = blocks + 1
    return decay ** (blocks + 1 - layer) * (patch_embed if first == "patch_embed" else 1.0)


def is_decayed(name: str) -> bool:
    """Whether weight decay applies: not to biases, norms, LayerScale and quantization's scales, but to tokens, positions and both parts of
    weight norm.
    """
    return not (name.endswith(("bias", SCALES)) or "norm" in name or "gamma" in name)
