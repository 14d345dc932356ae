"""Quantized graphs for tests of what reads them, made node by node so that they do not depend on the quantizer: each linear layer's
weight, and for the 8-bit formats its input, is put behind Q/DQ with scales of its largest magnitude.
"""

from typing import Literal

import ml_dtypes
import numpy as np
from onnx import ModelProto, helper, numpy_helper

BLOCK = 32
LARGEST = {"int8": 127.0, "fp8": 448.0, "w8": 127.0, "w4": 7.0}
STORED = {
    "int8": np.dtype(np.int8),
    "w8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
    "w4": np.dtype(ml_dtypes.int4),
}


def requantized(
    model: ModelProto, to: Literal["int8", "fp8", "w8", "w4"], activation: float = 0.05, skip: str = "-"
) -> ModelProto:
    """A copy with every MatMul of a stored weight quantized (those whose name contains `skip` left alone); opset 21."""
    out = ModelProto()
    out.CopyFrom(model)
    out.opset_import[0].version = max(21, out.opset_import[0].version)
    graph, stored = out.graph, {t.name: t for t in out.graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored and skip not in node.name:
            weight = numpy_helper.to_array(stored[node.input[1]])
            nodes.append(_weight(graph, node.name, weight, to))
            node.input[1] = nodes[-1].output[0]
            if to in ("int8", "fp8"):
                nodes.extend(_activation(graph, node.name, node.input[0], np.array(activation, weight.dtype), to))
                node.input[0] = nodes[-1].output[0]
        nodes.append(node)
    used = {i for n in nodes for i in n.input}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    return out


def _weight(graph, name, weight, to):
    groups = weight.reshape(-1, BLOCK, weight.shape[1]) if to == "w4" else weight[None]
    scale = np.maximum(np.abs(groups.astype(np.float32)).max(1) / LARGEST[to], 1e-4)
    values = groups.astype(np.float32) / scale[:, None]
    if to != "fp8":
        values = np.round(values)
    scale = scale if to == "w4" else scale[0]
    stored = values.reshape(weight.shape).astype(STORED[to])
    arrays = {
        f"{name}.q": stored,
        f"{name}.scale": scale.astype(weight.dtype),
        f"{name}.zero": np.zeros(scale.shape, STORED[to]),
    }
    graph.initializer.extend(numpy_helper.from_array(a, k) for k, a in arrays.items())
    block = {"axis": 0, "block_size": BLOCK} if to == "w4" else {"axis": 1}
    return helper.make_node("DequantizeLinear", list(arrays), [f"{name}.dq"], name=f"{name}.dq", **block)


def _activation(graph, name, source, scale, to):
    arrays = {f"{name}.in_scale": scale, f"{name}.in_zero": np.zeros((), STORED[to])}
    graph.initializer.extend(numpy_helper.from_array(a, k) for k, a in arrays.items())
    return [
        helper.make_node("QuantizeLinear", [source, *arrays], [f"{name}.in_q"], name=f"{name}.in_q"),
        helper.make_node("DequantizeLinear", [f"{name}.in_q", *arrays], [f"{name}.in_dq"], name=f"{name}.in_dq"),
    ]
