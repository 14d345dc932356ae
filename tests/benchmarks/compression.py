"""One trained network as every artifact: size, cosine to FP32, latency in one interleaved run, accuracies with paired differences.

    python tests/benchmarks/compression.py --model MODEL --calibrate images.parquet --train train.parquet --test val.parquet --out OUT \\
        [--targets onnx-fp32 onnx-int8 openvino-int8 ...] [--gallery 1500] [--questions 1000] [--threads 1] [--seconds 6] [--attention qk]

MODEL is a model folder (`tests/benchmarks/trained.py` writes one of a public ViT-S/14). Calibration images are of another set than the
labelled ones. Artifacts that lie in OUT are not built again. Prints Markdown; rows go to OUT/rows.jsonl.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from distill.data.preprocess import Preprocess
from distill.data.sources import ParquetConfig, checked
from distill.encoder import TorchEncoder
from distill.evaluate.pairs import paired_rows
from distill.evaluate.suite import EvaluateConfig, Subject, evaluate
from distill.models.checkpoints import load_backbone, load_preprocess
from distill.progress import Progress
from distill.rows import Row, write_rows
from export.artifact import NAME, Artifact, Unrunnable, read_artifact
from export.benchmark import BenchmarkConfig, Case, benchmark
from export.builders import build_target
from export.fingerprint import fingerprint
from export.parity import artifact_parity
from export.quantize import QuantizeConfig
from export.quantizing.budget_config import BudgetConfig
from export.runtimes import OpenVinoEncoder, open_artifact
from export.targets import ExportConfig, Images, at_resolution, in_order, prerequisites

TARGETS = [
    "onnx-fp32", "onnx-fp16", "onnx-int8", "onnx-fp8", "onnx-w8", "onnx-w4", "onnx-int8-dynamic", "onnx-int8-modelopt",
    "openvino-fp32", "openvino-bf16", "openvino-int8", "openvino-int8-nncf", "rtx-fp16", "rtx-int8",
]  # fmt: skip
SUBJECT = "students/model"
NNCF = "openvino-int8-nncf"
AT_DEFAULTS = f"{NNCF}, batch open"
"""NNCF's file compiled as it comes out of NNCF; under its own name it is compiled for its batch, as ours are."""
ATTENTION: dict[str, bool | Literal["qk"]] = {"false": False, "true": True, "qk": "qk"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibrate", "train", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--gallery", type=int, default=1500)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--parity", type=int, default=64, help="images that cosines are taken on; they calibrate nothing")
    parser.add_argument("--attention", default="false", choices=ATTENTION, help="as quantize.attention")
    parser.add_argument("--cosine-min", type=float, help="a budget for the quantized targets: the least cosine of any vector")
    parser.add_argument("--no-accuracy", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    progress = Progress("plain")
    artifacts = build(args, progress)
    rows = parity(args, artifacts) + latency(args, artifacts, progress)
    if not args.no_accuracy:
        rows += accuracy(args, artifacts, progress)
    write_rows(args.out / "rows.jsonl", rows)
    print(table(rows, artifacts, args))
    for artifact in artifacts:
        if found := artifact.details.get("budget"):
            print(f"\n{artifact.target}\n{kept_table(found)}")


def build(args: argparse.Namespace, progress: Progress) -> list[Artifact]:
    preprocess = load_preprocess(args.model)
    source = checked(ParquetConfig(kind="parquet", path=str(args.calibrate)).build())
    order = [i * len(source) // (args.images + args.parity) for i in range(args.images + args.parity)]

    def some(index: list[int], size: int) -> torch.Tensor:
        sized = at_resolution(preprocess, size)
        return torch.stack([torch.from_numpy(sized(source.image(i))) for i in index])

    # Every third image judges, so that both are spread over the whole set.
    judging = order[2::3][: args.parity]
    calibrating = [i for i in order if i not in set(judging)]
    images = Images(lambda n, size: some(calibrating[:n], size), lambda n, size, avoid: some(judging[:n], size))
    args.judging = some(judging, preprocess.size)
    budget = None if args.cosine_min is None else BudgetConfig(cosine_min=args.cosine_min, images=args.parity)
    config = ExportConfig(
        targets=args.targets,
        quantize=QuantizeConfig(images=args.images, attention=ATTENTION[args.attention], budget=budget),
        compute_capabilities=["8.6", "8.9"],
    )
    found = []
    for target in in_order(list(config.targets)):
        folder = args.out / target
        if not (folder / NAME).exists():
            sources = {t: args.out / t for t in prerequisites(target)}
            build_target(target, config, "model", args.model, sources, images, folder, progress)
        found.append(read_artifact(folder))
    return found


def parity(args: argparse.Namespace, artifacts: list[Artifact]) -> list[Row]:
    reference = TorchEncoder(load_backbone(args.model), "cpu")
    return [row for a in artifacts for row in artifact_parity(reference, a, args.judging, SUBJECT, "torch-fp32")]


def latency(args: argparse.Namespace, artifacts: list[Artifact], progress: Progress) -> list[Row]:
    cases = [
        Case(
            SUBJECT, a.target, a.file().resolution, partial(open_artifact, a, a.file().resolution), a.file().bytes, a.max_batch
        )
        for a in artifacts
    ]
    for a in artifacts:
        if a.target == NNCF:
            opened = partial(OpenVinoEncoder, a, a.file(), batch_open=True)
            cases.append(Case(SUBJECT, AT_DEFAULTS, a.file().resolution, opened, a.file().bytes, a.max_batch))
    config = BenchmarkConfig(batches=args.batches, seconds=args.seconds, rounds=30, threads=args.threads)
    return benchmark(config, cases, progress)


def accuracy(args: argparse.Namespace, artifacts: list[Artifact], progress: Progress) -> list[Row]:
    gallery, test = (
        ParquetConfig(kind="parquet", path=str(path), limit=n).build()
        for path, n in ((args.train, args.gallery), (args.test, args.questions))
    )
    seen = Preprocess.from_json(artifacts[0].file().preprocess)
    subjects = [
        Subject(SUBJECT, a.target, partial(open_artifact, a, None, args.threads), seen, a.file().sha256)
        for a in artifacts
        if a.runnable_here
    ]
    result = evaluate(EvaluateConfig(batch=8), subjects, gallery, test, args.out / "features", progress, (Unrunnable,))
    pairs = [(f"{SUBJECT}/{s.target}", f"{SUBJECT}/onnx-fp32") for s in subjects if s.target != "onnx-fp32"]
    return result.rows + paired_rows(result.predictions, pairs)


def table(rows: list[Row], artifacts: list[Artifact], args: argparse.Namespace) -> str:
    found = {(r.target, r.metric, r.conditions.get("output"), r.conditions.get("batch")): r for r in rows}
    by_metric = {(r.target, r.metric): r for r in rows if "batch" not in r.conditions or r.metric.startswith(("knn", "linear"))}

    def value(row: Row | None, digits: int, interval: bool = False) -> str:
        if row is None or row.value is None:
            return "not measured"
        text = f"{row.value:.{digits}f}"
        return f"{text} [{row.low:.{digits}f}, {row.high:.{digits}f}]" if interval and row.low is not None else text

    machine = fingerprint()
    lines = [
        f"{machine.get('cpu')}, {args.threads} thread(s), {args.images} calibration and {len(args.judging)} judged images.",
        "",
        "| artifact | MB | CLS cosine min | patches mean | p1 | min | "
        + " | ".join(f"p50 ms, batch {b}" for b in args.batches)
        + " | kNN % | kNN - FP32 | linear % | linear - FP32 |",
        "|" + "---|" * (10 + len(args.batches)),
    ]
    for a, name in [(a, a.target) for a in artifacts] + [(a, AT_DEFAULTS) for a in artifacts if a.target == NNCF]:
        cells = [name, f"{sum(e.bytes for e in [a.file(), *weights(a)]) / 1e6:.1f}"]
        batch = min(16, a.max_batch)
        for output, metric in (
            ("cls", "cosine_min"),
            ("patches", "cosine_mean"),
            ("patches", "cosine_p1"),
            ("patches", "cosine_min"),
        ):
            cells.append(value(found.get((a.target, metric, output, batch)), 5))
        cells += [value(found.get((name, "latency_p50_ms", None, b)), 1, True) for b in args.batches]
        for metric in ("knn_top1", "linear_top1"):
            cells.append(value(by_metric.get((a.target, metric)), 1))
            cells.append(value(by_metric.get((a.target, f"{metric}_difference")), 2, True))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kept_table(found: dict[str, Any]) -> str:
    """What a budget's search kept in floating point, what each layer costs alone, and a plan that knows nothing of the network."""
    alone = {s["layer"]: 1 - s["cosine_min"] for s in found["sensitivity"]}
    lines = [f"asked {found['asked']}; met: {found['met']}; kept {len(found['kept'])} of {found['layers']}", ""]
    lines += [f"- {layer}: 1 - least cosine, quantized alone: {alone[layer]:.5f}" for layer in found["kept"]]
    told = {"our plan, nothing kept": next(c for c in found["curve"] if not c["kept"]), "with those kept": found["reached"]}
    told["every operation quantized"] = found["naive"]
    return "\n".join([*lines, *(f"- {name}: least cosine {m['cosine_min']:.4f}" for name, m in told.items() if m)])


def weights(artifact: Artifact) -> list:
    return [e for e in artifact.extras if e.path.endswith(".bin")]


if __name__ == "__main__":
    main()
