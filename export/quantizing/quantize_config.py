"""The settings of quantization, and what a quantized number can be (the grid of a precision)."""

from dataclasses import dataclass
from typing import Literal, get_args

import ml_dtypes
import numpy as np

from distill.config import Config
from export.quantizing.budget import BudgetConfig

Calibrator = Literal["minmax", "percentile", "mse", "l3", "entropy"]
QuantizedPrecision = Literal["int8", "fp8", "w8", "w4"]
QUANTIZED: tuple[str, ...] = get_args(QuantizedPrecision)


class QuantizeConfig(Config):
    """How quantized artifacts (int8, fp8, w8, w4) are made. The defaults are what measured best on a trained ViT-S/14.

    Attributes:
        calibration: how an activation's clipping point is chosen: `minmax` (its largest magnitude), `percentile` (of its
            magnitudes), `mse` or `l3` (the point with the least squared or cubed rounding and clipping error), `entropy`
            (the least Kullback-Leibler divergence of the quantized histogram, as TensorRT's calibrator).
        percentile: of magnitudes kept by `percentile`.
        images: how many training images calibrate.
        smooth: SmoothQuant's alpha (arXiv 2211.10438, equation 4): how much of the activations' spread over channels moves
            into the weights; "search" tries several per layer and keeps the one with the least output error; null: none.
            Costs nothing at run time: the factors are folded into the LayerNorm or the Linear layer that makes the activation.
        offset: inputs that are nearly never negative (what comes out of GELU) are moved by a constant before they are quantized,
            and the bias makes up for it: symmetric codes would leave half of their range unused (int8).
        bias_correction: each quantized layer's mean output error on the calibration images is taken off its bias
            (arXiv 1906.04721, section 4.2), layer after layer, so that what earlier layers did is corrected too.
        weights: a weight channel's clipping point: `minmax`, or `mse` (the least squared error).
        rounding: `nearest`, or `compensated`: a weight is rounded one input channel at a time, each error made good by the
            channels still to come (GPTQ, arXiv 2210.17323), on the inputs that the quantized layers before it make. It removes
            two thirds of the error of w4, a third of that of fp8 and a fifth of that of int8.
        attention: quantize both inputs of the attention products QK^T and AV too (int8, fp8); "qk": those of QK^T alone, whose
            operands stay accurate in 8 bits, while a softmax's output, mostly far below its largest value, does not.
        patch_embed: quantize the patch embedding's convolution too (not to 4 bits): a smaller file for a little accuracy.
        keep: layers to keep in floating point, by name or pattern, e.g. ["blocks.0.*", "blocks.11.mlp.fc2"].
        block: w4's weights share a scale along this many input channels.
        budget: how little accuracy may be lost; the fewest layers that keep it stay in floating point.
    """

    calibration: Calibrator = "minmax"
    percentile: float = 99.99
    images: int = 128
    smooth: float | Literal["search"] | None = "search"
    offset: bool = True
    bias_correction: bool = True
    weights: Literal["minmax", "mse"] = "minmax"
    rounding: Literal["nearest", "compensated"] = "compensated"
    attention: bool | Literal["qk"] = False
    patch_embed: bool = False
    keep: list[str] = []  # noqa: RUF012  pydantic copies it
    block: int = 32
    budget: BudgetConfig | None = None

    def plain(self) -> "QuantizeConfig":
        """Scales and nothing else: for weights whose numbers are not to be moved, such as those of quantization-aware training. `l3` is
        the best single clipping rule where nothing smooths (patches' mean cosine on a trained ViT-S/14: .9968, minmax .9936).
        """
        nothing = {"smooth": None, "offset": False, "bias_correction": False, "rounding": "nearest", "attention": False}
        return self.model_copy(update={**nothing, "calibration": "l3", "budget": None})

    def problems(self) -> list[str]:
        found = []
        if not 50 < self.percentile <= 100:
            found.append(f"percentile must be above 50 and at most 100, got {self.percentile}")
        if self.images < 1:
            found.append(f"images must be at least 1, got {self.images}")
        if isinstance(self.smooth, float) and not 0 < self.smooth < 1:
            found.append(f"smooth must be above 0 and below 1, or search, or null, got {self.smooth}")
        if self.block < 16 or self.block & (self.block - 1):
            found.append(f"block must be a power of two and at least 16, got {self.block}")
        return found


@dataclass(frozen=True)
class Grid:
    """The values that a code of `bits` bits stands for, before its scale: integers from low to high, or E4M3 floats."""

    name: Literal["int8", "int4", "fp8"]
    low: float
    high: float

    def round(self, values: np.ndarray) -> np.ndarray:
        """The nearest values of the grid, saturating; the type of `values` stays."""
        clipped = np.clip(values, self.low, self.high)
        if self.name == "fp8":
            return clipped.astype(ml_dtypes.float8_e4m3fn).astype(values.dtype)
        return np.rint(clipped, out=clipped)

    def fake(self, values: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
        """Quantized and dequantized: scale * round(values / scale)."""
        return self.round(values / scale) * scale


INT8 = Grid("int8", -127, 127)  # without -128: symmetric, so that -x quantizes to minus what x does
INT4 = Grid("int4", -7, 7)
FP8 = Grid("fp8", -448, 448)  # E4M3 without infinities; beyond 448 a cast gives NaN, hence the clip
ACTIVATION_GRID = {"int8": INT8, "fp8": FP8}  # w8 and w4 leave activations alone
WEIGHT_GRID = {"int8": INT8, "fp8": FP8, "w8": INT8, "w4": INT4}
