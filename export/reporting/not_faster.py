"""Why a quantized file is not faster here: what was measured about it, and the usual reason that these facts point to."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill.rows import Row
from export.reporting import bars, tables
from export.reporting.labels import label_of, precision_of
from export.reporting.tables import Book

VERDICTS = {"SLOWER": "slower than FP32", "INCONCLUSIVE": "not measurably faster or slower than FP32"}
QUANTIZED = ("int8", "fp8", "w8", "w4")
COUNTED = {
    "qdq_pairs": "activations that are quantized and read back",
    "casts": "casts between float types",
    "reformats": "copies between memory layouts",
}
INTEGER = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")  # instructions for INT8 products
LOW_SHARE = 0.8  # below this share of the work in eight bits, what stays in floating point decides the time
SMALL_MFLOPS = 200.0  # an image's work below which calls and conversions cost as much as products


def not_faster(
    subject: str, target: str, book: Book, proof: Any, plan: Any, fingerprint: Mapping[str, Any] | None = None
) -> str | None:
    """The paragraph on one file; None for one that is not quantized, was not compared, or is FASTER.

    Args:
        proof, plan: of artifact.json at the resolution shown; None where there is none.
        fingerprint: of the machine that measured, for what its processor can.
    """
    if precision_of(target) not in QUANTIZED:
        return None
    row = _ratio(subject, target, book)
    if row is None or row.value is None:
        return None
    interval = "" if row.low is None or row.high is None else f", interval {row.low:.2f} to {row.high:.2f}"
    said = f"{label_of(subject, target)} is {VERDICTS[row.conditions['verdict']]} at batch {row.conditions.get('batch', 1)} "
    said += f"(×{row.value:.2f} of its time{interval})."
    shares = proof.get("flops_share") if isinstance(proof, dict) else None
    if shares:
        said += f" Of its matrix products' FLOPs run: {shares_text(shares)}."
        counts = [f"{proof[k]} {words}" for k, words in COUNTED.items() if isinstance(proof.get(k), int) and proof[k] > 0]
        said += f" Around them stand {' and '.join(counts)}." if counts else ""
        said += f" Attention: {attention_text(proof.get('attention') or {})}."
    else:
        said += " What its products run in was not read from the file."
    work = sum(e.get("mflops") or 0.0 for e in plan or [] if isinstance(e, dict))
    said += f" All products of an image are {_flops(work)}." if work else ""
    return said + "".join(f" {reason}" for reason in _reasons(target, row, shares, work, fingerprint))


def _ratio(subject: str, target: str, book: Book) -> Row | None:
    """At the smallest batch, where the verdict is not FASTER."""
    ratios = book.all("latency_ratio", subject, target, resolution=book.side(subject, target))
    ratios = [r for r in ratios if r.value and r.conditions.get("versus") in (f"{subject}/onnx-fp32", f"{subject}/torch-fp32")]
    row = min(ratios, key=lambda r: r.conditions.get("batch", 1), default=None)
    return row if row is not None and row.conditions.get("verdict") in VERDICTS else None


def _reasons(
    target: str, row: Row, shares: Mapping[str, float] | None, work: float, fingerprint: Mapping[str, Any] | None
) -> list[str]:
    """What usually explains such facts; each only where its fact was found."""
    found = []
    precision = precision_of(target)
    if precision in ("w8", "w4"):
        found.append("Only its weights are small: products run in floating point, so it saves memory and not time.")
    elif shares:
        small = sum(v for t, v in shares.items() if t in ("INT8", "FP8"))
        if small < LOW_SHARE:
            found.append(
                f"{100 * (1 - small):.0f}\u00a0% of the work is not in {precision.upper()}: that part is as slow as before."
            )
    features = ((fingerprint or {}).get("cpu") or {}).get("features") or []
    on_cpu = str(row.conditions.get("device", "cpu")).startswith("cpu")
    if precision == "int8" and on_cpu and features and not set(INTEGER) & set(features):
        found.append(
            "This processor has no instructions for INT8 products (VNNI, AMX or dot product), without which INT8 is seldom faster."
        )
    if 0 < work < SMALL_MFLOPS:
        found.append(
            "For so little work, calls and conversions cost about as much as the products: larger models or batches gain more."
        )
    return found


def shares_text(shares: Mapping[str, float]) -> str:
    """INT8 93 %, FP32 7 %; what is not zero is never written as 0."""

    def percent(v: float) -> str:
        return f"{100 * v:.0f}" if v >= 0.01 else f"{100 * v:.1g}"

    ordered: Sequence[tuple[str, float]] = sorted(shares.items(), key=lambda s: -s[1])
    return ", ".join(f"{bars.type_name(t)} {percent(v)}\u00a0%" for t, v in ordered if v > 0)


def attention_text(attention: Mapping[str, Any]) -> str:
    blocks, fusable, fused = (attention.get(k) for k in ("blocks", "fusable", "fused"))
    if not blocks:
        return "none"
    if fused is not None:
        return f"{fused} of {blocks} fused"
    return f"{fusable} of {blocks} fusable"


def _flops(millions: float) -> str:
    return f"{tables.digits(millions / 1000)} GFLOP" if millions >= 1000 else f"{tables.digits(millions)} MFLOP"
