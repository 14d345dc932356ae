"""The plan: which matrix products of a ViT graph are quantized, which stay in floating point, and why.

Quantized are the inputs and weights of Linear layers, on request those of the patch embedding and of the attention products.
The rest never is: quantizing residual adds alone takes a ViT to 0 %, and LayerNorm, GELU and softmax need more range than 8 bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from distill.errors import UserError
from export.graphs.nodes import PRODUCTS, linear_nodes
from export.quantizing.quantize_config import ACTIVATION_GRID, QuantizeConfig

Kind = Literal["Linear", "Conv", "Product", "Class"]
THROUGH = ("Cast", "Identity", "Dropout", "Add", "Mul", "Div", "Where", "Sub", "QuantizeLinear", "DequantizeLinear")
KEEPS = {
    "residual adds": "quantizing them takes a ViT to 0 %: the residual stream's few huge channels leave no step for the others",
    "biases": "TensorRT refuses integer biases, and they cost nothing",
    "positions": "added once to every token; an 8-bit step would shift them all",
    "LayerNorm": "its sums of squares need more range than 8 bits",
    "softmax": "its exponentials span many orders of magnitude",
    "activation functions": "computed in floating point; what comes out is quantized where a Linear layer reads it",
}


@dataclass(frozen=True)
class PlanEntry:
    """A line of the plan.

    Attributes:
        layer: node name, or for kind `Class` what is never quantized and how often it occurs.
        kind: `Linear`, `Conv` or `Product` (of two activations: QK^T and AV); `Class`.
        decision: `int8`, `fp8`, `w8`, `w4` (weights only) or `keep`.
        why: one clause for people.
        input_scale: real = code * scale, of the activation; of a Product, of its left side.
        weight_shape, weight_scale_min, weight_scale_max: of a quantized weight; empty and null otherwise.
        mflops: 10^6 floating point operations (two a multiply-add) for one image; 0 if the graph does not tell.
    """

    layer: str
    kind: Kind
    decision: str
    why: str
    input_scale: float | None = None
    weight_shape: tuple[int, ...] = ()
    weight_scale_min: float | None = None
    weight_scale_max: float | None = None
    mflops: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "weight_shape": list(self.weight_shape), "mflops": round(self.mflops, 3)}

    @property
    def quantized(self) -> bool:
        return self.decision != "keep"


def plan_graph(model: ModelProto, config: QuantizeConfig, precision: str = "int8") -> list[PlanEntry]:
    """What becomes of every matrix product of a floating-point graph, in order of execution, then the classes that stay.

    Works on this program's graphs and on others' (layers are called by their nodes' names). Scales are not known yet.

    Raises:
        UserError: `quantize.keep` names what is not there, or nothing is left to quantize.
    """
    if any(n.op_type == "Constant" for n in model.graph.node):
        model = lift_constants(model)
    linears = {n.output[0] for n in linear_nodes(model, PRODUCTS)}  # a layer's own name may be empty in others' graphs
    shapes, dims = value_shapes(model), {t.name: tuple(t.dims) for t in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type in PRODUCTS and (n.output[0] in linears or n.op_type == "MatMul")]
    roles = attention_roles(model)
    unknown = [p for p in config.keep if not any(fnmatchcase(n.name, p) for n in products)]
    if unknown and products:
        raise UserError(
            f"quantize.keep names {unknown[0]!r}, which no layer matches; layers are called like "
            f"{next((n for n in products if n.op_type != 'Conv'), products[0]).name}."
        )
    entries = []
    for node in products:
        weight = dims.get(node.input[1], ()) if node.output[0] in linears else ()
        kind = _kind(node, node.output[0] in linears)
        decision, why = _decide(node, kind, weight, roles, config, precision)
        entries.append(PlanEntry(node.name, kind, decision, why, weight_shape=weight, mflops=_mflops(node, weight, shapes)))
    if not any(e.quantized for e in entries):
        raise UserError(
            f"Nothing is left to quantize to {precision}; drop the target or shorten quantize.keep."
            if config.keep
            else f"The graph has no layer that can be quantized to {precision}."
        )
    return entries + _classes(model)


def attention_roles(model: ModelProto) -> dict[str, str]:
    """Node name -> "qk" or "av": products of two activations whose result enters a softmax, or that read one."""
    constants = {t.name for t in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    roles: dict[str, str] = {}

    def up(tensor: str) -> NodeProto | None:
        node = makers.get(tensor)
        while node is not None and node.op_type in THROUGH:
            tensor = next((i for i in node.input if i and i not in constants and i in makers), "")
            node = makers.get(tensor)
        return node

    for node in model.graph.node:
        if node.op_type == "Softmax":
            source = up(node.input[0])
            if source is not None and source.op_type == "MatMul" and source.input[1] not in constants:
                roles[source.name] = "qk"
        elif node.op_type == "MatMul" and node.input[1] not in constants:
            source = up(node.input[0])
            if source is not None and source.op_type == "Softmax":
                roles[node.name] = "av"
    return roles


def is_transposed(node: NodeProto) -> bool:
    """Whether a Gemm's weight is [N, K]."""
    return any(a.name == "transB" and a.i for a in node.attribute)


def _kind(node: NodeProto, constant: bool) -> Kind:
    if node.op_type == "Conv":
        return "Conv"
    return "Linear" if constant else "Product"


def _decide(
    node: NodeProto, kind: Kind, weight: tuple[int, ...], roles: dict[str, str], config: QuantizeConfig, precision: str
) -> tuple[str, str]:
    """(decision, why) of one matrix product."""
    if any(fnmatchcase(node.name, p) for p in config.keep):
        return "keep", "the recipe keeps it in floating point"
    if kind == "Product":
        if node.name not in roles:
            return "keep", "a product of two activations that is not attention's"
        if precision not in ACTIVATION_GRID:
            return "keep", "it has no weights"
        if config.attention == "qk" and roles[node.name] == "av":
            return "keep", "attention: qk quantizes QK^T alone"
        if not config.attention:
            return "keep", "attention stays in floating point, where the fused kernels are; attention: true or qk quantizes it"
        return precision, "queries and keys" if roles[node.name] == "qk" else "attention weights and values"
    if kind == "Conv":
        if precision == "w4":
            return "keep", "4-bit blocks lie along the inputs of a matrix; a convolution has none"
        if not config.patch_embed:
            return "keep", "the patch embedding is often the most sensitive layer; patch_embed: true quantizes it"
        return precision, "the patch embedding, as the recipe asks"
    inputs = weight[1 if is_transposed(node) else 0] if weight else 0
    if precision == "w4" and inputs % config.block:
        return "keep", f"its {inputs} inputs do not divide into blocks of {config.block}"
    if precision == "w4" and is_transposed(node):
        return "keep", "4-bit blocks of a transposed weight have no kernel"
    return precision, "a Linear layer: its input and weight" if precision in ACTIVATION_GRID else "a Linear layer: its weight"


def _classes(model: ModelProto) -> list[PlanEntry]:
    """One line for each sort of node that is never quantized."""
    counts = dict.fromkeys(KEEPS, 0)
    for name in _class_of_nodes(model):
        counts[name] += 1
    return [PlanEntry(f"{name} ({counts[name]})", "Class", "keep", why) for name, why in KEEPS.items() if counts[name]]


def _class_of_nodes(model: ModelProto) -> Iterator[str]:
    constants = {t.name: t for t in model.graph.initializer}
    products = {n.output[0] for n in model.graph.node if n.op_type in PRODUCTS}
    plain = {"LayerNormalization": "LayerNorm", "Softmax": "softmax", "Gelu": "activation functions"}
    plain |= {"Erf": "activation functions", "Sigmoid": "activation functions", "Relu": "activation functions"}
    for node in model.graph.node:
        if node.op_type in plain:
            yield plain[node.op_type]
        elif node.op_type == "Add":
            fixed = [i for i in node.input if i in constants]
            if not fixed:
                yield "residual adds"
            elif any(i in products for i in node.input):
                yield "biases"
            elif len(constants[fixed[0]].dims) > 1:
                yield "positions"


def value_shapes(model: ModelProto) -> dict[str, list[int]]:
    """Shapes of the graph's values for one image, as far as inference finds them."""
    light = ModelProto()
    light.CopyFrom(model)
    for value in light.graph.input:
        dims = value.type.tensor_type.shape.dim
        if len(dims) and not dims[0].dim_value:
            dims[0].dim_value = 1
    try:
        graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except onnx.shape_inference.InferenceError:
        return {}
    values = (*graph.input, *graph.value_info)
    found = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    return {name: shape for name, shape in found.items() if shape and all(shape)}


def _mflops(node: NodeProto, weight: tuple[int, ...], shapes: dict[str, list[int]]) -> float:
    out = shapes.get(node.output[0])
    if out is None:
        return 0.0
    size = 1
    for d in out:
        size *= d
    if node.op_type == "Conv":
        depth = weight[1] * weight[2] * weight[3] if len(weight) == 4 else 0
    elif weight:
        depth = weight[1 if is_transposed(node) else 0]
    else:
        depth = shapes.get(node.input[0], [0])[-1]
    return 2 * size * depth / 1e6


def lift_constants(model: ModelProto) -> ModelProto:
    """A copy whose Constant nodes are initialisers: exporters differ in how they store the same weight."""
    out = ModelProto()
    out.CopyFrom(model)
    kept = []
    for node in out.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensor = TensorProto()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
            out.graph.initializer.append(tensor)
        else:
            kept.append(node)
    if len(kept) < len(out.graph.node):
        del out.graph.node[:]
        out.graph.node.extend(kept)
    return out
