"""Proof of precision: which share of a network's matrix-product FLOPs runs in which type, read from the graph, never from a name.

A file called int8 whose products are FLOAT16 is refused here (`refuse`). The graph proves what was *asked*; what a compiler made of
it is read by `export/engine_proof.py` from the engine's inspector or from the compiled plan.

    y[M, N] = a[M, K] b[K, N] costs 2 M K N FLOPs; a convolution 2 (outputs) (inputs a output sees); the batch is 1.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal

from onnx import ModelProto, NodeProto

from distill.errors import GateFailed
from export.artifact import Precision
from export.graphs.anatomy import DEQUANTIZE, FLOATS, Anatomy, label
from export.graphs.attention_blocks import FUSED_OPS, attention_blocks

CLAIMS: dict[Precision, str] = {
    "fp32": "FLOAT",
    "fp16": "FLOAT16",
    "bf16": "BFLOAT16",
    "int8": "INT8",
    "fp8": "FP8",
    "w8": "INT8-weight",
    "w4": "INT4-weight",
}
QUANTIZED_CLAIMS = ("int8", "fp8", "w8", "w4")
CURES = {
    "w4": " Where its widths are no multiples of quantize.block, prune with a round_to that is, lower the block, or leave the target out."
}
# Operators that compute in 8-bit integers whatever surrounds them, and where their operands are.
INTEGER_OPS = {
    "QLinearMatMul": (0, 3),
    "QLinearConv": (0, 3),
    "MatMulInteger": (0, 1),
    "ConvInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "QGemm": (0, 3),
}
FLOAT_OPS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "FusedMatMul", "FusedConv", "FusedGemm", "Einsum")


@dataclass(frozen=True)
class Product:
    """A matrix product: the node's name and operator, the type that it runs in (FLOAT16, INT8, INT4-weight, ...), FLOPs at batch 1
    (None when its shapes are unknown), and whether it is a linear layer (one operand a weight), a convolution or one of attention.
    """

    name: str
    op: str
    type: str
    flops: int | None
    kind: Literal["linear", "conv", "attention"]


@dataclass(frozen=True)
class Proof:
    """What a network's matrix products run in.

    Attributes:
        source: "graph", "engine inspector" or "compiled plan".
        casts: Casts between float types on activations. reformats: copies between memory layouts, None where unknown.
        qdq_pairs: activations that are quantized and read back.
        attention: {"blocks", "fusable", "fused"}; fused is None until an engine says.
        layers: nodes of the graph or layers of the engine. notes: sentences on what is not as hoped or not known.
    """

    source: Literal["graph", "engine inspector", "compiled plan"]
    products: tuple[Product, ...]
    casts: int
    reformats: int | None
    qdq_pairs: int
    attention: dict[str, int | None]
    layers: int
    notes: tuple[str, ...] = field(default=())

    def flops_share(self, kinds: Collection[str] = ("linear", "conv", "attention")) -> dict[str, float]:
        """Share of the FLOPs of these kinds of products by type, largest first; {} when no FLOPs are known."""
        flops: dict[str, int] = {}
        for p in self.products:
            if p.kind in kinds and p.flops:
                flops[p.type] = flops.get(p.type, 0) + p.flops
        total = sum(flops.values())
        return {k: v / total for k, v in sorted(flops.items(), key=lambda kv: -kv[1])}

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "flops_share": {k: round(v, 6) for k, v in self.flops_share().items()},
            "linear_flops_share": {k: round(v, 6) for k, v in self.flops_share(("linear",)).items()},
            "casts": self.casts,
            "reformats": self.reformats,
            "qdq_pairs": self.qdq_pairs,
            "attention": self.attention,
            "layers": self.layers,
            "notes": list(self.notes),
        }


def prove(model: ModelProto | Anatomy, claimed: Precision | None = None) -> Proof:
    """Count a graph's matrix products by the type that they run in.

    A product is INT8 or FP8 when both operands come out of Q/DQ of that type; INT8-weight or INT4-weight when only the weight does;
    else it is of its output's element type. `claimed` adds a note naming the products that are not of that precision.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy(model)
    blocks = attention_blocks(anatomy)
    inside = {name for b in blocks for name in (b.qk, b.av)}
    products = tuple(p for node in anatomy.nodes if (p := _product(anatomy, node, inside)) is not None)
    notes = []
    if unknown := [p.name for p in products if p.flops is None]:
        notes.append(
            f"the shapes of {len(unknown)} of {len(products)} products are unknown ({unknown[0]}): left out of the shares"
        )
    if claimed is not None and (others := [p for p in products if p.type != CLAIMS[claimed] and p.kind == "linear"]):
        notes.append(f"{len(others)} linear layers are not {CLAIMS[claimed]}: {_names([p.name for p in others])}")
    if slow := [b for b in blocks if not b.fusable]:
        notes.append(
            f"{len(slow)} of {len(blocks)} attentions do not fit a fused kernel ({slow[0].softmax}: {slow[0].problem})"
        )
    return Proof(
        source="graph",
        products=products,
        casts=sum(_is_cast(anatomy, n) for n in anatomy.nodes),
        reformats=None,
        qdq_pairs=sum(_is_pair(anatomy, n) for n in anatomy.nodes),
        attention={"blocks": len(blocks), "fusable": len(blocks) - len(slow), "fused": None},
        layers=len(anatomy.nodes),
        notes=tuple(notes),
    )


