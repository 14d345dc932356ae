"""Rules on Q/DQ: what TensorRT's parser refuses, what ruins a ViT's accuracy, and what makes a quantized file slow or large.

Sources: TensorRT's documentation "Working with Quantized Types"; its parser's own refusals, seen with TensorRT-RTX 1.7; for residual
adds TinyNeuralNetwork#204 and onnxsim#1742.
"""

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto

from export.graphs.anatomy import DEQUANTIZE, LAYOUT, QUANTIZE, Anatomy, label
from export.graphs.split_qkv import quantized_qkv
from export.linting.lint_rules import Case, Hit, rule, rules_of

NORMS = {
    "LayerNormalization",
    "SimplifiedLayerNormalization",
    "RMSNormalization",
    "InstanceNormalization",
    "GroupNormalization",
}
WEIGHTED = {"MatMul", "Gemm", "Conv", "ConvTranspose", "FusedMatMul"}
INT8_ATTENTION_TOKENS = 512
# Rounding a half-precision scale below this errs by more than 1/128, as much as rounding to int8 does.
FAITHFUL_HALF_SCALE = 2.0**-18


@rule(
    "uint8-zero-point",
    "error",
    reason="TensorRT's parser refuses asymmetric quantization: INT8 must be signed, its zero points 0",
    cure="Quantize symmetrically to signed INT8 (onnxruntime: ActivationSymmetric, WeightSymmetric and QuantType.QInt8).",
    tensorrt_only=True,
)
def uint8_zero_point(case: Case) -> Iterator[Hit]:
    """Quantization with unsigned integers or a zero point other than 0."""
    anatomy = case.anatomy
    for node in _qdq(anatomy):
        element = anatomy.types[node.input[0] if node.op_type in DEQUANTIZE else node.output[0]]
        if element in ("UINT8", "UINT4", "UINT16"):
            yield Hit(label(node), f"{label(node)} quantizes to {element}", "unsigned")
            continue
        zero = anatomy.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is not None and np.any(zero.astype(np.float32) != 0):
            first = zero.ravel()[np.flatnonzero(zero.astype(np.float32).ravel())[0]]
            yield Hit(label(node), f"{label(node)} has zero point {first}", "zero point")


@rule(
    "int32-bias",
    "error",
    reason="TensorRT's parser refuses a quantized bias; a bias costs nothing in floating point",
    cure="Keep biases in floating point (onnxruntime: extra_options={'QuantizeBias': False}).",
    tensorrt_only=True,
)
def int32_bias(case: Case) -> Iterator[Hit]:
    """A bias that is stored as INT32 and dequantized."""
    for node in case.anatomy.nodes:
        if node.op_type in DEQUANTIZE and case.anatomy.types[node.input[0]] == "INT32":
            yield Hit(label(node), f"{label(node)} dequantizes INT32")


@rule(
    "quantized-residual",
    "error",
    reason="the residual stream of a ViT holds outliers hundreds of times its typical value, and 8 bits take its accuracy to chance",
    cure="Take the Q/DQ pairs off the inputs of residual Adds; quantize only the inputs and weights of linear layers.",
)
def quantized_residual(case: Case) -> Iterator[Hit]:
    """An Add of two activations, at least one of them quantized."""
    anatomy = case.anatomy
    masks = {id(n) for n in _before_softmax(anatomy)}
    for node in anatomy.nodes:
        if node.op_type not in ("Add", "Sum", "QLinearAdd") or id(node) in masks or node.output[0] in anatomy.constant:
            continue
        if node.op_type == "QLinearAdd":
            yield Hit(label(node), f"the residual Add {label(node)} runs in 8 bits")
            continue
        if len([i for i in node.input if i not in anatomy.constant]) < 2:
            continue
        if any((q := anatomy.quantizer(i)) is not None and not q.constant for i in node.input):
            yield Hit(label(node), f"the residual Add {label(node)} reads 8 bits")


