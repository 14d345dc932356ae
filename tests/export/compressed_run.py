"""Made-up rows and files of a run with every kind of compression: test data that look like a run's, measured nowhere."""

import io
import math

from distill.files import write_json
from distill.progress import Progress
from distill.rows import Row, not_measured
from export.quantizing.budget import BudgetConfig, Ledger, search, sensitivity

N, DEPTH, SIZE = 5000, 12, 224
NO_GPU = "no CUDA GPU on this machine; the engine is compiled for SM 8.6, 8.9"
PLACES = {"attn.qkv": 228.0, "attn.qk": 50.0, "attn.av": 50.0, "attn.proj": 76.0, "mlp.fc1": 303.0, "mlp.fc2": 303.0}
LINEAR = [f"blocks.{i}.{p}" for i in range(DEPTH) for p in PLACES if p not in ("attn.qk", "attn.av")]
BAD = {"blocks.0.mlp.fc1": 50e-3, "blocks.2.mlp.fc2": 11e-3, "blocks.0.mlp.fc2": 3e-3}
# target -> (kNN, milliseconds, interval's half, MB, cosine_min, runs here)
TARGETS = {
    "onnx-fp32": (81.9, 61.0, 0.6, 87.3, 0.9999994, True),
    "onnx-bf16": (81.8, 66.0, 0.7, 44.1, 0.99991, True),
    "onnx-int8": (81.7, 24.9, 0.4, 24.8, 0.99851, True),
    "onnx-w4": (80.9, 63.5, 0.9, 14.2, 0.9871, True),
    "onnx-int8-dynamic": (80.1, 27.0, 0.5, 23.0, 0.9712, True),
    "onnx-int8-modelopt": (81.5, 36.0, 0.6, 87.0, 0.9971, True),
    "openvino-int8": (81.7, 24.7, 0.4, 24.9, 0.99841, True),
    "openvino-int8-nncf": (81.4, 31.2, 0.5, 23.1, 0.9919, True),
    "rtx-fp16": (None, None, None, 45.0, None, False),
    "rtx-fp8": (None, None, None, 26.0, None, False),
}


def row(metric, value, subject, target="torch-fp32", half=None, n=N, **conditions):
    interval = {} if half is None else {"low": value - half, "high": value + half}
    about = {"resolution": SIZE, **conditions}
    return Row(metric=metric, value=value, n=n, subject=subject, target=target, conditions=about, **interval)


def accuracies(subject, target, knn):
    half = 1.96 * math.sqrt(knn * (100 - knn) / N)
    return [row(m, v, subject, target, half) for m, v in (("knn_top1", knn), ("linear_top1", knn + 2.1))]


def difference(value, subject, target, versus, half=0.4):
    return row("knn_top1_difference", value, subject, target, half, versus=versus)


def timings(subject, target, ms, half):
    about = {"device": "cpu", "threads": 2, "batch": 1}
    rows = [row("latency_p50_ms", ms, subject, target, half, 400, **about)]
    rows.append(row("images_per_s", 1100 / ms, subject, target, n=400, **(about | {"batch": 8})))
    if target != "onnx-fp32":
        ratio = ms / TARGETS["onnx-fp32"][1]
        verdict = "FASTER" if ratio < 0.95 else "SLOWER" if ratio > 1.05 else "INCONCLUSIVE"
        more = about | {"versus": f"{subject}/onnx-fp32", "verdict": verdict}
        rows.append(row("latency_ratio", ratio, subject, target, 0.02 * ratio, 400, **more))
    return rows


