"""Ten graphs, each broken in one way that has cost somebody a day, made from healthy ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from requantized import requantized

from export.graph import constants


def uint8_zero_point(fp32: ModelProto, fp16: ModelProto) -> ModelProto:
    model = requantized(fp32, "int8")
    set_constant(model, "blocks.0.attn.qkv.in_zero", np.array(128, np.uint8))
    return model


def int32_bias(fp32: ModelProto, fp16: ModelProto) -> ModelProto:
    model = requantized(fp32, "int8")
    add = next(n for n in model.graph.node if n.op_type == "Add" and "blocks.0.attn.qkv" in _makers(model, n))
    bias = next(i for i in add.input if i in constants(model))
    values = numpy_helper.to_array(constants(model)[bias])
    scale = np.full(values.shape, 1e-4, values.dtype)
    add_constants(model, {"bias_int32": np.round(values / scale).astype(np.int32), "bias_scale": scale})
    insert_before(
        model, add, helper.make_node("DequantizeLinear", ["bias_int32", "bias_scale"], ["bias_dq"], name="bias_dq", axis=0)
    )
    add.input[list(add.input).index(bias)] = "bias_dq"
    return model


def quantized_residual(fp32: ModelProto, fp16: ModelProto) -> ModelProto:
    model = requantized(fp32, "int8")
    made = {o: n for n in model.graph.node for o in n.output}
    add = made["blocks.0"]
    assert add.op_type == "Add"
    for at, source in enumerate(list(add.input)):
        add.input[at] = add_qdq(model, add, source, f"residual{at}")
    return model


def wrong_opset(fp32: ModelProto, fp16: ModelProto) -> ModelProto:
    model = copy_of(fp32)
    model.opset_import[0].version = 14
    return model


def unfused_attention(fp32: ModelProto, fp16: ModelProto) -> ModelProto:
    """exp(x) / sum(exp(x)), as exporters write a softmax that a framework computes by hand."""
    model = copy_of(fp16)
    add_constants(model, {"last": np.array([-1], np.int64)})
    for i, softmax in enumerate([n for n in model.graph.node if n.op_type == "Softmax"]):
        insert_before(model, softmax, helper.make_node("Exp", [softmax.input[0]], [f"e{i}"], name=f"exp{i}"))
        insert_before(
            model, softmax, helper.make_node("ReduceSum", [f"e{i}", "last"], [f"sum_e{i}"], name=f"sum{i}", keepdims=1)
        )
        softmax.CopyFrom(helper.make_node("Div", [f"e{i}", f"sum_e{i}"], list(softmax.output), name=f"softmax{i}"))
    return model


def fp32_named_fp16(fp32: ModelProto, fp16: ModelProto) -> ModelProto:
    return copy_of(fp32)  # its name is broken, see BROKEN


def overflow(fp32: ModelProto, fp16: ModelProto) -> ModelProto:
    model = copy_of(fp16)
    weight = numpy_helper.to_array(constants(model)["blocks.1.mlp.fc2.weight"]).astype(np.float32) * 1e7
    with np.errstate(over="ignore"):
        set_constant(model, "blocks.1.mlp.fc2.weight", weight.astype(np.float16))
    return model


def missing_scale(fp32: ModelProto, fp16: ModelProto) -> ModelProto:
    model = requantized(fp32, "int8")
    kept = [t for t in model.graph.initializer if t.name != "blocks.0.mlp.fc1.in_scale"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def dynamic_positions(fp32: ModelProto, fp16: ModelProto) -> ModelProto:
    """As exporters write `interpolate(pos_embed, size=(h, w))` when the size is not fixed."""
    model = copy_of(fp32)
    stored = constants(model)
    add = next(
        n for n in model.graph.node if n.op_type == "Add" and any(i in stored and len(stored[i].dims) == 3 for i in n.input)
    )
    at, name = next((k, i) for k, i in enumerate(add.input) if i in stored)
    tokens, dim = stored[name].dims[1:]
    sizes = np.array([1, dim, tokens], np.int64)
    table = np.random.default_rng(0).normal(size=(1, dim, 2 * tokens)).astype(np.float32)
    add_constants(model, {"table": table, "sizes": sizes})
    insert_before(
        model, add, helper.make_node("Resize", ["table", "", "", "sizes"], ["resized"], name="pos_resize", mode="linear")
    )
    insert_before(model, add, helper.make_node("Transpose", ["resized"], ["resized_t"], name="pos_transpose", perm=[0, 2, 1]))
    add.input[at] = "resized_t"
    return model


def nan_weights(fp32: ModelProto, fp16: ModelProto) -> ModelProto:
    model = copy_of(fp32)
    weight = numpy_helper.to_array(constants(model)["blocks.1.attn.proj.weight"]).copy()
    weight[3, 5] = np.nan
    set_constant(model, "blocks.1.attn.proj.weight", weight)
    return model


# rule -> (builder, file name, errors that come along: the ONNX checker sees some of these too)
BROKEN: dict[str, tuple[Callable[[ModelProto, ModelProto], ModelProto], str, set[str]]] = {
    "uint8-zero-point": (uint8_zero_point, "vit_int8.onnx", set()),
    "int32-bias": (int32_bias, "vit_int8.onnx", set()),
    "quantized-residual": (quantized_residual, "vit_int8.onnx", set()),
    "opset-too-old": (wrong_opset, "vit_fp32.onnx", {"invalid-graph"}),
    "unfused-attention": (unfused_attention, "vit_fp16.onnx", set()),
    "precision-mismatch": (fp32_named_fp16, "vit_fp16.onnx", set()),
    "fp16-overflow": (overflow, "vit_fp16.onnx", set()),
    "missing-scale": (missing_scale, "vit_int8.onnx", {"invalid-graph"}),
    "dynamic-position-interpolation": (dynamic_positions, "vit_fp32.onnx", set()),
    "nan-weights": (nan_weights, "vit_fp32.onnx", set()),
}


def before_softmax(model: ModelProto, op: str, *constants_: np.ndarray, **attributes: Any) -> ModelProto:
    """A copy with another node between the first QK^T and its softmax."""
    out = copy_of(model)
    softmax = next(n for n in out.graph.node if n.op_type == "Softmax")
    names = [f"constant{i}" for i in range(len(constants_))]
    add_constants(out, dict(zip(names, constants_, strict=True)))
    insert_before(out, softmax, helper.make_node(op, [softmax.input[0], *names], ["changed"], name="inserted", **attributes))
    softmax.input[0] = "changed"
    return out


def copy_of(model: ModelProto) -> ModelProto:
    out = ModelProto()
    out.CopyFrom(model)
    return out


def add_constants(model: ModelProto, arrays: dict[str, np.ndarray]) -> None:
    model.graph.initializer.extend(numpy_helper.from_array(a, k) for k, a in arrays.items())


def set_constant(model: ModelProto, name: str, value: np.ndarray) -> None:
    tensor: TensorProto = constants(model)[name]
    tensor.CopyFrom(numpy_helper.from_array(value, name))


def insert_before(model: ModelProto, node: NodeProto, new: NodeProto) -> None:
    nodes = list(model.graph.node)
    index = next(i for i, n in enumerate(nodes) if n is node or n.output == node.output)
    model.graph.node.insert(index, new)


def add_qdq(model: ModelProto, reader: NodeProto, source: str, name: str) -> str:
    add_constants(model, {f"{name}_scale": np.array(0.1, np.float32), f"{name}_zero": np.array(0, np.int8)})
    pair = [f"{name}_scale", f"{name}_zero"]
    insert_before(model, reader, helper.make_node("QuantizeLinear", [source, *pair], [f"{name}_q"], name=f"{name}_q"))
    insert_before(model, reader, helper.make_node("DequantizeLinear", [f"{name}_q", *pair], [f"{name}_dq"], name=f"{name}_dq"))
    return f"{name}_dq"


def _makers(model: ModelProto, node: NodeProto) -> set[str]:
    made = {o: n.name for n in model.graph.node for o in n.output}
    return {made[i] for i in node.input if i in made}