@rule(
    "quantized-norm",
    "warning",
    reason="its input is the residual stream, whose outliers leave the other channels a few of the 256 steps",
    cure="Take the Q/DQ pair off the norm's input; quantize what it makes, the input of the linear layer.",
)
def quantized_norm(case: Case) -> Iterator[Hit]:
    """A LayerNorm whose input is quantized."""
    yield from _reads_quantized(case.anatomy, NORMS)


@rule(
    "quantized-softmax",
    "warning",
    reason="the exponential multiplies rounding errors of the scores, and a Q/DQ pair there breaks fused attention",
    cure="Take the Q/DQ pair off the softmax's input.",
)
def quantized_softmax(case: Case) -> Iterator[Hit]:
    """A softmax whose input is quantized."""
    yield from _reads_quantized(case.anatomy, {"Softmax"})


@rule(
    "quantized-gelu",
    "warning",
    reason="8 bits between a linear layer and its activation save nothing and lose the small values that matter there",
    cure="Take the Q/DQ pair off the activation's input; quantize what it makes, the input of the second layer.",
)
def quantized_gelu(case: Case) -> Iterator[Hit]:
    """A GELU whose input is quantized."""
    yield from _reads_quantized(case.anatomy, {"Gelu", "FastGelu", "QuickGelu", "Erf", "BiasGelu"})


@rule(
    "quantized-positions",
    "warning",
    reason="every layer reads it, and its rounding is added to every token",
    cure="Take the Q/DQ pair off the Add of the position embedding.",
)
def quantized_positions(case: Case) -> Iterator[Hit]:
    """An Add of a position embedding with a quantized side."""
    anatomy = case.anatomy
    for node in anatomy.nodes:
        if node.op_type != "Add" or node.output[0] in anatomy.constant:
            continue
        tables = [i for i in node.input if i in anatomy.constant and _is_table(anatomy, i)]
        if tables and any(anatomy.quantizer(i) is not None for i in node.input):
            yield Hit(label(node), f"the Add of positions {label(node)} reads 8 bits")


@rule(
    "missing-scale",
    "error",
    reason="without it the integers mean nothing, and no runtime loads the graph",
    cure="Quantize again; a tool that edits the graph has dropped the scale.",
)
def missing_scale(case: Case) -> Iterator[Hit]:
    """A QuantizeLinear or DequantizeLinear without a scale."""
    for node in _qdq(case.anatomy):
        if len(node.input) < 2 or not node.input[1]:
            yield Hit(label(node), f"{label(node)} has no scale")
        elif node.input[1] in case.anatomy.undefined:
            yield Hit(label(node), f"the scale {node.input[1]} of {label(node)} is nowhere in the file")


@rule(
    "bad-scale",
    "error",
    reason="a scale is a positive finite number: any other gives zeros, flipped signs, infinities or NaN",
    cure="Calibrate again; a dead or overflowing activation gave this scale.",
)
def bad_scale(case: Case) -> Iterator[Hit]:
    """A scale that is zero, negative, infinite or NaN."""
    for node, scale in _scales(case.anatomy):
        values = scale.astype(np.float32)
        if not np.all(np.isfinite(values) & (values > 0)):
            worst = values.ravel()[np.flatnonzero(~(np.isfinite(values) & (values > 0)).ravel())[0]]
            yield Hit(label(node), f"{label(node)} has scale {worst:g}")


@rule(
    "tiny-half-scale",
    "warning",
    reason="FLOAT16 keeps fewer than 7 bits of a number below 4e-6, so rounding the scale errs as much as rounding to INT8",
    cure="Keep these scales in FLOAT, or floor them: values that small are as good as zero.",
)
def tiny_half_scale(case: Case) -> Iterator[Hit]:
    """A FLOAT16 scale so small that it is imprecise."""
    for node, scale in _scales(case.anatomy):
        if scale.dtype == np.float16 and np.any((scale > 0) & (scale < FAITHFUL_HALF_SCALE)):
            yield Hit(label(node), f"{label(node)} has the FLOAT16 scale {scale[scale > 0].min():.1g}")


