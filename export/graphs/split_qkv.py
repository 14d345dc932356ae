"""Quantized QKV layers as three, so that TensorRT-RTX runs them in 8 bits.

Its compiler (1.7) moves the slices that part Q, K and V through the product into the weight; where that has a scale for each channel it
dequantizes both sides and multiplies in floating point: a quarter of a ViT's linear FLOPs. `export/engine_proof.py` reads this in the
compiled plan. Three products of a third of the channels each, concatenated, give the same numbers and stay in 8 bits.

    x [B, N, D] -> MatMul W [D, 3D] -> + b        becomes        x -> MatMul W_q, W_k, W_v [D, D], + b_q, b_k, b_v -> Concat [B, N, 3D]
"""

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.graphs.anatomy import DEQUANTIZE, Anatomy

PARTS = ("q", "k", "v")
MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity"}
CUTS = {"Slice", "Split", "Gather"}


def split_qkv(model: ModelProto) -> ModelProto:
    """A copy in which every W8A8 linear layer whose output is cut into three is three layers: `blocks.0.attn.qkv.q`, `.k` and `.v`.

    Layers in floating point, or without a bias of their own, stay as they are.
    """
    out = ModelProto()
    out.CopyFrom(model)
    anatomy = Anatomy(out)
    found = {layer.output[0]: (layer, bias) for layer, bias in quantized_qkv(anatomy)}
    replaced = {bias.output[0] for _, bias in found.values()}
    nodes: list[NodeProto] = []
    for node in out.graph.node:
        if node.output[0] in found:
            nodes.extend(_parts(anatomy, *found[node.output[0]]))
        elif node.output[0] not in replaced:
            nodes.append(node)
    used = {i for n in nodes for i in n.input} | anatomy.outputs
    kept = [
        n for n in nodes if used.intersection(n.output)
    ]  # the DequantizeLinear of the whole weight is left without a reader
    used = {i for n in kept for i in n.input}
    tensors = sorted((t for t in out.graph.initializer if t.name in used), key=lambda t: t.name)
    del out.graph.node[:], out.graph.initializer[:]
    out.graph.node.extend(kept)
    out.graph.initializer.extend(tensors)
    return out


def quantized_qkv(anatomy: Anatomy) -> Iterator[tuple[NodeProto, NodeProto]]:
    """W8A8 MatMuls with a scale for each channel and the Add of their bias, whose output is cut into parts."""
    for layer in anatomy.nodes:
        if layer.op_type != "MatMul":
            continue
        source, weight = anatomy.quantizer(layer.input[0]), anatomy.quantizer(layer.input[1])
        if source is None or weight is None or source.constant or weight.quantize is not None:
            continue
        made = anatomy.made.get(layer.input[1])
        if made is None or made.op_type not in DEQUANTIZE or weight.family not in ("INT8", "FP8"):
            continue
        if len(anatomy.shapes.get(made.input[1], ())) != 1 or anatomy.shapes[made.input[1]][0] % len(PARTS):
            continue
        readers = anatomy.readers[layer.output[0]]
        if (
            len(readers) == 1
            and readers[0].op_type == "Add"
            and _bias(anatomy, readers[0], layer)
            and _is_cut(anatomy, readers[0])
        ):
            yield layer, readers[0]


def _parts(anatomy: Anatomy, layer: NodeProto, add: NodeProto) -> list[NodeProto]:
    """The nodes that replace a layer and its bias; their constants are added to the graph."""
    dequantize = anatomy.made[layer.input[1]]
    names = {"weight": dequantize.input[0], "scale": dequantize.input[1], "bias": _bias(anatomy, add, layer)}
    if len(dequantize.input) > 2 and dequantize.input[2]:
        names["zero"] = dequantize.input[2]
    values = {k: anatomy.value(v) for k, v in names.items()}
    nodes, outputs = [], []
    for i, part in enumerate(PARTS):
        name = f"{layer.name}.{part}"
        for what, value in values.items():
            assert value is not None, f"{names[what]} is no constant"
            third = np.ascontiguousarray(np.split(value, len(PARTS), axis=-1)[i])
            anatomy.graph.initializer.append(_tensor(third, f"{name}.{what}"))
        scales = [f"{name}.weight", f"{name}.scale", *([f"{name}.zero"] if "zero" in values else [])]
        nodes += [
            helper.make_node("DequantizeLinear", scales, [f"{name}.weight_dq"], name=f"{name}.weight_dq", axis=1),
            helper.make_node("MatMul", [layer.input[0], f"{name}.weight_dq"], [f"{name}.product"], name=name),
            helper.make_node("Add", [f"{name}.product", f"{name}.bias"], [f"{name}.out"], name=f"{name}.add"),
        ]
        outputs.append(f"{name}.out")
    return [*nodes, helper.make_node("Concat", outputs, [add.output[0]], name=f"{layer.name}.concat", axis=-1)]


def _tensor(value: np.ndarray, name: str) -> TensorProto:
    return numpy_helper.from_array(value, name)


def _bias(anatomy: Anatomy, add: NodeProto, layer: NodeProto) -> str:
    """The bias that an Add gives to a layer, "" when it adds something else."""
    other = next((i for i in add.input if i != layer.output[0]), "")
    width = anatomy.shapes.get(layer.output[0], (0,))[-1:]
    return other if other in anatomy.stored and anatomy.shapes.get(other) == width else ""


def _is_cut(anatomy: Anatomy, node: NodeProto) -> bool:
    """Whether a node's output, moved about, is read in parts."""
    queue, cuts = [node.output[0]], 0
    while queue:
        for reader in anatomy.readers[queue.pop()]:
            if reader.op_type == "Split":
                cuts += len(reader.output)
            elif reader.op_type in CUTS:
                cuts += 1
            elif reader.op_type in MOVES:
                queue.append(reader.output[0])
    return cuts >= len(PARTS)
