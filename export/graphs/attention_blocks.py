"""Attention in an ONNX graph: QK^T, softmax, AV as separate nodes (or one Attention op), and whether one fused kernel can run it.

TensorRT's documentation ("Fused Attention") asks for two batched products around a softmax over the last axis, Q or K multiplied by the
scale (or each by its root) before the first product, and at most a mask in between. What TensorRT-RTX 1.7 fuses was found by compiling
variants: simple arithmetic in between is taken, also a late scale; activations, transposes, another axis, a softmax that is spelt
out, anything but a number times the probabilities, and scores that somebody else reads are not. Nothing is fused in FLOAT.

Shape legend: B batch, N tokens, h width of a head.
"""

from dataclasses import dataclass
from typing import Literal

from onnx import NodeProto

from export.graphs.anatomy import DEQUANTIZE, LAYOUT, QUANTIZE, Anatomy, label

FUSED_OPS = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedMultiHeadAttention"}
SCALES = {"Mul", "Div"}
HARMLESS = {"Cast", "Identity", "Dropout", "Reshape", "Squeeze", "Unsqueeze", *QUANTIZE, *DEQUANTIZE}
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "Clip", "Abs", "Neg"}  # masks and scales among them
DEPTH = 10


@dataclass(frozen=True)
class AttentionBlock:
    """One attention.

    Attributes:
        softmax, qk, av: the nodes' labels; all the same for an Attention op, `av` "" when there is none.
        scale: where the scores are scaled: before QK^T, after it, or nowhere to be seen (then it is in the weights).
        problem: what stands in the way of a fused kernel, or None.
        tokens: N, when known.
    """

    softmax: str
    qk: str
    av: str
    scale: Literal["before", "after", "none"]
    problem: str | None
    tokens: int | None

    @property
    def fusable(self) -> bool:
        return self.problem is None


def attention_blocks(anatomy: Anatomy) -> list[AttentionBlock]:
    """Every attention of a graph, in its order."""
    found: list[AttentionBlock | None] = []
    for node in anatomy.nodes:
        if node.op_type in FUSED_OPS:
            shape = anatomy.shapes.get(node.input[0])
            tokens = shape[-2] if shape is not None and len(shape) > 2 else None
            found.append(AttentionBlock(label(node), label(node), label(node), "before", None, tokens))
        elif node.op_type == "Softmax":
            found.append(_around(anatomy, node, node.input[0], None))
        elif (exponential := _spelt_out(anatomy, node)) is not None:
            reason = f"its softmax is spelt out as {exponential.op_type} and {node.op_type} instead of one Softmax"
            found.append(_around(anatomy, node, exponential.input[0], reason))
    return [b for b in found if b is not None]


def _around(anatomy: Anatomy, softmax: NodeProto, scores: str, problem: str | None) -> AttentionBlock | None:
    """The attention around a softmax, or None when it has no product of two activations above it (a classifier's softmax)."""
    up = _to_product(anatomy, scores)
    if up is None:
        return None
    qk, above = up
    av, below = _down_to_product(anatomy, softmax)
    if av is None and not _batched(anatomy, qk):
        return None
    problem = problem or _obstacle(anatomy, softmax, above, below, av)
    scale: Literal["before", "after", "none"] = "none"
    if any(n.op_type in SCALES and _scalar_operand(anatomy, n) for n in above):
        scale = "after"
    elif any(_scaled(anatomy, name) for name in qk.input[:2]):
        scale = "before"
    shape = anatomy.shapes.get(qk.output[0])
    tokens = shape[-1] if shape else None
    return AttentionBlock(label(softmax), label(qk), label(av) if av is not None else "", scale, problem, tokens)


def _obstacle(
    anatomy: Anatomy, softmax: NodeProto, above: list[NodeProto], below: list[NodeProto], av: NodeProto | None
) -> str | None:
    if av is None:
        return "no product with V follows its softmax"
    for node in above:
        if node.op_type not in ARITHMETIC | HARMLESS:
            return f"{node.op_type} {label(node)} stands between QK^T and the softmax"
    for node in below:
        if node.op_type not in HARMLESS and not (node.op_type in SCALES and _scalar_operand(anatomy, node)):
            return f"{node.op_type} {label(node)} stands between the softmax and the product with V"
    for node in (*above, softmax):
        if anatomy.outputs.intersection(node.output):
            return f"what {label(node)} makes is also an output"
        if len(shared := [n for o in node.output for n in anatomy.readers[o]]) > 1:
            others = [label(n) for n in shared if n.op_type not in HARMLESS and label(n) not in (label(softmax), label(av))]
            return f"what {label(node)} makes is also read by {(others or [label(shared[-1])])[0]}"
    if softmax.op_type == "Softmax":
        rank = len(anatomy.shapes.get(softmax.output[0], ()))
        axis = anatomy.attribute(softmax, "axis", -1 if anatomy.opsets.get("", 13) >= 13 else 1)
        if axis != -1 and rank and axis != rank - 1:
            return f"its softmax runs over axis {axis}, not over the last"
    return None


def _to_product(anatomy: Anatomy, name: str) -> tuple[NodeProto, list[NodeProto]] | None:
    """The nearest product of two activations above a tensor, and what lies on the way, from the tensor up."""
    queue: list[tuple[str, list[NodeProto]]] = [(name, [])]
    while queue:
        tensor, path = queue.pop(0)
        node = anatomy.made.get(tensor)
        if node is None or tensor in anatomy.constant or len(path) > DEPTH:
            continue
        if node.op_type in ("MatMul", "Gemm", "Einsum", "FusedMatMul"):
            if len(node.input) > 1 and not anatomy.constant.intersection(map(anatomy.above, node.input[:2])):
                return node, path
            continue
        if node.op_type in ("LayerNormalization", "Conv", "Softmax"):
            continue
        queue.extend((i, [*path, node]) for i in node.input if i)
    return None


def _down_to_product(anatomy: Anatomy, softmax: NodeProto) -> tuple[NodeProto | None, list[NodeProto]]:
    """The nearest product below a softmax and what lies on the way."""
    queue: list[tuple[str, list[NodeProto]]] = [(softmax.output[0], [])]
    while queue:
        tensor, path = queue.pop(0)
        for node in anatomy.readers[tensor]:
            if node.op_type in ("MatMul", "Gemm", "Einsum", "FusedMatMul"):
                return node, path
            if len(path) < DEPTH:
                queue.append((node.output[0], [*path, node]))
    return None, []


def _spelt_out(anatomy: Anatomy, node: NodeProto) -> NodeProto | None:
    """The Exp of a softmax that is written as exp(x) / sum(exp(x)), when `node` is its division."""
    if node.op_type != "Div":
        return None
    above, total = (anatomy.made.get(anatomy.above(i, {"Cast", "Identity"})) for i in node.input[:2])
    if above is None or total is None or above.op_type != "Exp" or total.op_type != "ReduceSum":
        return None
    return above if anatomy.above(total.input[0], {"Cast", "Identity"}) == above.output[0] else None


def _batched(anatomy: Anatomy, product: NodeProto) -> bool:
    return len(anatomy.shapes.get(product.output[0], ())) >= 3


def _scalar_operand(anatomy: Anatomy, node: NodeProto) -> bool:
    return any(anatomy.scalar(i) for i in node.input)


def _scaled(anatomy: Anatomy, name: str) -> bool:
    """Whether a product's operand was multiplied by a number, behind layout and quantization."""
    node = anatomy.made.get(anatomy.above(name, LAYOUT | QUANTIZE | DEQUANTIZE))
    return node is not None and node.op_type in SCALES and _scalar_operand(anatomy, node)
