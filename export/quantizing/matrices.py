"""Weights of Linear layers and convolutions as matrices [K, N], and their inputs as rows [n, K], whatever the node calls them."""

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.quantizing.plan import is_transposed


def node_weight(node: NodeProto, stored: dict[str, TensorProto]) -> np.ndarray:
    """The weight [K, N] of a MatMul, Gemm or Conv node (for a Conv: K = channels * height * width of a patch)."""
    values = numpy_helper.to_array(stored[node.input[1]])
    if node.op_type == "Conv":
        return values.reshape(len(values), -1).T
    return values.T if is_transposed(node) else values


def matrix_of(matrix: np.ndarray, node: NodeProto, stored: dict[str, TensorProto]) -> np.ndarray:
    """A matrix [K, N] in the layout in which the node stores its weight."""
    if node.op_type == "Conv":
        return np.ascontiguousarray(matrix.T).reshape(tuple(stored[node.input[1]].dims))
    return np.ascontiguousarray(matrix.T if is_transposed(node) else matrix)


def output_axis(node: NodeProto) -> int:
    """The axis of output channels in the stored weight: [K, N] for MatMul, [N, K] for a transposed Gemm, [N, C, h, w] for Conv."""
    return 0 if node.op_type == "Conv" or is_transposed(node) else 1


def has_rows(node: NodeProto, stored: dict[str, TensorProto]) -> bool:
    """Whether the layer's input can be written as rows: every Linear layer, and convolutions over patches that do not overlap."""
    if node.op_type != "Conv":
        return True
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    kernel = list(stored[node.input[1]].dims)[2:]
    return (
        list(values.get("strides", [1] * len(kernel))) == kernel
        and not any(values.get("pads", []))
        and values.get("group", 1) == 1
        and set(values.get("dilations", [1])) == {1}
    )


def input_rows(x: np.ndarray, node: NodeProto, stored: dict[str, TensorProto]) -> np.ndarray:
    """A layer's input as rows [n, K], float32."""
    if node.op_type != "Conv":
        return np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])
    _, channels, height, width = stored[node.input[1]].dims
    rows, columns = x.shape[2] // height, x.shape[3] // width
    cut = x[:, :, : rows * height, : columns * width].reshape(len(x), channels, rows, height, columns, width)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 1, 3, 5), np.float32).reshape(-1, channels * height * width)