def refuse(
    proof: Proof,
    claimed: Precision,
    name: str = "the graph",
    kept: Collection[str] | None = None,
    least_share: float = 0.5,
) -> None:
    """Fail when a network does not run in the precision that its name claims.

    fp32, fp16, bf16: every product must have that type. int8, fp8, w8, w4: every linear layer, and together they must hold at least
    `least_share` of the linear FLOPs. Convolutions and attention products may be quantized or not.

    Args:
        kept: names or patterns (`blocks.0.*`) of layers that the plan leaves in another type on purpose. None when there is no plan to
            hold against (a foreign file): then only the share counts.

    Raises:
        GateFailed: naming the first layer that is of another type.
    """
    want = CLAIMS[claimed]
    kinds = ("linear",) if claimed in QUANTIZED_CLAIMS else ("linear", "conv", "attention")
    judged = [p for p in proof.products if p.kind in kinds]
    if not judged:
        raise GateFailed(f"{name} is called {claimed} but holds no matrix product.")
    wrong = [p for p in judged if p.type != want]
    unplanned = [p for p in wrong if not any(fnmatchcase(p.name, k) for k in kept or ())]
    share = proof.flops_share(kinds).get(want, 0.0)
    if not any(p.flops for p in judged):  # no shapes: numbers of layers stand in for their FLOPs
        share = 1 - len(wrong) / len(judged)
    if kept is not None and unplanned:
        raise GateFailed(
            f"{name} is called {claimed} but {len(unplanned)} of its {len(judged)} products are not {want} and no plan keeps them so: "
            f"{unplanned[0].name} is {unplanned[0].type or 'of unknown type'}."
        )
    if share < least_share:
        raise GateFailed(
            f"{name} is called {claimed} but only {share:.0%} of its FLOPs are {want}: "
            f"{wrong[0].name} is {wrong[0].type or 'of unknown type'}.{CURES.get(claimed, '')}"
        )


def with_products(proof: Proof, types: dict[str, str]) -> tuple[Product, ...]:
    """The products of a proof with the types that an engine runs them in, by name; what it does not name stays as the graph says."""
    return tuple(replace(p, type=types.get(p.name, p.type)) for p in proof.products)


