"""INT8 by explicit Q/DQ: the Linear layers' inputs (per tensor) and weights (per output channel), symmetric, zero point 0.

Everything else stays in the graph's floating point: residual adds, LayerNorm, GELU, softmax, positions, biases. Quantizing
residual adds alone takes a ViT to 0 %, and TensorRT's parser refuses int32 biases and any other zero point by name. Weights are
stored as int8 with a DequantizeLinear behind them, so the file shrinks by nearly 4.

    x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- int8 weight [K, N]
"""

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from distill.config import Config
from distill.errors import UserError
from export.graph import (
    INPUT,
    LINEAR_OPS,
    PRODUCTS,
    constants,
    linear_nodes,
    load_graph,
    quantized_linears,
    serialize,
    set_constants,
)

LEVELS = 127  # -127..127: symmetric, so that -x quantizes to minus what x does
BINS = 4096
EXPONENTS = {"mse": 2, "l3": 3}
SMALLEST_HALF_SCALE = 2.0**-20  # a half float of 4 bits; smaller ones would round the scale itself away
CALIBRATION_BYTES = 2**28


class QuantizeConfig(Config):
    """How INT8 artifacts are made.

    Attributes:
        calibration: how an activation's clipping point is chosen: `minmax` (its largest magnitude), `percentile` (of its
            magnitudes), `mse` or `l3` (the point with the least squared or cubed rounding and clipping error). On trained
            networks `mse` keeps the average token best and `minmax` the worst one; `l3` is near the better of both.
        percentile: of magnitudes kept by `percentile`.
        images: how many training images calibrate.
        patch_embed: quantize the patch embedding's convolution too; often the most sensitive layer.
        skip: linear layers to keep in floating point, by name or pattern, e.g. ["blocks.0.*", "blocks.11.mlp.fc2"].
    """

    calibration: Literal["minmax", "percentile", "mse", "l3"] = "l3"
    percentile: float = 99.99
    images: int = 256
    patch_embed: bool = False
    skip: list[str] = []  # noqa: RUF012  pydantic copies it

    def problems(self) -> list[str]:
        found = []
        if not 50 < self.percentile <= 100:
            found.append(f"percentile must be above 50 and at most 100, got {self.percentile}")
        if self.images < 1:
            found.append(f"images must be at least 1, got {self.images}")
        return found


@dataclass(frozen=True)
class PlanEntry:
    """A quantized layer: name, `Linear` or `Conv`, activation's scale (real = int8 * scale), weight's shape and scales."""

    node: str
    kind: str
    scale: float
    weight_shape: tuple[int, ...]
    weight_scale_min: float
    weight_scale_max: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "weight_shape": list(self.weight_shape)}


class Histogram:
    """Counts of |x| in BINS equal bins over [0, range]; the range doubles by merging pairs of bins, so one pass is enough."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.range, self.peak = 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        magnitudes = np.abs(values, dtype=np.float32).ravel()
        peak = float(magnitudes.max(initial=0.0))
        if not np.isfinite(peak):
            raise UserError(
                "An activation is not finite on the calibration images; train the model again or lower the learning rate."
            )
        self.peak = max(self.peak, peak)
        if self.range == 0.0 < peak:  # a power of two: the bins do not depend on the order of the images
            self.range = 2.0 ** np.ceil(np.log2(peak))
            self.counts[0] = self.counts.sum()
        while self.range < peak:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.range *= 2
        self.counts += np.histogram(magnitudes, BINS, (0.0, self.range or 1.0))[0]

    def clip_point(self, config: QuantizeConfig) -> float:
        """The magnitude that becomes int8's 127."""
        if self.peak == 0.0:
            return 1.0  # a dead input: any scale represents it
        if config.calibration == "minmax":
            return self.peak
        edges = np.arange(1, BINS + 1) * (self.range / BINS)
        if config.calibration == "percentile":
            index = np.searchsorted(np.cumsum(self.counts), self.counts.sum() * (config.percentile / 100))
            return min(float(edges[min(index, BINS - 1)]), self.peak)
        centres = edges - self.range / BINS / 2
        candidates = self.peak * np.geomspace(1 / 64, 1, 193)
        steps = candidates[:, None] / LEVELS
        errors = np.abs(np.minimum(np.round(centres / steps), LEVELS) * steps - centres) ** EXPONENTS[config.calibration]
        return float(candidates[np.argmin(errors @ self.counts)])


