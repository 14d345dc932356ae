"""Run a graph on many images piece by piece, stopping at every layer to be quantized.

The graph is cut before each of those layers. Between two cuts only the values that later pieces read are kept, so a layer's
inputs on all images are at hand while its scale, its smoothing and its rounding are chosen, and what was chosen can be put into
effect before the next layer is looked at. Two passes may go through the same pieces: one in floating point, one in which every
layer so far has its quantized input and weight.
"""

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.graphs.nodes import INPUT, element_types, serialize, set_constants
from export.sessions import exact_session

LIVE_BYTES = 2**31  # of all images together; more images than fit are left out
PIECE_BYTES = 2**27  # of one piece's outputs in one run


class Pieces:
    """The pieces of a graph: piece i begins with the layer of cut i - 1 and ends before that of cut i; piece 0 has no layer.

    A layer's input, weight and, added to its output, a shift of its bias are inputs of its piece: `run` fills them in.
    """

    def __init__(self, model: ModelProto, cuts: list[str]):
        nodes = list(model.graph.node)
        names = {n.name: i for i, n in enumerate(nodes)}
        self.cuts, self.starts = cuts, [0, *(names[c] for c in cuts), len(nodes)]
        assert self.starts == sorted(self.starts)
        self.types, self.model, self.nodes = element_types(model), model, nodes
        self.constants = {t.name for t in model.graph.initializer}
        outputs = {o.name for o in model.graph.output}
        self.last_use = {o: len(nodes) for o in outputs}
        for i, node in enumerate(nodes):
            for name in node.input:
                self.last_use[name] = max(i, self.last_use.get(name, 0))

    def layer(self, i: int) -> NodeProto:
        """The layer before which piece i ends."""
        return self.nodes[self.starts[i + 1]]

    def session(self, i: int, fed: list[int]) -> "Piece":
        """Piece i as a session; `fed` are the inputs of its first node that `Piece.run` is given."""
        start, stop = self.starts[i], self.starts[i + 1]
        nodes = [NodeProto() for _ in range(stop - start)]
        for copy, node in zip(nodes, self.nodes[start:stop], strict=True):
            copy.CopyFrom(node)
        extra: dict[str, int] = {}
        if i:
            first = nodes[0]
            float_type = self.types[first.output[0]]
            for k in fed:
                first.input[k] = f"fed.{k}"
                extra[f"fed.{k}"] = TensorProto.DataType.Value(float_type)
            shifted = helper.make_node("Add", ["fed.unshifted", "fed.shift"], [first.output[0]], name="fed.shift")
            first.output[0] = "fed.unshifted"
            extra["fed.shift"] = TensorProto.DataType.Value(float_type)
            nodes.insert(1, shifted)
        made = {o for n in nodes for o in n.output}
        read = [name for n in nodes for name in n.input if name]
        needed = [t for t in dict.fromkeys(read) if t not in made and t not in self.constants and t not in extra]
        outputs = [o for n in nodes for o in n.output if o and self.last_use.get(o, -1) >= stop and o in self.types]
        values = {t: TensorProto.DataType.Value(self.types[t]) for t in needed} | extra
        graph = helper.make_graph(
            nodes,
            "piece",
            [helper.make_tensor_value_info(n, t, None) for n, t in values.items()],
            [helper.make_empty_tensor_value_info(o) for o in outputs],
        )
        small = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        set_constants(small, list(self.model.graph.initializer))
        return Piece(serialize(small), needed, outputs)

    def survivors(self, i: int) -> set[str]:
        """Values that piece i + 1 or a later one reads."""
        stop = self.starts[i + 1]
        return {name for name, last in self.last_use.items() if last >= stop}


class Piece:
    """A session over one piece."""

    def __init__(self, data: bytes, needed: list[str], outputs: list[str]):
        self.needed, self.outputs = needed, outputs
        self.session = None
        if outputs:
            self.session = exact_session(data, spinning=False)

    def run(self, live: dict[str, np.ndarray], fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The piece's outputs from the values that are alive and those that are fed."""
        if self.session is None:
            return {}
        found = self.session.run(self.outputs, {n: live[n] for n in self.needed} | fed)
        return dict(zip(self.outputs, found, strict=True))


class Walk:
    """The values that are alive at a cut, for chunks of images."""

    def __init__(self, images: np.ndarray, chunk: int):
        self.chunks = [{INPUT: images[i : i + chunk]} for i in range(0, len(images), chunk)]

    def values(self, name: str) -> Iterator[np.ndarray]:
        for live in self.chunks:
            yield live[name]

    def keep(self, names: set[str]) -> None:
        for live in self.chunks:
            for name in [n for n in live if n not in names]:
                del live[name]

    def nbytes(self) -> int:
        return sum(v.nbytes for live in self.chunks for v in live.values())
