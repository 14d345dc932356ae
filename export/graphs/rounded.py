"""A typed FP16 or BF16 graph as an FP32 graph that rounds where it rounds, so that a CPU sees what a GPU will.

ONNX Runtime has no half kernels for most operations on a CPU: it computes neighbours in FP32 and drops the casts between them, and an
overflow that TensorRT meets is invisible. Here every half value goes through Cast to the half type and back, and those stay. Products
accumulate in FP32, as tensor cores do.
"""

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.graphs.nodes import constants, element_types, set_constants
from export.graphs.typed import MOVES

HALVES = {"FLOAT16": int(TensorProto.FLOAT16), "BFLOAT16": int(TensorProto.BFLOAT16)}


def rounded(model: ModelProto) -> ModelProto:
    """The FP32 graph that rounds like `model`; every tensor keeps its name and holds, as float32, what the half tensor would."""
    types = element_types(model)
    halves = {name: HALVES[t] for name, t in types.items() if t in HALVES}
    out = ModelProto()
    out.CopyFrom(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        new = NodeProto()
        new.CopyFrom(node)
        for attribute in new.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALVES.values():
                attribute.i = TensorProto.FLOAT
        nodes.append(new)
        if node.op_type in MOVES:
            continue
        for k, name in enumerate(node.output):
            if name in halves:
                new.output[k] = f"{name}_wide"
                nodes.append(
                    helper.make_node("Cast", [f"{name}_wide"], [f"{name}_narrow"], name=f"{name}_narrow", to=halves[name])
                )
                nodes.append(helper.make_node("Cast", [f"{name}_narrow"], [name], name=f"{name}_again", to=TensorProto.FLOAT))
    del out.graph.node[:], out.graph.value_info[:]
    out.graph.node.extend(nodes)
    for opset in out.opset_import:
        if not opset.domain:
            opset.version = min(opset.version, 20)  # what is left is FP32, and 22's Conv lacks a kernel in ONNX Runtime
    set_constants(out, [_widened(t) if t.name in halves else t for t in constants(model).values()])
    return out


def _widened(tensor: TensorProto) -> TensorProto:
    if tensor.data_type == TensorProto.FLOAT16:
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
    bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16  # a bfloat16 is the upper half of a float32
    return numpy_helper.from_array(bits.view(np.float32).reshape(tuple(tensor.dims)), tensor.name)
