"""A trained head as a small ONNX graph: features in, logits or metres out, standardisation inside.

The one format of heads outside a run: bundles hold it, `infer.py` and the demo read it. The graph's metadata `head` is JSON with `kind`,
`values` [K] (class ids, or metres of depth's bins), `names` of the classes and what it was `trained_on`.

Shape legend: B batch, N patches, D width, F inputs of the head, K outputs.
"""

import json
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from distill.evaluate.linear_head import Head

OPSET, IR_VERSION = 17, 8  # what every runtime of the last years reads
Axes = list[int | str]


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
    part = {"classification": _classifier, "segmentation": _segmenter, "depth": _depth}[head.kind](head)
    shapes: dict[str, Axes] = {"cls": ["batch", dim], "patches": ["batch", "patches", dim]}
    weights = {"shift": head.shift, "scale": head.scale, "weight": np.ascontiguousarray(head.weight.T), "bias": head.bias}
    constants = {name: a.astype(np.float32) for name, a in weights.items()} | part.constants
    graph = helper.make_graph(
        part.nodes,
        f"{head.kind} head",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in inputs_of(head)],
        [helper.make_tensor_value_info(outputs_of(head.kind), TensorProto.FLOAT, part.result)],
        [numpy_helper.from_array(a, name) for name, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    about = {"kind": head.kind, "values": head.values.tolist(), "names": head.names, "trained_on": trained_on}
    helper.set_model_props(model, {"head": json.dumps(about, sort_keys=True)})
    return model


@dataclass(frozen=True)
class Part:
    """What one kind of head is made of.

    Attributes:
        nodes: from its inputs to its output. result: the output's axes.
        constants: what the nodes read beside shift, scale, weight and bias.
    """

    nodes: list[NodeProto]
    result: Axes
    constants: dict[str, np.ndarray]


def _classifier(head: Head) -> Part:
    if not head.mean_patch:
        return Part(_linear("cls", "logits"), ["batch", len(head.bias)], {})
    mean = helper.make_node("ReduceMean", ["patches"], ["mean_patch"], axes=[1], keepdims=0)
    both = helper.make_node("Concat", ["cls", "mean_patch"], ["features"], axis=-1)
    return Part([mean, both, *_linear("features", "logits")], ["batch", len(head.bias)], {})


def _segmenter(head: Head) -> Part:
    features, nodes, constants = _of_patches(head)
    return Part([*nodes, *_linear(features, "logits")], ["batch", "patches", len(head.bias)], constants)


def _depth(head: Head) -> Part:
    features, nodes, constants = _of_patches(head)
    metres = [
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "bins"], ["column"]),
        helper.make_node("Squeeze", ["column", "last"], ["metres"]),
    ]
    bins = {"bins": head.values[:, None].astype(np.float32)}
    return Part(
        [*nodes, *_linear(features, "scores"), *metres],
        ["batch", "patches"],
        bins | constants | {"last": np.array([-1], np.int64)},
    )


def _of_patches(head: Head) -> tuple[str, list[NodeProto], dict[str, np.ndarray]]:
    """(the name of a dense head's features, the nodes that make them, the constants that those read)."""
    if not head.cls:
        return "patches", [], {}
    nodes = [
        helper.make_node("Shape", ["patches"], ["shape"]),
        helper.make_node("Unsqueeze", ["cls", "one"], ["cls_as_patch"]),
        helper.make_node("Expand", ["cls_as_patch", "shape"], ["cls_everywhere"]),
        helper.make_node("Concat", ["patches", "cls_everywhere"], ["features"], axis=-1),
    ]
    return "features", nodes, {"one": np.array([1], np.int64)}


def _linear(features: str, output: str) -> list[NodeProto]:
    return [
        helper.make_node("Sub", [features, "shift"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["standardised"]),
        helper.make_node("MatMul", ["standardised", "weight"], ["products"]),
        helper.make_node("Add", ["products", "bias"], [output]),
    ]