def activation_scales(path: Path, images: Tensor, config: QuantizeConfig) -> dict[str, float]:
    """Run the FP32 graph on calibration images [n, 3, H, W] and choose a scale for the input of every layer to quantize.

    Raises:
        UserError: no images, or an activation that is not finite.
    """
    if not len(images):
        raise UserError("Quantization needs calibration images and got none; give the data section a training set.")
    model = load_graph(path)
    tensors = {n.name: n.input[0] for n in _chosen(model, config)}
    histograms = {tensor: Histogram() for tensor in tensors.values()}
    outputs = [t for t in histograms if t != INPUT]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(t) for t in outputs)
    session = onnxruntime.InferenceSession(serialize(model), quiet_options(), providers=["CPUExecutionProvider"])
    array = images[: config.images].float().numpy()
    start, batch = 0, 1  # the first image tells how many fit
    while start < len(array):
        chunk = array[start : start + batch]
        found = dict(zip(outputs, session.run(outputs, {INPUT: chunk}), strict=True)) if outputs else {}
        if INPUT in histograms:
            found[INPUT] = chunk
        for tensor, values in found.items():
            histograms[tensor].add(values)
        start += len(chunk)
        batch = max(1, min(32, CALIBRATION_BYTES * len(chunk) // max(1, sum(v.nbytes for v in found.values()))))
    return {name: histograms[tensor].clip_point(config) / LEVELS for name, tensor in tensors.items()}


def quantize(model: ModelProto, scales: dict[str, float], config: QuantizeConfig) -> tuple[ModelProto, list[PlanEntry]]:
    """Insert Q/DQ around the chosen layers of an FP32 or FP16 graph. Scales take the type of the tensor that they scale.

    Args:
        scales: activation scale by layer name, from `activation_scales` or `plan_scales`; FP32 and FP16 graphs share the names.

    Raises:
        UserError: a layer to quantize has no scale, or nothing is left to quantize.
    """
    out = ModelProto()
    out.CopyFrom(model)
    graph, stored = out.graph, constants(out)
    chosen = {n.output[0]: n for n in _chosen(out, config)}
    if missing := [n.name for n in chosen.values() if n.name not in scales]:
        raise UserError(
            f"The calibration holds no scale for {missing[0]}; export onnx-int8 again with the same quantize settings."
        )
    nodes: list[NodeProto] = []
    plan: list[PlanEntry] = []
    tensors: dict[str, TensorProto] = {}
    inputs: dict[str, str] = {}  # a tensor -> its dequantized twin; shared by layers that read the same
    weights: dict[str, tuple[str, tuple[float, float]]] = {}  # a weight -> its dequantized twin and its scales' range
    for node in graph.node:
        if node.output[0] in chosen:
            source, weight = node.input[0], stored[node.input[1]]
            scale = _scale_array(np.array(scales[node.name]), helper.tensor_dtype_to_np_dtype(weight.data_type))
            if weight.name not in weights:
                dequantize, new, extremes = _quantized_weight(node, weight)
                nodes.append(dequantize)
                tensors.update(new)
                weights[weight.name] = dequantize.output[0], extremes
            if source not in inputs:
                pair, new = _quantized_input(node, scale)
                nodes.extend(pair)
                tensors.update(new)
                inputs[source] = pair[1].output[0]
            node.input[0], (node.input[1], (low, high)) = inputs[source], weights[weight.name]
            plan.append(PlanEntry(node.name, _kind(node), float(scale), tuple(weight.dims), low, high))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    set_constants(out, [*graph.initializer, *tensors.values()])
    onnx.checker.check_model(out, full_check=True)
    assert quantized_linears(out) >= {e.node for e in plan}
    return out, plan


def plan_scales(plan: list[dict[str, Any]]) -> dict[str, float]:
    """Activation scales of a plan.json, to quantize another precision of the same student alike."""
    return {entry["node"]: float(entry["scale"]) for entry in plan}


def quiet_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return options


def _chosen(model: ModelProto, config: QuantizeConfig) -> list[NodeProto]:
    """The nodes that the settings say to quantize."""
    nodes = list(linear_nodes(model, PRODUCTS if config.patch_embed else LINEAR_OPS))
    if unknown := [p for p in config.skip if not any(fnmatchcase(n.name, p) for n in nodes)]:
        raise UserError(
            f"quantize.skip names {unknown[0]!r}, which no linear layer matches; layers are called like {nodes[0].name}."
        )
    chosen = [n for n in nodes if not any(fnmatchcase(n.name, p) for p in config.skip)]
    if not chosen:
        raise UserError("quantize.skip leaves no layer to quantize; drop the onnx-int8 target or shorten the list.")
    return chosen


def _scale_array(scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    floor = SMALLEST_HALF_SCALE if dtype == np.float16 else float(np.finfo(np.float32).tiny)
    return np.maximum(scale, floor).astype(dtype)


def _kind(node: NodeProto) -> str:
    return "Conv" if node.op_type == "Conv" else "Linear"


def _output_axis(node: NodeProto) -> int:
    """The axis of output channels in the weight: [K, N] for MatMul, [N, K] for a transposed Gemm, [N, C, h, w] for Conv."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def _quantized_weight(node: NodeProto, weight: TensorProto) -> tuple[NodeProto, dict[str, TensorProto], tuple[float, float]]:
    """int8 initialiser, its scales and zero points, the DequantizeLinear that feeds the layer, and the scales' range."""
    values = numpy_helper.to_array(weight)
    axis = _output_axis(node)
    wide = values.astype(np.float64)
    peak = np.abs(wide).max(tuple(i for i in range(values.ndim) if i != axis))
    scale = _scale_array(np.where(peak > 0, peak, 1.0) / LEVELS, values.dtype)
    shaped = np.expand_dims(scale.astype(np.float64), tuple(i for i in range(values.ndim) if i != axis))
    ints = np.clip(np.round(wide / shaped), -LEVELS, LEVELS).astype(np.int8)
    zeros = np.zeros(len(scale), np.int8)
    arrays = {f"{weight.name}_int8": ints, f"{weight.name}_scale": scale, f"zeros_{len(zeros)}": zeros}
    dequantize = helper.make_node("DequantizeLinear", list(arrays), [f"{weight.name}_dq"], name=f"{weight.name}_dq", axis=axis)
    return dequantize, _tensors(arrays), (float(scale.min()), float(scale.max()))


def _quantized_input(node: NodeProto, scale: np.ndarray) -> tuple[list[NodeProto], dict[str, TensorProto]]:
    """QuantizeLinear and DequantizeLinear for a layer's input."""
    name = f"{node.name}.input"
    arrays = {f"{name}_scale": scale, "zero": np.array(0, np.int8)}
    pair = [
        helper.make_node("QuantizeLinear", [node.input[0], *arrays], [f"{name}_q"], name=f"{name}_q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", *arrays], [f"{name}_dq"], name=f"{name}_dq"),
    ]
    return pair, _tensors(arrays)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, TensorProto]:
    return {name: numpy_helper.from_array(np.ascontiguousarray(a) if a.ndim else a, name) for name, a in arrays.items()}
