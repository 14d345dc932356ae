"""Rules on floating point: names that lie, overflow and NaN, and casts that cost time."""

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto

from export.graphs.anatomy import DEQUANTIZE, FLOATS, LAYOUT, QUANTIZE, Anatomy, label
from export.linting.lint_rules import Case, Hit, rule, rules_of
from export.proof import CLAIMS, QUANTIZED_CLAIMS

LARGEST_HALF = 65504.0
# Where an infinity is a mask or a bound and no accident.
MASKING = {
    "Where",
    "Max",
    "Min",
    "Clip",
    "Pad",
    "Add",
    "Equal",
    "Less",
    "Greater",
    "ConstantOfShape",
    "Expand",
    "IsInf",
    "ScatterND",
}
LEAST_SHARE = 0.5


@rule(
    "precision-mismatch",
    "error",
    reason="runtimes that take the graph literally run what is written, whatever the file is called",
    cure="Export in that precision (the types, or the Q/DQ pairs, must be in the graph), or rename the file.",
)
def precision_mismatch(case: Case) -> Iterator[Hit]:
    """A file whose products do not run in the precision that its name claims."""
    if case.precision is None:
        return
    want = CLAIMS[case.precision]
    kinds = ("linear",) if case.precision in QUANTIZED_CLAIMS else ("linear", "conv", "attention")
    judged = [p for p in case.proof.products if p.kind in kinds and p.type]  # an ill-formed graph leaves types open
    wrong = [p for p in judged if p.type != want]
    if not judged or not wrong:
        return
    shares = case.proof.flops_share(kinds)
    share = shares.get(want, 0.0) if shares else 1 - len(wrong) / len(judged)
    floats = {"FLOAT"} if case.precision in ("fp16", "bf16") else {"FLOAT", "FLOAT16", "BFLOAT16"}
    deliberate = share >= LEAST_SHARE and (case.precision in QUANTIZED_CLAIMS or {p.type for p in wrong} <= floats)
    severity = "note" if deliberate else "error"  # layers that are kept in floating point
    said = f"{case.name} claims {case.precision}, but {len(wrong)} of {len(judged)} products are not {want} ({wrong[0].type})"
    for p in wrong:
        yield Hit(p.name, said, severity=severity)  # type: ignore[arg-type]


@rule(
    "nan-weights",
    "error",
    reason="one of them makes every output NaN",
    cure="Export again from a checkpoint without it: its training diverged, or a conversion overflowed.",
)
def nan_weights(case: Case) -> Iterator[Hit]:
    """A weight that holds NaN, or infinity outside FLOAT16."""
    anatomy = case.anatomy
    for name, tensor in _floats(anatomy):
        values = None if _is_scale(anatomy, name) else anatomy.value(name)  # of scales bad-scale speaks
        if values is None:
            continue
        wide = _wide(values)
        nan = int(np.isnan(wide).sum())
        infinite = int(np.isinf(wide).sum()) if tensor != "FLOAT16" and not _masks(anatomy, name) else 0
        if nan or infinite:
            yield Hit(name, f"{name} holds {nan or infinite} {'NaN' if nan else 'infinite'} of {wide.size} values")


@rule(
    "fp16-overflow",
    "error",
    reason="FLOAT16 ends at 65504: larger numbers become infinity and the outputs NaN",
    cure="Keep that layer in FLOAT between casts, use BFLOAT16, or scale the weights down.",
)
def fp16_overflow(case: Case) -> Iterator[Hit]:
    """A weight that FLOAT16 cannot hold: infinite already, or too large and about to be cast."""
    anatomy = case.anatomy
    half_name = case.precision == "fp16"
    for name, tensor in _floats(anatomy):
        cast = tensor == "FLOAT" and any(
            r.op_type == "Cast" and anatomy.types[r.output[0]] == "FLOAT16" for r in anatomy.readers[name]
        )
        if not (tensor == "FLOAT16" or cast or (half_name and tensor == "FLOAT")) or _masks(anatomy, name):
            continue
        values = anatomy.value(name)
        if values is None or not values.size or _is_scale(anatomy, name):
            continue
        peak = float(np.nanmax(np.abs(_wide(values)), initial=0.0))
        if peak > LARGEST_HALF:
            what = "an infinity" if np.isinf(peak) else f"{peak:.3g}"
            yield Hit(name, f"{name} ({tensor}) holds {what}")