@rule(
    "scale-length",
    "error",
    reason="a scale for each channel needs one number for each",
    cure="Quantize again, along the axis of the output channels.",
)
def scale_length(case: Case) -> Iterator[Hit]:
    """Per-channel scales whose number is not that of the channels."""
    anatomy = case.anatomy
    for node, scale in _scales(anatomy):
        shape = anatomy.shapes.get(node.input[0])
        if scale.size == 1 or shape is None or anatomy.attribute(node, "block_size", 0):
            continue
        axis = anatomy.attribute(node, "axis", 1)
        if not -len(shape) <= axis < len(shape):
            yield Hit(label(node), f"{label(node)} names axis {axis} of a tensor of {len(shape)}")
        elif scale.ndim != 1 or scale.size != shape[axis]:
            yield Hit(label(node), f"{label(node)} has {scale.size} scales for {shape[axis]} channels")


@rule(
    "per-channel-activation",
    "error",
    reason="TensorRT quantizes activations with one scale only; the sum over channels of a product cannot be scaled by channel",
    cure="Quantize activations per tensor; move outlier channels into the weights (SmoothQuant) if that costs accuracy.",
    tensorrt_only=True,
)
def per_channel_activation(case: Case) -> Iterator[Hit]:
    """An activation with a scale for each channel."""
    anatomy = case.anatomy
    for node, scale in _scales(anatomy):
        if node.op_type in QUANTIZE and scale.size > 1 and node.input[0] not in anatomy.constant:
            yield Hit(label(node), f"{label(node)} quantizes an activation with {scale.size} scales")


@rule(
    "per-tensor-weight",
    "warning",
    reason="rows of a ViT's weights differ ten times in size, and one scale leaves the small ones a few steps",
    cure="Quantize weights per output channel.",
)
def per_tensor_weight(case: Case) -> Iterator[Hit]:
    """A weight with a single scale."""
    anatomy = case.anatomy
    for node in anatomy.nodes:
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            continue
        weight = anatomy.quantizer(node.input[1])
        if weight is None or not weight.constant or weight.family != "INT8" or len(weight.dequantize.input) < 2:
            continue
        size = np.prod(anatomy.shapes.get(weight.dequantize.input[1], (0,)))
        if size == 1 and max(anatomy.shapes.get(weight.dequantize.input[0], (1,))) > 1:
            yield Hit(label(node), f"the weight of {label(node)} has one scale")


@rule(
    "mismatched-scales",
    "error",
    reason="what is quantized by one scale and read back by another is multiplied by their ratio",
    cure="Give a DequantizeLinear the scale and zero point of its QuantizeLinear.",
)
def mismatched_scales(case: Case) -> Iterator[Hit]:
    """A Q/DQ pair with two scales or zero points."""
    anatomy = case.anatomy
    for node in anatomy.nodes:
        made = anatomy.made.get(node.input[0]) if node.op_type in DEQUANTIZE and node.input else None
        if made is None or made.op_type not in QUANTIZE:
            continue
        for at, what in ((1, "scale"), (2, "zero point")):
            mine, its = (anatomy.value(n.input[at]) if len(n.input) > at else None for n in (node, made))
            if mine is not None and its is not None and not _same(mine, its):
                yield Hit(label(node), f"{label(node)} has another {what} than {label(made)}")
                break


@rule(
    "float-weight-behind-q",
    "warning",
    reason="the file holds the weight in floating point and quantizes it when it loads: it is not smaller, and loading takes longer",
    cure="Fold the QuantizeLinear: store the quantized weight with only a DequantizeLinear behind it.",
)
def float_weight_behind_q(case: Case) -> Iterator[Hit]:
    """A weight that is stored in floating point in front of a QuantizeLinear."""
    anatomy = case.anatomy
    for node in anatomy.nodes:
        if node.op_type in QUANTIZE and node.input and node.input[0] in anatomy.constant:
            megabytes = np.prod(anatomy.shapes.get(node.input[0], (0,))) * 4 / 1e6
            yield Hit(label(node), f"the weight {node.input[0]} is stored as {megabytes:.1f} MB of floats")


