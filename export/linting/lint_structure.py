"""Rules on the graph's form: operators newer than its opset, norms and attention that no fused kernel matches, positions that are
interpolated while it runs, axes that TensorRT cannot plan for, data that is not there.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto

from export.graphs.anatomy import DEQUANTIZE, FAMILY, QUANTIZE, Anatomy, label, upstream
from export.linting.lint_rules import Case, Hit, rule, rules_of

SINCE = {"LayerNormalization": 17, "GroupNormalization": 18, "Gelu": 20, "Attention": 23, "RMSNormalization": 23, "Swish": 24}
HALF_SCALES, FP8, BLOCKS = 19, 19, 21
RESIZES = {"Resize", "Upsample", "GridSample"}
SHAPE_NODES = 12
KNOWN_DOMAINS = {"", "ai.onnx", "trt"}
POSITION_STEPS = 40


@rule(
    "invalid-graph",
    "error",
    reason="it breaks ONNX's own rules, so runtimes refuse it or guess",
    cure="Export again; if a tool edited the graph, look at what it left there.",
)
def invalid_graph(case: Case) -> Iterator[Hit]:
    """A graph that the ONNX checker refuses."""
    anatomy = case.anatomy
    if any(t.external_data for t in anatomy.stored.values()):
        return  # the checker wants the data beside the file
    try:
        onnx.checker.check_model(anatomy.model)
    except Exception as e:  # ValidationError, or protobuf's for more than 2 GB
        said = " ".join(str(e).split("\n==>")[0].split())
        yield Hit(case.name, f"the ONNX checker says: {said[:200]}")


@rule(
    "external-data-missing",
    "error",
    reason="the weights are in another file, and without it the graph is empty",
    cure="Put the file beside the ONNX file, under the name that is stored in it, or save the model with its weights inside.",
)
def external_data_missing(case: Case) -> Iterator[Hit]:
    """Weights in a file that is not there, or shorter than it should be."""
    for tensor in case.anatomy.stored.values():
        if not case.anatomy.has_data(tensor):
            place = next((e.value for e in tensor.external_data if e.key == "location"), "?")
            yield Hit(tensor.name, f"the weights {tensor.name} should be in {place}, which is missing or too short", place)


@rule(
    "opset-too-old",
    "error",
    reason="a runtime that reads the graph by its opset does not know this, and refuses it or takes it for something else",
    cure="Export with the opset that is named here; decant uses 20 and up.",
)
def opset_too_old(case: Case) -> Iterator[Hit]:
    """Something newer than the opset that the file declares."""
    anatomy = case.anatomy
    have = anatomy.opsets.get("", 0)
    for node in anatomy.nodes:
        if node.domain in ("", "ai.onnx") and (need := _needed(anatomy, node)) is not None and have < need[0]:
            yield Hit(label(node), f"{need[1]} needs opset {need[0]}, the file declares {have} ({label(node)})", need[1])


@rule(
    "unfused-layernorm",
    "warning",
    reason="nine small kernels stand for one, and in half precision its squares overflow; TensorRT fuses LayerNormalization from opset 17",
    cure="Export with opset 17 or newer.",
)
def unfused_layernorm(case: Case) -> Iterator[Hit]:
    """A LayerNorm that is spelt out as ReduceMean, Pow, Sqrt and Div."""
    for node in case.anatomy.nodes:
        if node.op_type == "Div" and _is_spelt_out_norm(case.anatomy, node):
            yield Hit(label(node), f"{label(node)} ends a LayerNorm of separate nodes")


@rule(
    "unfused-attention",
    "error",
    reason="no fused attention kernel matches, so all heads' [N, N] scores go through memory",
    cure="Export attention as QK^T, an added mask if any, one Softmax over the last axis, and the product with V; nothing else.",
    tensorrt_only=True,
)
def unfused_attention(case: Case) -> Iterator[Hit]:
    """An attention with something in it that no fused kernel takes."""
    for block in case.attention:
        if block.problem is not None:
            yield Hit(block.softmax, f"in the attention around {block.softmax}, {block.problem}")


@rule(
    "attention-scale",
    "warning",
    reason="TensorRT's documentation asks for Q or K scaled before their product, and unscaled scores overflow FLOAT16 sooner",
    cure="Multiply Q by the scale before QK^T (timm: fused_attn=False; or fold it into Q's weights).",
    tensorrt_only=True,
)
def attention_scale(case: Case) -> Iterator[Hit]:
    """Attention scores that are scaled after QK^T."""
    for block in case.attention:
        if block.problem is None and block.scale == "after":
            yield Hit(block.qk, f"the scores of {block.qk} are scaled after the product")


@rule(
    "dynamic-position-interpolation",
    "error",
    reason="exported resizes have given other positions than the framework's (dinov2#19, lightly-train#250), and it is done at every call",
    cure="Interpolate the position embedding before the export, once for each resolution, and export fixed sizes.",
)
def dynamic_position_interpolation(case: Case) -> Iterator[Hit]:
    """A position embedding that is resized while the graph runs."""
    anatomy = case.anatomy
    for node in anatomy.nodes:
        if node.op_type in RESIZES and node.input[0] in anatomy.constant and anatomy.types[node.output[0]] != "INT64":
            yield Hit(label(node), f"{label(node)} resizes stored values at run time")
        elif node.op_type == "Add" and (table := _gathered_positions(anatomy, node)) is not None:
            yield Hit(label(node), f"{label(node)} adds positions that {label(table)} picks by the input's size")


@rule(
    "dynamic-spatial-axes",
    "warning",
    reason="TensorRT plans, and positions fit, one resolution; only the batch may be open without cost",
    cure="Export with fixed height and width, one file for each resolution, and only the batch dynamic.",
)
def dynamic_spatial_axes(case: Case) -> Iterator[Hit]:
    """An image input whose height or width is open."""
    for name in _open_sizes(case):
        yield Hit(name, f"the input {name} leaves its height or width open")


def _open_sizes(case: Case) -> list[str]:
    found = [(i.name, list(i.type.tensor_type.shape.dim)[2:]) for i in _images(case.anatomy)]
    return [name for name, dims in found if any(not d.HasField("dim_value") or d.dim_value <= 0 for d in dims)]


@rule(
    "fixed-batch",
    "note",
    reason="it cannot serve more images at once, which is where a GPU gains most",
    cure="Export with a dynamic batch axis.",
)
def fixed_batch(case: Case) -> Iterator[Hit]:
    """An image input of one batch size."""
    for info in _images(case.anatomy):
        first = info.type.tensor_type.shape.dim[0]
        if first.HasField("dim_value") and first.dim_value > 0:
            yield Hit(info.name, f"the input {info.name} takes batches of {first.dim_value} only")


@rule(
    "shape-arithmetic",
    "note",
    reason="each is a step on the host between kernels, though the sizes are known",
    cure="Fold them with onnxslim, or export with fixed sizes from torch.export (dynamo=True).",
)
def shape_arithmetic(case: Case) -> Iterator[Hit]:
    """Many nodes that compute shapes at run time."""
    shapes = [n for n in case.anatomy.nodes if n.op_type == "Shape"]
    if len(shapes) > SHAPE_NODES and not _open_sizes(case):
        yield Hit(label(shapes[0]), f"the graph reads shapes {len(shapes)} times")


@rule(
    "foreign-operator",
    "error",
    reason="TensorRT's parser knows only ONNX's own operators, and its plugins",
    cure="Export without the optimizer that put it there (onnxruntime's contrib operators come from its graph optimization).",
    tensorrt_only=True,
)
def foreign_operator(case: Case) -> Iterator[Hit]:
    """An operator of another domain than ONNX's."""
    for node in case.anatomy.nodes:
        if node.domain not in KNOWN_DOMAINS and not node.domain.startswith("ai.onnx"):
            yield Hit(label(node), f"{label(node)} is {node.domain}.{node.op_type}", f"{node.domain}.{node.op_type}")