@rule(
    "fp16-layernorm",
    "warning",
    reason="the sum of squares overflows FLOAT16 as soon as an activation exceeds 255, as those of trained ViTs do",
    cure="Cast to FLOAT in front of the norm and back behind it (export from decant does).",
)
def fp16_layernorm(case: Case) -> Iterator[Hit]:
    """A LayerNorm, or its squares, in FLOAT16."""
    anatomy = case.anatomy
    for node in anatomy.nodes:
        if node.op_type.endswith("LayerNormalization") and anatomy.types[node.input[0]] == "FLOAT16":
            if anatomy.attribute(node, "stash_type", 1) == 1 and node.op_type == "LayerNormalization":
                detail = f"{label(node)} reads FLOAT16 and asks for FLOAT inside, which not every runtime does"
                yield Hit(label(node), detail, "stash", "note")
            else:
                yield Hit(label(node), f"{label(node)} computes in FLOAT16", "op")
        elif node.op_type == "Pow" and anatomy.types[node.output[0]] == "FLOAT16" and _feeds_mean(anatomy, node):
            yield Hit(label(node), f"{label(node)} squares in FLOAT16 for a mean", "chain")


@rule(
    "cast-ping-pong",
    "warning",
    reason="each is a pass over the whole tensor, and it separates layers that would be fused",
    cure="Remove both; if the second narrows, once is enough.",
)
def cast_ping_pong(case: Case) -> Iterator[Hit]:
    """A cast of a cast, or a cast to the type that a tensor has."""
    anatomy = case.anatomy
    for node in anatomy.nodes:
        if node.op_type != "Cast" or node.output[0] in anatomy.constant:
            continue
        source, to = anatomy.types[node.input[0]], anatomy.types[node.output[0]]
        if source not in FLOATS or to not in FLOATS:
            continue
        if source == to:
            yield Hit(label(node), f"{label(node)} casts {source} to {to}", "same", "note")  # most runtimes drop it
            continue
        before = anatomy.made.get(anatomy.above(node.input[0], LAYOUT - {"Cast"}))
        if before is not None and before.op_type == "Cast" and anatomy.types[before.input[0]] == to:
            yield Hit(label(node), f"{label(before)} and {label(node)} cast {to} to {source} and back", "back")


def _floats(anatomy: Anatomy) -> Iterator[tuple[str, str]]:
    for name in anatomy.stored:
        if anatomy.types[name] in FLOATS:
            yield name, anatomy.types[name]


def _is_scale(anatomy: Anatomy, name: str) -> bool:
    readers = anatomy.readers[name]
    return bool(readers) and all(r.op_type in QUANTIZE | DEQUANTIZE and list(r.input).index(name) == 1 for r in readers)


def _wide(values: np.ndarray) -> np.ndarray:
    return values if values.dtype in (np.float16, np.float32, np.float64) else values.astype(np.float32)


def _masks(anatomy: Anatomy, name: str) -> bool:
    """Whether a constant serves as a mask or a bound: all its readers are operators that take one, and it has few distinct values."""
    readers: list[NodeProto] = anatomy.readers[name]
    if not readers or any(r.op_type not in MASKING for r in readers):
        return False
    values = anatomy.value(name)
    return values is not None and len(np.unique(values)) <= 2


def _feeds_mean(anatomy: Anatomy, node: NodeProto) -> bool:
    return any(r.op_type == "ReduceMean" for r in anatomy.readers[node.output[0]])


RULES = rules_of(globals())