@rule(
    "int8-attention-tokens",
    "warning",
    reason="TensorRT has no fused INT8 attention above 512 tokens: the quantized products run apart, slower than fused FLOAT16",
    cure="Leave attention products in floating point at this resolution, or use FP8.",
    tensorrt_only=True,
)
def int8_attention_tokens(case: Case) -> Iterator[Hit]:
    """Quantized attention over more than 512 tokens."""
    types = {p.name: p.type for p in case.proof.products}
    for block in case.attention:
        if types.get(block.qk) == "INT8" and (block.tokens or 0) > INT8_ATTENTION_TOKENS:
            yield Hit(block.qk, f"the attention {block.qk} is INT8 over {block.tokens} tokens")


@rule(
    "quantized-qkv-cut",
    "note",
    reason="TensorRT-RTX moves the cuts into the weight and, where that has a scale for each channel, runs the product in floating point",
    cure="Make it three layers for TensorRT-RTX (decant's rtx targets may: export.graphs.split_qkv), or give its weight one scale.",
    tensorrt_only=True,
)
def quantized_qkv_cut(case: Case) -> Iterator[Hit]:
    """A quantized QKV layer whose output is cut into Q, K and V."""
    for layer, _ in quantized_qkv(case.anatomy):
        yield Hit(label(layer), f"the 8-bit output of {label(layer)} is cut into Q, K and V")


@rule(
    "quantized-patch-embedding",
    "note",
    reason="it is among the most sensitive layers and holds about 1 % of a ViT's FLOPs",
    cure="Keep it in floating point unless a measurement says that it may be quantized.",
)
def quantized_patch_embedding(case: Case) -> Iterator[Hit]:
    """A quantized convolution at the input."""
    for product in case.proof.products:
        if product.kind == "conv" and product.type == "INT8":
            yield Hit(product.name, f"the convolution {product.name} is INT8")
            return


@rule(
    "dynamic-quantization",
    "error",
    reason="TensorRT cannot run integers with scales that are computed while it runs",
    cure="Calibrate, and write static scales as Q/DQ pairs.",
    tensorrt_only=True,
)
def dynamic_quantization(case: Case) -> Iterator[Hit]:
    """Activation scales that are computed at run time."""
    ops = {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    for node in case.anatomy.nodes:
        if node.op_type in ops:
            yield Hit(label(node), f"{label(node)} is a {node.op_type}")


def _qdq(anatomy: Anatomy) -> Iterator[NodeProto]:
    for node in anatomy.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input:
            yield node


def _scales(anatomy: Anatomy) -> Iterator[tuple[NodeProto, np.ndarray]]:
    for node in _qdq(anatomy):
        if len(node.input) > 1 and (scale := anatomy.value(node.input[1])) is not None:
            yield node, scale


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.ravel().astype(np.float32), b.ravel().astype(np.float32), equal_nan=True)


def _reads_quantized(anatomy: Anatomy, ops: set[str]) -> Iterator[Hit]:
    for node in anatomy.nodes:
        if node.op_type not in ops or node.output[0] in anatomy.constant:
            continue
        source = anatomy.above(node.input[0], {"Cast", "Identity", "Div", "Mul"} if node.op_type == "Erf" else LAYOUT)
        made = anatomy.made.get(source)
        if made is not None and made.op_type in DEQUANTIZE and (q := anatomy.quantizer(source)) is not None and not q.constant:
            yield Hit(label(node), f"the input of {label(node)} ({node.op_type}) is {q.element}", node.op_type)


def _before_softmax(anatomy: Anatomy) -> Iterator[NodeProto]:
    """Adds of masks: they lead to a softmax and nowhere else."""
    for node in anatomy.nodes:
        if node.op_type != "Add":
            continue
        readers = anatomy.readers[node.output[0]]
        while len(readers) == 1 and readers[0].op_type in {"Cast", "Identity", *QUANTIZE, *DEQUANTIZE}:
            readers = anatomy.readers[readers[0].output[0]]
        if readers and all(r.op_type == "Softmax" for r in readers):
            yield node


def _is_table(anatomy: Anatomy, name: str) -> bool:
    """Whether a constant is a table of tokens by channels, not a bias."""
    shape = anatomy.shapes.get(name, ())
    return len(shape) >= 2 and shape[-1] > 1 and shape[-2] > 1


RULES = rules_of(globals())