def rows():
    """Of all stages: a teacher, a student with ten targets, one pruned to half, one trained for INT8."""
    found = []
    for subject, target, knn in (
        ("raw", "pixels", 24.0), ("random/teacher", "torch-fp32", 31.0), ("teacher", "torch-fp32", 85.2),
        ("students/small", "torch-fp32", 81.9), ("control/small", "torch-fp32", 70.3), ("cut/half", "torch-fp32", 52.1),
        ("pruned/half", "torch-fp32", 79.6), ("control/half", "torch-fp32", 77.0), ("qad/small8", "torch-fp32", 81.8),
    ):  # fmt: skip
        found += accuracies(subject, target, knn)
    small, half = "students/small/torch-fp32", "pruned/half/torch-fp32"
    found += [
        difference(11.6, "students/small", "torch-fp32", "control/small/torch-fp32"),
        difference(-3.3, "students/small", "torch-fp32", "teacher/torch-fp32"),
        difference(-2.3, "pruned/half", "torch-fp32", small),
        difference(27.5, "pruned/half", "torch-fp32", "cut/half/torch-fp32"),
        difference(2.6, "pruned/half", "torch-fp32", "control/half/torch-fp32"),
        difference(-0.1, "qad/small8", "torch-fp32", small),
        difference(0.2, "qad/small8", "onnx-int8", "students/small/onnx-int8"),
        difference(0.1, "qad/small8", "onnx-int8", "qad/small8/torch-fp32"),
        difference(-0.2, "pruned/half", "onnx-int8", half),
    ]
    for target, (knn, ms, spread, size, cosine, runs) in TARGETS.items():
        found.append(row("size_mb", size, "students/small", target, n=1))
        if not runs:
            found += [
                not_measured(m, "students/small", target, NO_GPU, resolution=SIZE) for m in ("knn_top1", "latency_p50_ms")
            ]
            continue
        found += accuracies("students/small", target, knn) + timings("students/small", target, ms, spread)
        found.append(difference(knn - 81.9, "students/small", target, small))
        found.append(row("cosine_min", cosine, "students/small", target, output="patches", source="onnx-fp32"))
    for subject, scale, knns in (("pruned/half", 0.55, (79.6, 79.4)), ("qad/small8", 1.0, (81.8, 81.9))):
        for target, knn in zip(("onnx-fp32", "onnx-int8"), knns, strict=True):
            _, ms, spread, size, cosine, _ = TARGETS[target]
            found += accuracies(subject, target, knn) + timings(subject, target, ms * scale, spread * scale)
            found.append(row("size_mb", size * scale, subject, target, n=1))
            found.append(row("cosine_min", cosine, subject, target, output="cls", source="onnx-fp32"))
    found += timings("students/small", "torch-fp32", 74.0, 1.0) + timings("teacher", "torch-fp32", 310.0, 4.0)
    found.append(Row(metric="noise_floor_percent", value=0.9, n=2, subject="all", target="all", conditions={"artifacts": "x"}))
    return found


def plan(kept, decision="int8"):
    """As export/quantizing/plan.py writes one."""
    entries = [entry("patch_embed.proj", "Conv", "keep", "often the most sensitive layer", 115.0)]
    for i in range(DEPTH):
        for place, mflops in PLACES.items():
            name = f"blocks.{i}.{place}"
            if place in ("attn.qk", "attn.av"):
                entries.append(entry(name, "Product", "keep", "attention products stay in floating point", mflops))
            elif name in kept:
                entries.append(entry(name, "Linear", "keep", "the accuracy budget keeps it in floating point", mflops))
            else:
                entries.append(entry(name, "Linear", decision, "input and weight of a linear layer", mflops))
    return [*entries, entry("residual adds", "Class", "keep", "quantizing them takes a ViT to 0 %", 0.0)]


def entry(layer, kind, decision, why, mflops):
    quantized = decision != "keep"
    return {
        "layer": layer, "kind": kind, "decision": decision, "why": why, "mflops": mflops,
        "input_scale": 0.0312 if decision == "int8" else None, "weight_shape": [384, 1536] if quantized else [],
        "weight_scale_min": 0.0011 if quantized else None, "weight_scale_max": 0.0094 if quantized else None,
    }  # fmt: skip


def proof(shares, source="graph", casts=0, reformats=None, fused=None, qdq=0, notes=()):
    return {
        "source": source, "flops_share": shares, "casts": casts, "reformats": reformats, "qdq_pairs": qdq, "layers": 900,
        "attention": {"blocks": DEPTH, "fusable": DEPTH, "fused": fused}, "notes": list(notes),
    }  # fmt: skip


def damage(kept):
    """A cosine and points lost that fall with every layer quantized."""
    lost = sum(BAD.get(n, 1e-4 * (1 + i % 5)) for i, n in enumerate(LINEAR) if n not in kept) / 8
    return {"cosine_min": 1 - lost, "cosine_mean": 1 - lost / 12, "size_mb": 23.0 + 1.8 * len(kept)}


