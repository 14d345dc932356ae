"""A quantized graph rewritten for OpenVINO's CPU plugin: the same integers, fewer operations around them.

The plugin runs W8A8 linear layers near the machine's peak; what is left to win is what stands between them (ms on one core of an AVX512
machine, ViT-S/14 at 224 px: tests/benchmarks/README.md):

    LayerScale      x * gamma after a layer: gamma goes into the weight's scales and the bias, exactly (a negative one flips the integers)
    query scale     1/sqrt(d) on Q: into the scales and bias of Q's part of qkv
    qkv             one product followed by reshape, transpose and slices: three products, whose heads the fused attention reads in place
    K               turned for Q K^T together with its heads it is copied first; turned by itself, right in front of the product, it is not
    convolution     a patch embedding with signed INT8 inputs makes the plugin (2026.4) run all linear layers in bf16: it stays in floats
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.graphs.nodes import constants, set_constants
from export.graphs.stored_half import store_half


def for_openvino(model: ModelProto) -> ModelProto:
    """The rewritten graph. What does not look as our exporter writes it stays as it is."""
    graph = _Graph(model)
    for node in list(graph.model.graph.node):
        if node.op_type == "Conv":
            graph.float_convolution(node)
        if node.op_type == "MatMul" and (linear := graph.linear(node)):
            graph.fold_layer_scale(linear)
            graph.split_qkv(linear)
    rewritten = graph.finished()
    store_half(rewritten)  # of a convolution that went back to floats
    return rewritten


@dataclass
class _Linear:
    """x -> MatMul <- DequantizeLinear <- int8 [K, N], then Add of a bias."""

    product: NodeProto
    weight: NodeProto
    bias: NodeProto

    @property
    def output(self) -> str:
        return self.bias.output[0]


class _Graph:
    """A graph that is being rewritten: who makes and who reads each tensor."""

    def __init__(self, model: ModelProto):
        self.model = ModelProto()
        self.model.CopyFrom(model)
        self.values = {name: numpy_helper.to_array(t) for name, t in constants(self.model).items()}
        self.added: list[TensorProto] = []
        self.dropped: set[int] = set()
        self.before: dict[int, list[NodeProto]] = {}  # new nodes, by the one that they stand in front of
        self.outputs = {o.name for o in self.model.graph.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.maker = {o: n for n in self.model.graph.node for o in n.output}

    def linear(self, node: NodeProto) -> _Linear | None:
        weight = self.maker.get(node.input[1])
        bias = self.only_reader(node.output[0])
        known = weight is not None and weight.op_type == "DequantizeLinear" and all(i in self.values for i in weight.input)
        if weight is None or not known or len(self.readers[weight.output[0]]) > 1:
            return None
        if bias is None or bias.op_type != "Add" or not any(i in self.values for i in bias.input):
            return None
        return _Linear(node, weight, bias) if self.values[weight.input[1]].ndim == 1 else None

    def only_reader(self, tensor: str) -> NodeProto | None:
        found = self.readers.get(tensor, [])
        return found[0] if len(found) == 1 and tensor not in self.outputs else None

    def constant(self, name: str, value: np.ndarray) -> str:
        self.added.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        self.values[name] = value
        return name

    def bias_of(self, linear: _Linear) -> tuple[int, np.ndarray]:
        index = next(i for i, name in enumerate(linear.bias.input) if name in self.values)
        return index, self.values[linear.bias.input[index]]

    def set_weight(self, node: NodeProto, name: str, ints: np.ndarray, scale: np.ndarray) -> None:
        zeros = np.zeros(len(scale), ints.dtype)
        node.input[:] = [
            self.constant(f"{name}_int8", ints),
            self.constant(f"{name}_scale", scale.astype(np.float32)),
            self.constant(f"{name}_zero", zeros),
        ]

    def float_convolution(self, node: NodeProto) -> None:
        """Input and weight as they are behind their DequantizeLinear."""
        for i in range(2):
            dequantize = self.maker.get(node.input[i])
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            quantize = self.maker.get(dequantize.input[0])
            if i == 0 and quantize is not None and quantize.op_type == "QuantizeLinear":
                node.input[0] = quantize.input[0]
                if len(self.readers[dequantize.output[0]]) == 1:
                    self.dropped |= {id(dequantize), id(quantize)}
            elif i == 1 and all(n in self.values for n in dequantize.input):
                ints, scale = (self.values[n] for n in dequantize.input[:2])
                shaped = scale.reshape(-1, *[1] * (ints.ndim - 1)) if scale.ndim else scale
                node.input[1] = self.constant(f"{node.name}.weight_float", (ints * shaped).astype(np.float32))
                self.dropped.add(id(dequantize))

    def fold_layer_scale(self, linear: _Linear) -> None:
        scaled = self.only_reader(linear.output)
        if scaled is None or scaled.op_type != "Mul":
            return
        gamma = next((self.values[i] for i in scaled.input if i in self.values), None)
        ints, scale = (self.values[i] for i in linear.weight.input[:2])
        if gamma is None or gamma.size != len(scale):
            return
        gamma = gamma.reshape(-1)
        new = np.where(gamma == 0, 1.0, np.abs(gamma)) * scale  # a scale must be above 0: a dead channel's integers become 0
        self.set_weight(linear.weight, linear.product.name, ints * np.sign(gamma).astype(ints.dtype), new)
        index, bias = self.bias_of(linear)
        linear.bias.input[index] = self.constant(f"{linear.product.name}.bias_scaled", (bias * gamma).astype(bias.dtype))
        self.replace(scaled.output[0], linear.output)
        self.dropped.add(id(scaled))

    def replace(self, old: str, new: str) -> None:
        """Let who read `old` read `new`."""
        assert old not in self.outputs
        for reader in self.readers.pop(old, []):
            reader.input[:] = [new if i == old else i for i in reader.input]
            self.readers.setdefault(new, []).append(reader)

    def split_qkv(self, linear: _Linear) -> None:
        """[B, T, 3 H d] -> reshape [B, T, 3, H, d] -> transpose (2, 0, 3, 1, 4) -> three slices; becomes three products."""
        reshape = self.only_reader(linear.output)
        if reshape is None or reshape.op_type != "Reshape":
            return
        permute = self.only_reader(reshape.output[0])
        shape = self.values.get(reshape.input[1])
        if permute is None or permute.op_type != "Transpose" or shape is None or len(shape) != 5 or shape[2] != 3:
            return
        if list(permute.attribute[0].ints) != [2, 0, 3, 1, 4]:
            return
        parts = [self.part(s) for s in self.readers[permute.output[0]]]
        if sorted(p[0] for p in parts if p) != [0, 1, 2]:
            return
        _, tokens, _, heads, width = (int(v) for v in shape)
        ints, scale = (self.values[i] for i in linear.weight.input[:2])
        _, bias = self.bias_of(linear)
        name, d = linear.product.name, heads * width
        new: list[NodeProto] = []
        for index, slicing, squeeze in (p for p in parts if p):
            kind, rows = "qkv"[index], slice(index * d, (index + 1) * d)
            end, factor = (self.query_scale(squeeze) if index == 0 else None) or (squeeze, 1.0)
            old_end = end
            part = f"{name}.{kind}"
            dequantize = helper.make_node("DequantizeLinear", [], [f"{part}_dq"], name=f"{part}_dq", axis=1)
            self.set_weight(dequantize, part, ints[:, rows], scale[rows] * factor)
            added = self.constant(f"{part}.bias", (bias[rows] * factor).astype(bias.dtype))
            shaped = self.constant(f"{name}.heads", np.array([0, tokens, heads, width], np.int64))
            new += [
                dequantize,
                helper.make_node("MatMul", [linear.product.input[0], f"{part}_dq"], [f"{part}_product"], name=part),
                helper.make_node("Add", [f"{part}_product", added], [f"{part}_biased"], name=f"{part}_bias"),
                helper.make_node("Reshape", [f"{part}_biased", shaped], [f"{part}_heads"], name=f"{part}_heads"),
            ]
            new.append(
                helper.make_node("Transpose", [f"{part}_heads"], [f"{part}_ready"], name=f"{part}_ready", perm=[0, 2, 1, 3])
            )
            if index == 1:
                end = self.turn_late(end, f"{part}_turned")
            self.replace(end.output[0], f"{part}_ready")
            self.dropped |= {id(slicing), id(squeeze), id(old_end), id(end)}
        self.before[id(linear.product)] = new
        self.dropped |= {id(linear.weight), id(linear.product), id(linear.bias), id(reshape), id(permute)}

    def turn_late(self, end: NodeProto, name: str) -> NodeProto:
        """Turn K [B, H, T, d] right in front of Q K^T, behind its quantization if it has one -> the node that K is now ready behind."""
        turn = self.only_reader(end.output[0])
        if turn is None or turn.op_type != "Transpose" or list(turn.attribute[0].ints) != [0, 1, 3, 2]:
            return end
        turned, reader = turn.output[0], self.only_reader(turn.output[0])
        while reader is not None and reader.op_type in ("QuantizeLinear", "DequantizeLinear"):
            if any(
                i not in self.values or self.values[i].size != 1 for i in reader.input[1:]
            ):  # a scale a channel would turn too
                return end
            turned = reader.output[0]
            reader = self.only_reader(turned)
        if reader is None or turned == turn.output[0]:
            return end
        self.before[id(reader)] = [helper.make_node("Transpose", [turned], [name], name=name, perm=[0, 1, 3, 2])]
        reader.input[:] = [name if i == turned else i for i in reader.input]
        self.dropped.add(id(end))
        return turn

    def part(self, slicing: NodeProto) -> tuple[int, NodeProto, NodeProto] | None:
        """(0, 1 or 2, Slice, Squeeze) of what takes q, k or v out of the stack; a Gather stands for both."""
        if slicing.op_type == "Gather" and slicing.input[1] in self.values:
            return int(self.values[slicing.input[1]].reshape(-1)[0]), slicing, slicing
        squeeze = self.only_reader(slicing.output[0])
        if slicing.op_type != "Slice" or squeeze is None or squeeze.op_type != "Squeeze" or slicing.input[1] not in self.values:
            return None
        return int(self.values[slicing.input[1]].reshape(-1)[0]), slicing, squeeze

    def query_scale(self, squeeze: NodeProto) -> tuple[NodeProto, float] | None:
        """The multiplication of Q by a constant, and the constant."""
        scaled = self.only_reader(squeeze.output[0])
        if scaled is None or scaled.op_type != "Mul":
            return None
        factor = next((self.values[i] for i in scaled.input if i in self.values), None)
        return None if factor is None or factor.size != 1 or factor.item() <= 0 else (scaled, float(factor.item()))

    def finished(self) -> ModelProto:
        graph = self.model.graph
        nodes: list[NodeProto] = []
        for node in graph.node:
            nodes += self.before.get(id(node), [])
            nodes += [] if id(node) in self.dropped else [node]
        tensors = {t.name: t for t in (*graph.initializer, *self.added)}
        rewritten = [NodeProto.FromString(node.SerializeToString()) for node in nodes]  # the graph owns those that it holds
        del graph.node[:]
        graph.node.extend(rewritten)
        set_constants(self.model, list(tensors.values()))
        onnx.checker.check_model(self.model, full_check=True)
        return self.model
