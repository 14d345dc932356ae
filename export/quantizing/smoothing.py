"""SmoothQuant (arXiv 2211.10438): where a layer's input channels can be scaled for free, and by how much.

A Linear layer's input x [.., K] is divided by s [K] and the rows of its weight multiplied by it: the product is the same, but the
channels of x are more alike, so one step for all of them wastes less. The division costs nothing where it can be folded into what
makes x: a LayerNorm's weight and bias, the value rows of qkv (attention averages values, whatever their scale), or the linear half
of a SwiGLU. GELU's output has no such producer.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.graphs.nodes import LINEAR_OPS, serialize, set_constants
from export.quantizing.plan import attention_roles, value_shapes

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity", "Cast")


@dataclass(frozen=True)
class Fold:
    """Where the factors of a tensor go: a LayerNorm's output, or columns [K] of a Linear layer's output.

    Attributes:
        kind: `norm` or `linear`. node: the LayerNorm's output tensor, or the Linear layer's name.
        columns: of the Linear layer, one for every channel of the tensor.
    """

    kind: Literal["norm", "linear"]
    node: str
    columns: np.ndarray | None = None


def find_folds(model: ModelProto, attention: bool) -> dict[str, Fold]:
    """Tensor name -> its fold, for every tensor that only Linear layers read and whose maker can take the factors.

    Args:
        attention: the product of attention weights and values is quantized: values then stay as they are, they have a scale of their own.
    """
    constants = {t.name for t in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {o.name for o in model.graph.output}
    finder = _Finder(model, constants, makers, readers, outputs)
    inputs = {n.input[0] for n in model.graph.node if n.op_type in LINEAR_OPS and n.input[1] in constants}
    folds = {}
    for tensor in sorted(inputs & set(makers)):
        if all(n.op_type in LINEAR_OPS and n.input[1] in constants for n in readers[tensor]) and tensor not in outputs:
            fold = finder.norm(tensor) or finder.gated(tensor) or (None if attention else finder.values(tensor))
            if fold is not None:
                folds[tensor] = fold
    return folds


@dataclass
class _Finder:
    model: ModelProto
    constants: set[str]
    makers: dict[str, NodeProto]
    readers: dict[str, list[NodeProto]]
    outputs: set[str]

    def __post_init__(self) -> None:
        self.roles, self.shapes = attention_roles(self.model), value_shapes(self.model)

    def norm(self, tensor: str) -> Fold | None:
        node = self.makers[tensor]
        while node.op_type == "Cast" and node.input[0] in self.makers and len(self.readers[node.input[0]]) == 1:
            node = self.makers[node.input[0]]
        if node.op_type != "LayerNormalization" or any(i and i not in self.constants for i in node.input[1:]):
            return None
        return None if node.output[0] in self.outputs else Fold("norm", node.output[0])

    def gated(self, tensor: str) -> Fold | None:
        """SwiGLU: x = silu(a) * b with a and b halves of one Linear layer's output; b is linear."""
        node = self.makers[tensor]
        if node.op_type != "Mul":
            return None
        for operand in node.input:
            if (found := self._climb(operand)) is not None and len(self.readers[operand]) == 1:
                return self._columns(*found, [], operand, tensor)
        return None

    def values(self, tensor: str) -> Fold | None:
        """Values: x comes out of AV by moves only, and V out of a Linear layer by moves only."""
        after: list[NodeProto] = []
        node = self.makers[tensor]
        while node.op_type in MOVES and node.input[0] in self.makers and len(self.readers[node.input[0]]) == 1:
            after.insert(0, node)
            node = self.makers[node.input[0]]
        if node.op_type != "MatMul" or self.roles.get(node.name) != "av" or len(self.readers[node.input[1]]) != 1:
            return None
        found = self._climb(node.input[1])
        if found is None:
            return None
        if after:
            first = NodeProto()
            first.CopyFrom(after[0])
            first.input[0] = node.input[1]  # what is the same for every token, attention leaves as it is
            after = [first, *after[1:]]
        return self._columns(*found, after, node.input[1], tensor)

    def _climb(self, tensor: str) -> tuple[NodeProto, list[NodeProto]] | None:
        """(Linear layer, [its bias Add or itself, moves ...]) that make a tensor."""
        path: list[NodeProto] = []
        node = self.makers.get(tensor)
        while node is not None and node.op_type in MOVES:
            path.insert(0, node)
            node = self.makers.get(node.input[0])
        if node is None:
            return None
        layer = node
        if node.op_type == "Add":
            others = [i for i in node.input if i not in self.constants]
            if len(others) != 1 or others[0] not in self.makers or len(self.readers[others[0]]) != 1:
                return None
            layer = self.makers[others[0]]
        if layer.op_type not in LINEAR_OPS or layer.input[1] not in self.constants:
            return None
        return layer, [node, *path]

    def _columns(
        self, layer: NodeProto, path: list[NodeProto], after: list[NodeProto], middle: str, tensor: str
    ) -> Fold | None:
        """Send the numbers of the Linear layer's columns through the moves and see which arrive where."""
        source = path[0].output[0]
        shape, out = self.shapes.get(source), self.shapes.get(tensor)
        if shape is None or out is None:
            return None
        moves = [*path[1:], *after]
        wanted = after[-1].output[0] if after else middle  # of a Split not always the first output
        if not moves:
            columns = np.arange(shape[-1])
        else:
            numbers = np.broadcast_to(np.arange(shape[-1], dtype=np.float32), shape)
            found = _run_moves(self.model, moves, source, numbers, wanted)
            if found is None or found.shape != tuple(out):
                return None
            flat = found.reshape(-1, out[-1])
            if (flat != flat[0]).any():
                return None
            columns = flat[0].astype(int)
        if len(columns) != out[-1] or len(set(columns.tolist())) != len(columns):
            return None
        whole = len(columns) == shape[-1]  # then nobody else may read the layer's output
        if whole and any(len(self.readers[n.output[0]]) != 1 for n in path):
            return None
        return Fold("linear", layer.name, columns)


def _run_moves(model: ModelProto, moves: list[NodeProto], source: str, values: np.ndarray, wanted: str) -> np.ndarray | None:
    nodes = []
    for node in moves:
        copy = NodeProto()
        copy.CopyFrom(node)
        if node.op_type == "Cast":
            copy.op_type = "Identity"
            del copy.attribute[:]
        nodes.append(copy)
    graph = helper.make_graph(
        nodes,
        "moves",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, list(values.shape))],
        [helper.make_empty_tensor_value_info(wanted)],
    )
    small = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    set_constants(small, list(model.graph.initializer))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(serialize(small), options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run([wanted], {source: np.ascontiguousarray(values)})[0])
    except Exception:  # a shape that the graph computes elsewhere: this path cannot be followed
        return None


def smoothing_factors(peaks: np.ndarray, weight_peaks: np.ndarray, alpha: float) -> np.ndarray:
    """SmoothQuant's s [K] = max|x|^alpha / max|w|^(1 - alpha), about a geometric mean of 1; dead channels keep 1."""
    alive = (peaks > 0) & (weight_peaks > 0)
    factors = np.ones(len(peaks))
    if alive.any():
        logs = alpha * np.log(peaks[alive]) - (1 - alpha) * np.log(weight_peaks[alive])
        factors[alive] = np.exp(np.clip(logs - logs.mean(), -8, 8))
    return factors