def _product(anatomy: Anatomy, node: NodeProto, attention: set[str]) -> Product | None:
    op, name = node.op_type, label(node)
    if op in FUSED_OPS:
        return Product(name, op, anatomy.types[node.output[0]], _attention_flops(anatomy, node), "attention")
    if op == "MatMulNBits":
        weight = f"INT{anatomy.attribute(node, 'bits', 4)}-weight"
        return Product(name, op, weight, _matmul_flops(anatomy, node), "linear")
    if op in INTEGER_OPS:
        kind: Literal["linear", "conv", "attention"] = "conv" if "Conv" in op else "linear"
        return Product(name, op, "INT8", _flops(anatomy, node, *INTEGER_OPS[op]), kind)
    if op not in FLOAT_OPS or len(node.input) < 2 or node.output[0] in anatomy.constant:
        return None
    weights = [i for i in node.input[:2] if i in anatomy.constant]
    kind = "conv" if "Conv" in op else "attention" if name in attention or not weights else "linear"
    return Product(name, op, _type(anatomy, node), _flops(anatomy, node, 0, 1), kind)


def _type(anatomy: Anatomy, node: NodeProto) -> str:
    """The type that a product runs in, by how its operands were quantized."""
    quantized = [anatomy.quantizer(i) for i in node.input[:2]]
    families = {q.family for q in quantized if q is not None}
    if None not in quantized and len(families) == 1 and any(not q.constant for q in quantized if q is not None):
        return families.pop()
    weight = next((q for q in quantized if q is not None and q.constant), None)
    if weight is not None:
        return f"{weight.family}-weight"
    return next((t for name in (node.output[0], *node.input[:2]) if (t := anatomy.types[name])), "")


def _flops(anatomy: Anatomy, node: NodeProto, left: int, right: int) -> int | None:
    a, b = anatomy.shapes.get(node.input[left]), anatomy.shapes.get(node.input[right])
    out = anatomy.shapes.get(node.output[0])
    if "Conv" in node.op_type:
        if b is None or (seen := a if node.op_type == "ConvTranspose" else out) is None:
            return None
        return 2 * prod(seen) * prod(b[1:])
    if node.op_type == "Einsum":
        return _einsum_flops(anatomy, node)
    if a is None or not a:
        return _unshaped(out, b)
    depth = a[-1] if not anatomy.attribute(node, "transA", 0) else a[-2]
    return 2 * prod(out) * depth if out is not None else None


def _unshaped(out: tuple[int, ...] | None, b: tuple[int, ...] | None) -> int | None:
    return 2 * prod(out) * b[-2] if out is not None and b is not None and len(b) > 1 else None


def _einsum_flops(anatomy: Anatomy, node: NodeProto) -> int | None:
    equation = anatomy.attribute(node, "equation", b"").decode().replace(" ", "").split("->")[0]
    sizes: dict[str, int] = {}
    for term, name in zip(equation.split(","), node.input, strict=False):
        shape = anatomy.shapes.get(name)
        if shape is None or len(term) != len(shape):  # unknown, or an ellipsis
            return None
        sizes.update(zip(term, shape, strict=True))
    return 2 * prod(sizes.values())


def _matmul_flops(anatomy: Anatomy, node: NodeProto) -> int | None:
    shape = anatomy.shapes.get(node.input[0])
    return None if shape is None else 2 * prod(shape) * int(anatomy.attribute(node, "N", 0))


def _attention_flops(anatomy: Anatomy, node: NodeProto) -> int | None:
    """QK^T and AV of one Attention op: 4 N^2 D for [1, N, D] or [1, heads, N, h] inputs."""
    shape = anatomy.shapes.get(node.input[0])
    return None if shape is None or len(shape) < 3 else 4 * prod(shape) * shape[-2]


def _is_cast(anatomy: Anatomy, node: NodeProto) -> bool:
    if node.op_type != "Cast" or node.output[0] in anatomy.constant:
        return False
    return {anatomy.types[node.input[0]], anatomy.types[node.output[0]]} <= FLOATS


def _is_pair(anatomy: Anatomy, node: NodeProto) -> bool:
    if node.op_type not in DEQUANTIZE:
        return False
    found = anatomy.quantizer(node.output[0])
    return found is not None and found.quantize is not None and not found.constant


def _names(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
