"""FP32 graph -> the same graph in FP16 or BF16, with named layers left in FP32 between casts.

TensorRT's strongly typed builder takes the graph literally, so precision lives here. Linear layers, attention and residuals are computed
in the half type, and every LayerNormalization in FLOAT: a sum of squares overflows half floats.

A layer kept in FP32 is narrowed only behind the bias, activation and LayerScale that follow it: an overflow of `mlp.fc2` would be one
again if its output were cast before LayerScale has brought it back. Neighbours that are both kept have no cast between them.
"""

import json
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from distill.errors import UserError
from export.graphs.nodes import KEPT, PRODUCTS, TYPE_OF, constants, element_types, set_constants, verify_precision

FLOAT = int(TensorProto.FLOAT)
OPSET_OF = {"bf16": 22}  # the first whose Conv takes bfloat16; every other op of a ViT takes it at 20
FLOAT_OPS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "GroupNormalization")
UNARY = ("Gelu", "Relu", "Sigmoid", "Tanh", "Erf", "Identity", "Cast")
WITH_CONSTANT = ("Add", "Sub", "Mul", "Div")
MOVES = ("Gather", "Slice", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "Identity")
TYPELESS = ("Shape", "Size")
STREAM = "stream"


def retype(model: ModelProto, precision: str, keep_float: Collection[str] = ()) -> ModelProto:
    """An FP32 graph as FP16 or BF16: same inputs, outputs (float32) and names; `precision` "fp32" returns it as it is.

    Args:
        keep_float: layers in FP32, by name or pattern: a linear layer (`blocks.5.mlp.fc2`), the scores and softmax of an attention
            (`blocks.5.attn.qk`), all between a branch's first and last layer (`blocks.5.mlp`), a block (`blocks.5`), or the residual
            `stream`, which costs no more casts: LayerNorm then reads it without one.

    Raises:
        UserError: a pattern names nothing, or a weight is not finite in the precision.
        GateFailed: a matrix product has another type than it should.
    """
    out = model if precision == "fp32" else retyped(model, precision, matching_layers(layer_nodes(model), keep_float))
    verify_precision(out, precision)
    onnx.checker.check_model(out, full_check=True)
    return out


def retyped(model: ModelProto, precision: str, layers: list[str]) -> ModelProto:
    """`retype` by exact names and without the check that any product is half: for a search that also asks what if none is."""
    nodes = layer_nodes(model)
    out = _Retyping(model, precision, {i for name in layers for i in nodes[name]}).done()
    if layers:
        out.metadata_props.add(key=KEPT, value=json.dumps(layers))
    return out


