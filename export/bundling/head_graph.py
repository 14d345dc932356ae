"""A trained head as a small ONNX graph: features in, logits or metres out, standardisation inside.

The one format of heads outside a run: bundles hold it, `infer.py` and the demo read it. The graph's metadata `head` is JSON with `kind`,
`values` [K] (class ids, or metres of depth's bins), `names` of the classes and what it was `trained_on`.

Shape legend: B batch, N patches, D width, F inputs of the head, K outputs.
"""

import json

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from distill.evaluate.linear_head import Head

OPSET, IR_VERSION = 17, 8  # what every runtime of the last years reads


def outputs_of(kind: str) -> str:
    """The name of a head's one output."""
    return "metres" if kind == "depth" else "logits"


def inputs_of(head: Head) -> list[str]:
    """Names of the features that a head reads, as exported files call them."""
    if head.kind == "classification":
        return ["cls", "patches"] if head.mean_patch else ["cls"]
    return ["patches", "cls"] if head.cls else ["patches"]


def head_graph(head: Head, dim: int, trained_on: str) -> ModelProto:
    """The head of a network whose features are `dim` wide.

    cls [B, D] -> logits [B, K] (classification, its mean patch from patches [B, N, D]); patches [B, N, D], with cls where the head has
    it, -> logits [B, N, K] (segmentation) or metres [B, N] (depth: the mean of the bins weighted by their probabilities).
    """
    dense, output = head.kind != "classification", outputs_of(head.kind)
    shapes: dict[str, list[int | str]] = {"cls": ["batch", dim], "patches": ["batch", "patches", dim]}
    arrays = {
        "shift": head.shift,
        "scale": head.scale,
        "weight": np.ascontiguousarray(head.weight.T),
        "bias": head.bias,
    }
    axes = {"one": [1]} if dense and head.cls else {}
    tensor, nodes = _features(head)
    nodes += [
        helper.make_node("Sub", [tensor, "shift"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["standardised"]),
        helper.make_node("MatMul", ["standardised", "weight"], ["products"]),
        helper.make_node("Add", ["products", "bias"], ["scores" if head.kind == "depth" else output]),
    ]
    if head.kind == "depth":
        arrays["bins"], axes["last"] = head.values[:, None], [-1]
        nodes += [
            helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
            helper.make_node("MatMul", ["shares", "bins"], ["column"]),
            helper.make_node("Squeeze", ["column", "last"], [output]),
        ]
    constants = [numpy_helper.from_array(np.asarray(a, np.float32), name) for name, a in arrays.items()]
    constants += [numpy_helper.from_array(np.array(a, np.int64), name) for name, a in axes.items()]
    result: list[int | str] = ["batch", *(["patches"] if dense else []), *([len(head.bias)] if head.kind != "depth" else [])]
    graph = helper.make_graph(
        nodes,
        f"{head.kind} head",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in inputs_of(head)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, result)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    about = {"kind": head.kind, "values": head.values.tolist(), "names": head.names, "trained_on": trained_on}
    helper.set_model_props(model, {"head": json.dumps(about, sort_keys=True)})
    return model


def _features(head: Head) -> tuple[str, list[NodeProto]]:
    """(the name of the tensor that is standardised, the nodes that make it)."""
    if head.kind == "classification" and head.mean_patch:
        mean = helper.make_node("ReduceMean", ["patches"], ["mean_patch"], axes=[1], keepdims=0)
        return "features", [mean, helper.make_node("Concat", ["cls", "mean_patch"], ["features"], axis=-1)]
    if head.kind == "classification":
        return "cls", []
    if not head.cls:
        return "patches", []
    return "features", [
        helper.make_node("Shape", ["patches"], ["shape"]),
        helper.make_node("Unsqueeze", ["cls", "one"], ["cls_as_patch"]),
        helper.make_node("Expand", ["cls_as_patch", "shape"], ["cls_everywhere"]),
        helper.make_node("Concat", ["patches", "cls_everywhere"], ["features"], axis=-1),
    ]