def budget(cosine_min=0.9965):
    """A real search on made-up damage, with latencies written in."""

    def measure(kept):
        cheap = damage(kept)
        points = 40 * (1 - cheap["cosine_min"])
        return cheap | ({"knn_points": points, "knn_low": points - 0.3, "knn_high": points + 0.3} if len(kept) > 1 else {})

    quiet = Progress("quiet", io.StringIO())
    config = BudgetConfig(cosine_min=cosine_min, knn_points=0.3)
    found = sensitivity(dict.fromkeys(LINEAR, 1.0), damage, Ledger(), quiet)
    naive = {"cosine_min": 0.312, "cosine_mean": 0.6, "knn_points": 71.3, "latency_ms": 23.8, "size_mb": 22.9}

    def confirm(kept):
        return {k: v - 2e-4 for k, v in damage(kept).items() if k.startswith("cosine")}

    result = search(config, found, measure, Ledger(), quiet, naive=naive, confirm=confirm).to_json()
    for point in result["curve"]:
        if len(point["kept"]) % 2 == 0:
            ms = 23.9 + 0.6 * len(point["kept"])
            point |= {"latency_ms": ms, "latency_low": ms - 0.3, "latency_high": ms + 0.4}
    chosen = next(p for p in result["curve"] if p["kept"] == result["kept"])
    result["reached"] |= {k: v for k, v in chosen.items() if k.startswith("latency")}
    return result


FINDING = {
    "rule": "half-overflow", "severity": "warning", "where": "blocks.9.mlp.fc2 and 2 more", "count": 3,
    "message": "an activation reaches 61,000 where FP16 ends at 65,504", "cure": "Keep the layer in FP32 (export.half.keep).",
}  # fmt: skip


def details():
    """(name, target) -> artifact.json's details."""
    searched = budget()
    int8 = {"INT8": 0.87, "FLOAT": 0.13}
    clean = {str(SIZE): []}
    return {
        ("small", "onnx-fp32"): {"proof": {str(SIZE): proof({"FLOAT": 1.0})}, "lint": clean},
        ("small", "onnx-bf16"): {"proof": {str(SIZE): proof({"BFLOAT16": 1.0}, casts=52)}, "lint": clean},
        ("small", "onnx-int8"): {
            "plan": {str(SIZE): plan(searched["kept"])}, "proof": {str(SIZE): proof(int8, qdq=45)}, "lint": clean,
            "budget": searched,
        },
        ("small", "onnx-w4"): {
            "plan": {str(SIZE): plan([], "w4")}, "proof": {str(SIZE): proof({"INT4-weight": 0.9, "FLOAT": 0.1})}, "lint": clean,
        },
        ("small", "openvino-int8"): {"plan": {str(SIZE): plan(searched["kept"])}, "proof": {str(SIZE): proof(int8, qdq=45)}},
        ("small", "rtx-fp16"): {
            "proof": {str(SIZE): proof({"FLOAT16": 1.0}, "engine inspector", 2, 14, 12)}, "lint": {str(SIZE): [FINDING]},
        },
        ("small", "rtx-fp8"): {
            "proof": {str(SIZE): proof({"FP8": 0.861, "FLOAT16": 0.139}, "compiled plan", 2, notes=["reformats unknown"])},
            "lint": {str(SIZE): [FINDING, {**FINDING, "rule": "scale", "severity": "note"}]},
        },
    }  # fmt: skip


def run(folder):
    """The files of the run; returns the folder."""
    write_json(folder / "run.json", {"format": "decant-run-1", "recipe": "test data", "made": "2026-01-31T10:00:00Z"})
    for (name, target), found in details().items():
        value = {"student": name, "target": target, "precision": target.split("-")[1], "details": found}
        write_json(folder / "export" / name / target / "artifact.json", value)
    blocks = [{"heads": 6 - i % 4, "hidden": 1536 - 96 * i} for i in range(DEPTH)]
    before = {"dim": 384, "blocks": [{"heads": 6, "hidden": 1536}] * DEPTH, "macs": 5.5e9}
    pruning = {
        "from": "small", "asked": {"macs": 0.5, "latency_ms": None, "importance": "taylor"}, "macs_before": 5.5e9,
        "macs_after": 2.75e9, "dim": 384, "blocks": blocks, "before": before,
        "steps": [{"macs": 4.1e9}, {"macs": 2.75e9}],
    }  # fmt: skip
    write_json(folder / "pruned" / "half" / "pruning.json", pruning)
    return folder