def matching_layers(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    """The names that a pattern matches, in the graph's order.

    Raises:
        UserError: a pattern matches none.
    """
    names = list(names)
    if unknown := [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]:
        raise UserError(
            f"keep_float names {unknown[0]!r}, which no layer or block is called; there are {', '.join(names[:6])}, ..."
        )
    return [n for n in names if any(fnmatchcase(n, p) for p in patterns)]


def layer_nodes(model: ModelProto) -> dict[str, list[int]]:
    """Name -> indices of its nodes, for all that can be kept in FP32, in order of execution, the parts before their whole.

    A linear layer with what follows it element by element; `blocks.i.attn.qk` with its softmax; `blocks.i.attn.av`; the branches
    `blocks.i.attn` and `blocks.i.mlp`, from their first layer to their last; the block `blocks.i` with residual adds; and the residual
    `stream`: every add of a branch, with the tokens before the first block.
    """
    nodes, stored = list(model.graph.node), set(constants(model))
    readers = _readers(nodes)
    found: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        if node.op_type in PRODUCTS and node.name:
            found[node.name] = _with_tail(i, nodes, readers, stored)
    outputs = {o for n in nodes for o in n.output}
    blocks = sorted({b for name in found if (b := block_of(name)) and b in outputs}, key=lambda b: int(b.rpartition(".")[2]))
    before = _ancestors(nodes, start) if blocks and (start := _stream_start(nodes)) else set()
    for block in blocks:
        upto = _ancestors(nodes, block)
        inside, before = upto - before, upto
        for branch in sorted({n.rpartition(".")[0] for n in found if n.startswith(f"{block}.")}):
            parts = sorted(i for name in found if name.startswith(f"{branch}.") for i in found[name])
            found[branch] = sorted(set(parts) | (inside & _between(nodes, parts)))
        found[block] = sorted(inside)
    if blocks:
        inner = {i for name, part in found.items() if name not in blocks for i in part}
        found[STREAM] = sorted(i for i in before - inner if nodes[i].op_type not in (*FLOAT_OPS, *TYPELESS))
    return dict(sorted(found.items(), key=lambda item: (min(item[1]), len(item[1]))))


def block_of(name: str) -> str | None:
    """`blocks.5` of `blocks.5.mlp.fc2` (`net.blocks.5` in timm's models); None for a layer outside the blocks."""
    parts = name.split(".")
    at = parts.index("blocks") if "blocks" in parts else len(parts)
    return ".".join(parts[: at + 2]) if at + 2 < len(parts) and parts[at + 1].isdigit() else None


class _Retyping:
    """One pass over the nodes that gives each a type and casts what it reads to it."""

    def __init__(self, model: ModelProto, precision: str, kept: set[int]):
        self.model, self.precision, self.half = model, precision, TYPE_OF[precision]
        self.stored, self.nodes = constants(model), list(model.graph.node)
        self.floats = {name for name, t in element_types(model).items() if t == "FLOAT"}
        self.outputs = {o.name for o in model.graph.output}
        self.types = self._node_types(kept)
        self.type_of = {i.name: FLOAT for i in model.graph.input}  # of what has been made so far
        self.made: list[NodeProto] = []
        self.casts: dict[tuple[str, int], str] = {}
        self.wanted = {(x, t) for node, t in zip(self.nodes, self.types, strict=True) for x in node.input if x in self.stored}

    def done(self) -> ModelProto:
        for node, own in zip(self.nodes, self.types, strict=True):
            self._add(node, own)
        out = ModelProto()
        out.CopyFrom(ModelProto(ir_version=self.model.ir_version, producer_name=self.model.producer_name))
        out.opset_import.extend(self.model.opset_import)
        for opset in out.opset_import:
            if not opset.domain:
                opset.version = max(opset.version, OPSET_OF.get(self.precision, 0))
        source = self.model.graph
        out.graph.CopyFrom(onnx.GraphProto(name=source.name, node=self.made, input=source.input, output=source.output))
        narrow = [self._narrow(self.stored[x]) for x, t in sorted(self.wanted) if t == self.half and x in self.floats]
        set_constants(out, list({t.name: t for t in (*self.stored.values(), *narrow)}.values()))
        return out

    def _node_types(self, kept: set[int]) -> list[int]:
        """The floating type that each node computes in."""
        readers = _readers(self.nodes)
        types: list[int] = []
        made: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            # The slices of the final norm that are the outputs stay as they are: casting them twice would only round.
            last = node.op_type in MOVES and not any(o in readers for o in node.output)
            wide = i in kept or node.op_type in FLOAT_OPS or (last and made.get(node.input[0]) == FLOAT)
            types.append(FLOAT if wide else self.half)
            made.update(dict.fromkeys(node.output, types[-1]))
        return types

    def _add(self, node: NodeProto, own: int) -> None:
        new = NodeProto()
        new.CopyFrom(node)
        if node.op_type not in TYPELESS:
            new.input[:] = [self._as(x, own) if x in self.floats else x for x in node.input]
        for attribute in new.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = own
        self.made.append(new)
        for k, output in enumerate(node.output):
            if output not in self.floats:
                continue
            self.type_of[output] = own
            if output in self.outputs and own != FLOAT:
                new.output[k] = f"{output}_{self.precision}"
                self.type_of[new.output[k]] = own
                self.made.append(_cast(new.output[k], output, FLOAT))
                self.type_of[output] = FLOAT

    def _as(self, name: str, want: int) -> str:
        """The tensor in that type: a cast, shared by all who ask for it, or the constant stored so."""
        if name in self.stored:
            return name if want == FLOAT else self._narrow_name(name)
        if self.type_of[name] == want:
            return name
        if (name, want) not in self.casts:
            self.casts[name, want] = f"{name}_{'fp32' if want == FLOAT else self.precision}"
            self.made.append(_cast(name, self.casts[name, want], want))
        return self.casts[name, want]

    def _narrow_name(self, name: str) -> str:
        """A constant that is also read in FP32 has a twin; else it keeps its name, which other precisions share."""
        return f"{name}_{self.precision}" if (name, FLOAT) in self.wanted else name

    def _narrow(self, tensor: TensorProto) -> TensorProto:
        wide = torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float32, copy=True))
        narrow = wide.half() if self.precision == "fp16" else wide.bfloat16()
        if not narrow.isfinite().all():
            raise UserError(
                f"{tensor.name} holds values that are not finite in {self.precision}; "
                "train the model again or lower the learning rate."
            )
        data = narrow.view(torch.int16).numpy().tobytes()
        return TensorProto(name=self._narrow_name(tensor.name), data_type=self.half, dims=tensor.dims, raw_data=data)


def _cast(source: str, out: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [out], name=out, to=to)


def _readers(nodes: list[NodeProto]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for x in node.input:
            found.setdefault(x, []).append(i)
    return found


def _with_tail(i: int, nodes: list[NodeProto], readers: dict[str, list[int]], stored: set[str]) -> list[int]:
    """A product and what follows it element by element: bias, activation, LayerScale; the softmax behind scores."""
    found, node = [i], nodes[i]
    if node.name.endswith(".av"):
        return found
    while len(behind := readers.get(node.output[0], [])) == 1:
        follower = nodes[behind[0]]
        constant = follower.op_type in WITH_CONSTANT and any(x in stored for x in follower.input)
        scores = follower.op_type == "Softmax" and len(found) == 1
        if not (constant or scores or follower.op_type in UNARY):
            break
        found.append(behind[0])
        node = follower
        if scores:
            break
    return found


def _stream_start(nodes: list[NodeProto]) -> str | None:
    """The tokens that enter the first block: the first tensor that a LayerNormalization reads and an Add skips past it."""
    added = {x for n in nodes if n.op_type == "Add" for x in n.input}
    return next((n.input[0] for n in nodes if n.op_type in FLOAT_OPS and n.input[0] in added), None)


def _ancestors(nodes: list[NodeProto], tensor: str) -> set[int]:
    """Indices of the nodes that a tensor is computed from."""
    needed, found = {tensor}, set()
    for i in range(len(nodes) - 1, -1, -1):
        if needed.intersection(nodes[i].output):
            found.add(i)
            needed.update(nodes[i].input)
    return found


def _between(nodes: list[NodeProto], parts: list[int]) -> set[int]:
    """Indices of the nodes that read one of `parts`, directly or not, and that another of `parts` is computed from."""
    reached, after = {o for i in parts for o in nodes[i].output}, set()
    for i in range(min(parts), max(parts) + 1):
        if reached.intersection(nodes[i].input):
            after.add(i)
            reached.update(nodes[i].output)
    before: set[int] = set()
    needed = {x for i in parts for x in nodes[i].input}
    for i in range(max(parts), min(parts) - 1, -1):
        if needed.intersection(nodes[i].output):
            before.add(i)
            needed.update(nodes[i].input)
    return after & before