def _needed(anatomy: Anatomy, node: NodeProto) -> tuple[int, str] | None:
    """The opset that a node needs, and for what."""
    if node.op_type in SINCE:
        return SINCE[node.op_type], node.op_type
    if node.op_type not in QUANTIZE | DEQUANTIZE or len(node.input) < 2:
        return None
    stored = anatomy.types[node.input[0] if node.op_type in DEQUANTIZE else node.output[0]]
    if FAMILY.get(stored) in ("INT4", "FP4") or anatomy.attribute(node, "block_size", 0):
        return BLOCKS, "quantization in blocks or to 4 bits"
    if FAMILY.get(stored) == "FP8":
        return FP8, "quantization to FP8"
    if anatomy.types[node.input[1]] in ("FLOAT16", "BFLOAT16"):
        return HALF_SCALES, "a half-precision scale"
    return (13, "a scale for each channel") if np.prod(anatomy.shapes.get(node.input[1], ())) > 1 else None


def _is_spelt_out_norm(anatomy: Anatomy, node: NodeProto) -> bool:
    """x - mean(x), divided by sqrt(mean((x - mean(x))^2) + eps)."""
    above, root = (anatomy.made.get(anatomy.above(i, {"Cast", "Identity"})) for i in node.input[:2])
    if above is None or root is None or above.op_type != "Sub" or root.op_type != "Sqrt":
        return False
    ops = {n.op_type for n in upstream(anatomy, root.input[0], {"Add", "ReduceMean", "Pow", "Mul", "Cast", "Identity"})}
    return "ReduceMean" in ops and bool(ops & {"Pow", "Mul"})


def _gathered_positions(anatomy: Anatomy, node: NodeProto) -> NodeProto | None:
    """The Gather (as exporters write an interpolation without Resize) in what an Add adds to the tokens, if it only depends on shapes."""
    for name in node.input:
        rank = len(anatomy.shapes.get(name, (0, 0, 0)))
        if name not in anatomy.constant or name in anatomy.stored or rank < 2 or node.output[0] in anatomy.constant:
            continue
        for steps, above in enumerate(upstream(anatomy, name)):
            if steps > POSITION_STEPS:
                break
            indexed = above.op_type in ("Gather", "GatherND", "GatherElements") and above.input[1] not in anatomy.stored
            if indexed and anatomy.types[above.output[0]].startswith(("FLOAT", "BFLOAT")):
                return above
    return None


def _images(anatomy: Anatomy) -> Iterator[onnx.ValueInfoProto]:
    for info in anatomy.graph.input:
        if info.name not in anatomy.stored and len(info.type.tensor_type.shape.dim) == 4:
            yield info


RULES = rules_of(globals())
