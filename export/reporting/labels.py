"""What subjects, targets and metrics are called, and in which order they are told."""

from collections.abc import Collection

from distill.rows import Row

RUNTIMES = {"onnx": "ONNX", "openvino": "OpenVINO", "rtx": "TensorRT-RTX", "trt": "TensorRT", "torch": "PyTorch"}
PRECISIONS = {
    "fp32": "FP32",
    "fp16": "FP16",
    "bf16": "BF16",
    "int8": "INT8",
    "fp8": "FP8",
    "w8": "INT8 weights",
    "w4": "INT4 weights",
}
QUANTIZERS = {"dynamic": "dynamic", "modelopt": "ModelOpt", "nncf": "NNCF"}
SHIPPED = ("students", "pruned", "qad")  # kinds of subjects that are exported
KINDS = ("raw", "random", "teacher", "students", "control", "cut", "pruned", "qad")
PLAIN = ("torch-fp32", "pixels", "pixels-joint")  # models and yardsticks; every other target is a file that ships
METRICS = {
    "knn_top1": "kNN",
    "linear_top1": "linear probe",
    "latency_p50_ms": "latency",
    "images_per_s": "throughput",
    "size_mb": "size",
    "load_s": "load time",
    "peak_memory_mb": "peak memory",
    "build_s": "build time",
    "noise_floor_percent": "noise floor",
    "gpu_latency_p50_ms": "GPU time",
    "energy_mj_per_image": "energy an image",
    "video_knn_top1": "video kNN",
    "micro_ap": "micro AP",
    "pixel_accuracy": "pixel accuracy",
    "knn_top1_at_k": "kNN",
    "miou_majority": "mIoU of the commonest class",
    "rmse_m_constant": "RMSE of the mean depth",
    "pck_by_chance": "PCK by chance",
    "pck_at_best": "PCK at best",
    "logistic_top1": "logistic regression",
    "few_shot_top1": "few-shot",
    "miou": "mIoU",
    "class_iou": "IoU",
    "foreground_iou": "foreground IoU",
    "rmse_m": "RMSE",
    "abs_rel": "absolute relative error",
    "delta1": "δ < 1.25",
    "map": "mAP",
    "recall_at_k": "recall",
    "pck": "PCK",
    "video_top1": "video top-1",
}
PARITY = ("cosine_min", "cosine_p1", "max_abs", "mean_abs", "nan_count")


def precision_of(target: str) -> str:
    """`onnx-int8-dynamic` -> "int8"."""
    return target.partition("-")[2].partition("-")[0]


def target_name(target: str) -> str:
    """`rtx-int8` -> "TensorRT-RTX INT8", `onnx-int8-dynamic` -> "ONNX INT8 (dynamic)"."""
    runtime, precision, *rest = [*target.split("-", 2), ""]
    if runtime not in RUNTIMES:
        return target
    by = next((f" ({QUANTIZERS.get(r, r)})" for r in rest if r), "")
    return f"{RUNTIMES[runtime]} {PRECISIONS.get(precision, precision.upper())}{by}"


def label_of(subject: str, target: str) -> str:
    """`students/small`, `onnx-int8` -> "small, ONNX INT8"."""
    kind, _, name = subject.partition("/")
    if target not in PLAIN:
        return f"{short_name(subject)}, {target_name(target)}"
    return {
        "raw": "Raw pixels, jointly" if target == "pixels-joint" else "Raw pixels",
        "random": f"Random init., {name}" if name else "Random init.",
        "teacher": "Teacher",
        "students": f"Distilled student {name}",
        "control": f"Control {name}, from scratch",
        "cut": f"Pruned {name}, before recovery",
        "pruned": f"Pruned {name}",
        "qad": f"QAD {name}",
    }.get(kind, subject)


def short_name(subject: str) -> str:
    """`students/small` -> "small", `qad/small8` -> "QAD small8", `teacher` -> "teacher"."""
    kind, _, name = subject.partition("/")
    return {"pruned": f"pruned {name}", "qad": f"QAD {name}"}.get(kind, name or kind)


def order(key: tuple[str, str], pruned: Collection[str] = ()) -> tuple[int, str, int, int, int, str]:
    """Sorts (subject, target): yardsticks, teacher, students, controls, pruned, QAD; then the files that ship, by model.

    pruned: names of pruned models, whose control stands with them: before recovery, after it, from scratch.
    """
    subject, target = key
    kind = subject.split("/")[0]
    rank = KINDS.index(kind) if kind in KINDS else len(KINDS)
    runtimes, precisions = list(RUNTIMES), list(PRECISIONS)
    runtime, precision = target.split("-")[0], precision_of(target)
    by_runtime = runtimes.index(runtime) if runtime in runtimes else len(runtimes)
    by_precision = precisions.index(precision) if precision in precisions else len(precisions)
    if target not in PLAIN:
        return len(KINDS) + 1 + rank, subject, 0, by_runtime, by_precision, target
    name = "" if subject == "random/teacher" else subject.partition("/")[2]
    stages = ("cut", "pruned", "control")
    if kind in stages[:2] or (kind == "control" and name in pruned):
        return KINDS.index("cut"), name, stages.index(kind), by_runtime, by_precision, target
    return rank, name, 0, by_runtime, by_precision, target


def metric_name(row: Row) -> str:
    if row.metric in PARITY:
        return "parity"
    base = row.metric.removesuffix("_difference")
    name = METRICS.get(base, base.replace("_", " "))
    name += " difference" if base != row.metric else ""
    at_batch = base in ("latency_p50_ms", "images_per_s") and "batch" in row.conditions
    return f"{name} at batch {row.conditions['batch']}" if at_batch else name
