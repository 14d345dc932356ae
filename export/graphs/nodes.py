"""Reading ONNX graphs: files, constants, layers by name, element types, and the check that a graph is in the precision of its name."""

import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from distill.errors import GateFailed, UserError

INPUT, OUTPUTS = "images", ("cls", "patches")
LINEAR_OPS = ("MatMul", "Gemm")
PRODUCTS = (*LINEAR_OPS, "Conv")
TYPE_OF = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# What a layer's input and weight are dequantized from. Weight-only precisions leave the input alone.
QUANTIZED = {"int8": ("INT8", "UINT8"), "fp8": ("FLOAT8E4M3FN",)}
WEIGHT_ONLY = {"w8": ("INT8", "UINT8"), "w4": ("INT4", "UINT4")}
KEPT = "decant.keep_float"  # the property of a graph that lists its layers in FP32
SMALL = 64  # elements: shapes and indices, which shape inference reads


def load_graph(path: Path) -> ModelProto:
    """Read an ONNX file.

    Raises:
        UserError: it is not one.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as e:  # protobuf's DecodeError has no stable home
        raise UserError(f"{path} is not an ONNX file ({type(e).__name__}); run the export stage again.") from e


def serialize(model: ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def constants(model: ModelProto) -> dict[str, TensorProto]:
    return {t.name: t for t in model.graph.initializer}


def set_constants(model: ModelProto, tensors: list[TensorProto]) -> None:
    """Replace the initialisers by those of `tensors` that a node reads, sorted by name (their order means nothing)."""
    used = {i for n in model.graph.node for i in n.input}
    kept = sorted((t for t in tensors if t.name in used), key=lambda t: t.name)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def linear_nodes(model: ModelProto, ops: tuple[str, ...] = LINEAR_OPS) -> Iterator[NodeProto]:
    """MatMul and Gemm nodes whose second input is a constant, dequantized, cast or neither: the Linear layers, in order of execution.

    With "Conv" in `ops` the patch embedding too.
    """
    known = set(constants(model)) | {n.output[0] for n in model.graph.node if n.op_type == "Constant"}
    for node in model.graph.node:
        if node.op_type in ("DequantizeLinear", "Cast") and node.input[0] in known:
            known.add(node.output[0])
        elif node.op_type in ops and node.input[1] in known:
            yield node


def element_types(model: ModelProto) -> dict[str, str]:
    """Element type of every value in the graph by name, e.g. {"images": "FLOAT"}, found by strict shape inference."""
    inferred = onnx.shape_inference.infer_shapes(_without_weights(model), strict_mode=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    types = {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in model.graph.initializer}
    return {name: TensorProto.DataType.Name(t) for name, t in types.items()}


def type_counts(model: ModelProto) -> dict[str, int]:
    """How many matrix products run in which type: INT8 or FP8 where both inputs are dequantized from it, else the element type."""
    types = element_types(model)
    eighths = {name: kind.upper() for kind in QUANTIZED for name in quantized_linears(model, QUANTIZED[kind])}
    counts = Counter(eighths.get(n.name, types[n.output[0]]) for n in model.graph.node if n.op_type in PRODUCTS)
    return dict(sorted(counts.items()))


def quantized_linears(model: ModelProto, kinds: tuple[str, ...] = QUANTIZED["int8"], weights_only: bool = False) -> set[str]:
    """Names of the MatMul, Gemm and Conv nodes whose inputs (only the weight with `weights_only`) are dequantized from one of these
    element types; 8-bit integers by default.
    """
    types = element_types(model)
    sources = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and types[n.input[0]] in kinds}
    products = (n for n in model.graph.node if n.op_type in PRODUCTS)
    return {n.name for n in products if sources.issuperset(n.input[1:2] if weights_only else n.input[:2])}


def kept_float(model: ModelProto) -> list[str]:
    """The layers that an FP16 or BF16 graph says it computes in FP32; empty for every other graph."""
    found = [p.value for p in model.metadata_props if p.key == KEPT]
    return [str(name) for name in json.loads(found[0])] if found else []


def verify_precision(model: ModelProto, precision: str, name: str = "the graph") -> None:
    """Check that the graph computes in the precision that its file name is going to claim.

    fp32, fp16, bf16: every matrix product (linear layers, attention, patch embedding) has that element type, but for the layers that the
    graph itself lists as kept in FP32, and never all of them.
    int8, fp8: some products have that type on both sides. w8, w4: some have such a weight.

    Raises:
        GateFailed: it does not.
    """
    if precision in QUANTIZED or precision in WEIGHT_ONLY:
        both = precision in QUANTIZED
        if not quantized_linears(model, (QUANTIZED if both else WEIGHT_ONLY)[precision], weights_only=not both):
            kind, sides = precision.replace("w", "int") if not both else precision, "inputs and weights" if both else "weights"
            raise GateFailed(f"{name} is called {precision} but none of its linear layers has {kind} {sides}.")
        return
    want, types = TensorProto.DataType.Name(TYPE_OF[precision]), element_types(model)
    products = [n for n in model.graph.node if n.op_type in PRODUCTS]
    excused = kept_products(model, kept_float(model)) if precision != "fp32" else set()
    wrong = [n for n in products if types[n.output[0]] != want and not (n.name in excused and types[n.output[0]] == "FLOAT")]
    if wrong or not any(types[n.output[0]] == want for n in products):
        first = f"{wrong[0].name or wrong[0].op_type} is {types[wrong[0].output[0]]}" if wrong else "there are none"
        raise GateFailed(
            f"{name} is called {precision} but {len(wrong)} of {len(products)} matrix products are not {want} ({first})."
        )


def kept_products(model: ModelProto, layers: Collection[str]) -> set[str]:
    """Names of the matrix products that are one of `layers` (`blocks.3.mlp.fc2`) or inside one (`blocks.3`)."""
    names = {n.name for n in model.graph.node if n.op_type in PRODUCTS}
    return {n for n in names if any(n == layer or n.startswith(f"{layer}.") for layer in layers)}


def _without_weights(model: ModelProto) -> ModelProto:
    """The graph with its large constants as inputs: what shape inference needs, also where the whole exceeds protobuf's 2 GB."""
    bare = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    bare.graph.CopyFrom(
        onnx.GraphProto(node=model.graph.node, name="types", input=model.graph.input, output=model.graph.output)
    )
    given = {i.name for i in bare.graph.input}
    for tensor in model.graph.initializer:
        elements = 1
        for d in tensor.dims:
            elements *= d
        if elements <= SMALL:
            bare.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in given:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return bare
