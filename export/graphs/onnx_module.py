"""An exported FP32 graph as a PyTorch module again, its linear layers `nn.Linear` and `nn.Conv2d`: for quantizers that want modules.

Covers the operations that `graph.py` writes, and nothing else.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import UserError
from export.graphs.nodes import INPUT, OUTPUTS, PRODUCTS, constants, linear_nodes


class OnnxModule(nn.Module):
    """images [B, 3, H, W] -> (cls [B, D], patches [B, N, D]): the graph, node by node.

    Attributes:
        layers: the linear layers by name with dots as double underscores (`blocks__0__attn__qkv`).

    Raises:
        UserError: the graph holds an operation that is not known here.
    """

    def __init__(self, model: ModelProto):
        super().__init__()
        stored = {name: torch.from_numpy(numpy_helper.to_array(t).copy()) for name, t in constants(model).items()}
        self.nodes = list(model.graph.node)
        if unknown := {n.op_type for n in self.nodes} - set(OPERATIONS) - set(PRODUCTS):
            raise UserError(
                f"The graph holds {sorted(unknown)[0]}, which cannot be turned back into PyTorch; export the model again."
            )
        self.layers = nn.ModuleDict()
        for node in linear_nodes(model, PRODUCTS):
            self.layers[key_of(node)] = _layer(node, stored)
        used = {x for n in self.nodes if key_of(n) not in self.layers for x in n.input}
        self.constants = {name: t for name, t in stored.items() if name in used}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Any] = {**self.constants, INPUT: images}
        for node in self.nodes:
            if key_of(node) in self.layers:
                result = self.layers[key_of(node)](values[node.input[0]])
            else:
                attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                result = OPERATIONS[node.op_type]([values[x] for x in node.input if x], attributes)
            results = result if len(node.output) > 1 else [result]
            values.update(zip(node.output, results, strict=True))
        return tuple(values[o] for o in OUTPUTS)


def key_of(node: NodeProto) -> str:
    """A layer's name as PyTorch lets a module be called."""
    return node.name.replace(".", "__")


def _layer(node: NodeProto, stored: dict[str, Tensor]) -> nn.Module:
    weight = stored[node.input[1]]
    layer: nn.Linear | nn.Conv2d
    if node.op_type == "Conv":
        patch = weight.shape[2]
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], patch, patch, bias=len(node.input) > 2)
        layer.weight.data = weight
        if len(node.input) > 2:
            layer.bias.data = stored[node.input[2]]  # type: ignore[union-attr]
        return layer
    layer = nn.Linear(weight.shape[0], weight.shape[1], bias=False)  # the bias is an Add of its own in the graph
    layer.weight.data = weight.T.contiguous()
    return layer


def _ints(value: Any) -> list[int]:
    return [int(v) for v in (value.tolist() if isinstance(value, Tensor) else value)]


def _reshape(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, shape = inputs[0], _ints(inputs[1])
    return x.reshape([x.shape[i] if s == 0 and not attributes.get("allowzero") else s for i, s in enumerate(shape)])


def _slice(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, starts, ends = inputs[0], _ints(inputs[1]), _ints(inputs[2])
    axes = _ints(inputs[3]) if len(inputs) > 3 else list(range(len(starts)))
    steps = _ints(inputs[4]) if len(inputs) > 4 else [1] * len(starts)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end if end < 2**31 - 1 else None, step)
    return x[tuple(index)]


def _gather(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    axis, chosen = attributes.get("axis", 0), inputs[1]
    return inputs[0].select(axis, int(chosen)) if chosen.ndim == 0 else inputs[0].index_select(axis, chosen)


def _concat(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    if all(x.dtype == torch.int64 and x.ndim == 1 for x in inputs):
        return torch.cat([torch.as_tensor(x) for x in inputs], attributes["axis"])
    return torch.cat(inputs, attributes["axis"])


def _shape(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    return torch.tensor(list(inputs[0].shape)[attributes.get("start", 0) : attributes.get("end")])


def _split(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    axis = attributes.get("axis", 0)
    sizes = _ints(inputs[1]) if len(inputs) > 1 else inputs[0].shape[axis] // attributes["num_outputs"]
    return inputs[0].split(sizes, axis)


OPERATIONS: dict[str, Callable[[list[Any], dict[str, Any]], Any]] = {
    "Add": lambda i, a: i[0] + i[1],
    "Mul": lambda i, a: i[0] * i[1],
    "Sub": lambda i, a: i[0] - i[1],
    "Div": lambda i, a: i[0] / i[1],
    "MatMul": lambda i, a: i[0] @ i[1],
    "Softmax": lambda i, a: i[0].softmax(a.get("axis", -1)),
    "Sigmoid": lambda i, a: i[0].sigmoid(),
    "Gelu": lambda i, a: F.gelu(i[0], approximate=a.get("approximate", b"none").decode()),
    "LayerNormalization": lambda i, a: F.layer_norm(
        i[0], i[1].shape, i[1], i[2] if len(i) > 2 else None, a.get("epsilon", 1e-5)
    ),
    "Transpose": lambda i, a: i[0].permute(a["perm"]),
    "Squeeze": lambda i, a: i[0].squeeze(_ints(i[1])),
    "Unsqueeze": lambda i, a: i[0][(*[None] * len(_ints(i[1])), ...)] if _ints(i[1]) == [0] else i[0].unsqueeze(_ints(i[1])[0]),
    "Expand": lambda i, a: i[0].expand(torch.broadcast_shapes(i[0].shape, _ints(i[1]))),
    "Identity": lambda i, a: i[0],
    "Cast": lambda i, a: i[0].to(getattr(torch, np.dtype(helper.tensor_dtype_to_np_dtype(a["to"])).name)),
    "Reshape": _reshape,
    "Slice": _slice,
    "Gather": _gather,
    "Concat": _concat,
    "Shape": _shape,
    "Split": _split,
}
