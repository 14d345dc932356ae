"""How each kind of target is built: `job -> Artifact`, its files written, `artifact.json` not yet."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from onnx import ModelProto
from torch import Tensor

from distill.data.preprocess import Preprocess
from distill.errors import UserError
from distill.files import read_json, sha256_file, write_bytes, write_json
from distill.models.checkpoints import load_backbone, load_preprocess
from distill.models.kinds import AnyBackbone
from distill.progress import Progress
from distill.sparsity import block_linears, is_2_4
from export.artifact import NAME, Artifact, ArtifactFile, ExtraFile, TensorSpec
from export.budgeted import search_kept
from export.engine import build_engine, load_runtime
from export.engine_config import EngineConfig
from export.graph import INPUT, OPSET, OUTPUTS, export_onnx, load_graph, serialize, type_counts
from export.graphs.openvino_graph import for_openvino
from export.graphs.split_qkv import split_qkv
from export.half import fit_half
from export.lint import lint
from export.proof import prove, refuse
from export.quantize import QuantizeConfig, quantize
from export.quantizing.calibrate import calibrate
from export.quantizing.calibration import Calibration
from export.quantizing.others import OTHERS
from export.quantizing.plan import plan_graph
from export.runtimes import load_openvino, why_unrunnable
from export.targets import PLAN, ExportConfig, Images, Job, Target, at_resolution

CALIBRATION, QUANTIZATION = "calibration_{}.json", "quantization.json"
HALF_IMAGES = 8  # training images that tell whether a half-precision graph overflows


def build_target(
    target: Target,
    config: ExportConfig,
    student: str,
    model_folder: Path,
    sources: dict[str, Path],
    images: Images,
    out: Path,
    progress: Progress,
) -> Artifact:
    """Write the artifact of one target into `out`: a file a resolution, then `artifact.json`.

    Args:
        model_folder: of the model (model.json, weights, and of one trained for its quantization quantization.json).
        sources: folder of each of `prerequisites(target)`.

    Raises:
        EnvironmentFailed: the runtime that compiles is missing; the run goes on and the target's rows say "not measured".
        UserError: settings that do not fit the model. GateFailed: the artifact is not what its name says.
    """
    (out / NAME).unlink(missing_ok=True)  # while files are being replaced the folder is not an artifact
    out.mkdir(parents=True, exist_ok=True)
    job = Job(target, config, student, model_folder, sources, images, out, progress)
    return BUILDERS[job.spec.build](job).write()


def float_graphs(job: Job) -> Artifact:
    """torch -> ONNX in FP32, FP16 or BF16; layers that a half type would overflow in stay in FP32 and are named in the details."""
    backbone, preprocess = load_backbone(job.model_folder), load_preprocess(job.model_folder)
    began, made, precision = time.perf_counter(), _Made(backbone.dim, backbone.patch), job.spec.precision
    kept: dict[str, Any] = {}
    for size in job.config.sizes(preprocess):
        path = job.out / f"model_{size}.onnx"
        if precision == "fp32":
            export_onnx(backbone, path, size, "fp32")
        else:
            least = job.config.gates.least(precision)
            kept[str(size)] = fit_half(backbone, path, size, precision, job.images.training(HALF_IMAGES, size), least)  # type: ignore[arg-type]
        made.files.append(_new_entry(path, backbone, at_resolution(preprocess, size)))
        stays = kept.get(str(size), {}).get("kept_float", [])
        made.proves(job, load_graph(path), size, path.name, stays or None)
    made.details |= {"half": kept} if kept else {}
    return _artifact(job, made, "torch-fp32", time.perf_counter() - began, _versions("torch", "onnx"))


def quantized_graphs(job: Job) -> Artifact:
    """ONNX FP32 -> Q/DQ: calibrated on training images, the layers that the budget asks for left in floating point.

    A model that was trained for this quantization brings its scales along and is quantized by those, exactly.
    """
    source, precision = job.source("onnx-fp32"), job.spec.precision
    settings = job.config.quantize
    trained = _trained_scales(job)
    began, made, result = time.perf_counter(), _Made(source.dim, source.patch), None
    plans: dict[str, Any] = {}
    for entry in source.files:
        size, path = str(entry.resolution), source.path(entry)
        images = job.images.training(settings.images, entry.resolution)
        if trained is not None:
            calibration, settings = trained, _as_trained(settings, path, trained)
        else:
            calibration = calibrate(path, images, settings, precision)
            if settings.budget is not None and result is None:
                result = search_kept(job, source, entry, calibration, settings)
                settings = settings.model_copy(update={"keep": [*settings.keep, *result.kept]})
        graph, plan = quantize(load_graph(path), calibration, settings, precision)
        plans[size] = [e.to_json() for e in plan]
        made.proves(job, graph, entry.resolution, entry.path, _kept(plans[size]))
        write_bytes(job.out / entry.path, serialize(graph))
        made.files.append(_described(job.out / entry.path, entry))
        write_json(job.out / CALIBRATION.format(size), calibration.to_json())
        made.extras.append(_extra(job.out / CALIBRATION.format(size)))
        made.details.setdefault("calibration_sha256", {})[size] = _hash(images) if trained is None else "trained"
    write_json(job.out / PLAN, plans)
    made.extras.append(_extra(job.out / PLAN))
    made.details |= {
        "calibration": "trained with the weights" if trained is not None else settings.calibration,
        "calibration_images": 0 if trained is not None else len(images),
        "plan": plans,
        "remainder": "fp32",
        "keep": list(settings.keep),
    }
    if result is not None:
        made.details |= {"budget": result.to_json(), "budget_failure": result.failure(f"{job.target} of {job.student}")}
    return _artifact(job, made, "onnx-fp32", time.perf_counter() - began, _versions("onnx", "onnxruntime"))


def _trained_scales(job: Job) -> Calibration | None:
    path = job.model_folder / QUANTIZATION
    return Calibration.from_qad(read_json(path)) if path.is_file() else None


def _as_trained(settings: QuantizeConfig, path: Path, trained: Calibration) -> QuantizeConfig:
    """The settings that quantize those layers and no others, and change nothing that training has settled."""
    everything = settings.plain().model_copy(update={"keep": [], "patch_embed": "patch_embed.proj" in trained.layers})
    names = [e.layer for e in plan_graph(load_graph(path), everything, trained.precision) if e.decision == trained.precision]
    return everything.model_copy(update={"keep": [n for n in names if n not in trained.layers]})


def other_graphs(job: Job) -> Artifact:
    """By other people's quantizers at their own settings, through the same proofs."""
    source = job.source("onnx-fp32")
    began, made = time.perf_counter(), _Made(source.dim, source.patch)
    quantizer = OTHERS[job.target]
    for entry in source.files:
        images = job.images.training(job.config.quantize.images, entry.resolution)
        first, *rest = quantizer(source.path(entry), images, job.out)
        made.files.append(_described(first, entry))
        made.extras += [_extra(p) for p in rest]
        if first.suffix == ".onnx":
            made.proves(job, load_graph(first), entry.resolution, first.name, None, gate=False)
    if job.spec.runtime == "openvino":
        made.details["openvino"] = {"inference_precision": None}  # the plugin's own choice
    made.reason = why_unrunnable(job.spec.runtime, [])
    return _artifact(job, made, "onnx-fp32", time.perf_counter() - began, _versions(*_packages_of(job)))


def openvino_graphs(job: Job) -> Artifact:
    """An ONNX graph as OpenVINO's CPU plugin runs it best: in FP32 or BF16 as it is, quantized rewritten around the same integers."""
    load_openvino()  # absent, the target is skipped before anything is read
    source = job.source(job.spec.needs[0])
    began, made = time.perf_counter(), _Made(source.dim, source.patch)
    for entry in source.files:
        graph = load_graph(source.path(entry))
        if job.spec.precision == "int8":
            plan = source.details["plan"][str(entry.resolution)]
            graph = for_openvino(graph)
            made.details.setdefault("plan", {})[str(entry.resolution)] = plan
            made.proves(job, graph, entry.resolution, entry.path, _kept(plan))
        write_bytes(job.out / entry.path, serialize(graph))
        made.files.append(_described(job.out / entry.path, entry))
    inside = {"fp32": "f32", "bf16": "bf16", "int8": None}[job.spec.precision]
    made.details["openvino"] = {"inference_precision": inside}
    made.reason = why_unrunnable("openvino", [])
    return _artifact(job, made, source.target, time.perf_counter() - began, _versions("openvino", "onnx"))


def engines(job: Job) -> Artifact:
    """A typed ONNX graph, compiled. INT8, FP8 and INT4 put the quantized target's calibration into the FP16 graph."""
    runtime = job.spec.runtime
    assert runtime in ("tensorrt", "tensorrt_rtx")
    load_runtime(runtime)  # type: ignore[arg-type]
    source, precision = job.source(job.spec.needs[0]), job.spec.precision
    settings = with_sparsity(job.config.engine, job.model_folder)
    made, infos = _Made(source.dim, source.patch), {}
    for entry in source.files:
        graph, size = source.path(entry), str(entry.resolution)
        if len(job.spec.needs) > 1:
            graph, plan = _half_quantized(job, source, entry)
            made.extras.append(_extra(graph))
            made.details.setdefault("plan", {})[size] = plan
        batches = 1, job.config.opt_batch, job.config.max_batch
        path = job.out / f"model_{size}.engine"
        infos[size] = build_engine(
            graph,
            path,
            runtime,  # type: ignore[arg-type]
            precision,
            batches,
            job.config.compute_capabilities,
            settings,
        )
        made.details.setdefault("proof", {})[size] = infos[size].proof.to_json()
        made.details.setdefault("lint", {})[size] = [f.to_json() for f in lint(load_graph(graph), graph.name, precision)]
        made.details.setdefault("graph_sha256", {})[size] = sha256_file(graph)
        made.files.append(_described(path, entry))
    first = next(iter(infos.values()))
    made.details |= {
        "profile": dict(zip(("min", "opt", "max"), first.profile, strict=True)),
        "matmul_types": {size: info.matmul_types for size, info in infos.items()},
        "layers": {size: info.layers for size, info in infos.items()},
        "build_seconds": {size: info.seconds for size, info in infos.items()},
        "remainder": "fp16" if precision not in ("fp32", "bf16") else precision,
        "notes": first.notes,
    }
    made.capabilities, made.reason = first.capabilities, why_unrunnable(runtime, first.capabilities)
    seconds, versions = sum(info.seconds for info in infos.values()), {runtime: first.version, **_versions("onnx")}
    return _artifact(job, made, job.spec.needs[0], seconds, versions)


def with_sparsity(settings: EngineConfig, model_folder: Path) -> EngineConfig:
    """Engine settings that use sparse kernels where the model's weights have the pattern."""
    if settings.sparse_weights or not _is_sparse(model_folder):
        return settings
    return settings.model_copy(update={"sparse_weights": True})


def _is_sparse(folder: Path) -> bool:
    """Whether every linear layer of the blocks has two zeros in each four weights."""
    layers = block_linears(load_backbone(folder))
    return bool(layers) and all(is_2_4(m.weight) for m in layers.values())


def _half_quantized(job: Job, source: Artifact, entry: ArtifactFile) -> tuple[Path, list[dict[str, Any]]]:
    """The FP16 graph with the quantized target's calibration, written beside the engine: what a device that compiles for itself starts
    from."""
    quantized, size = job.source(job.spec.needs[1]), str(entry.resolution)
    stored = next((e for e in quantized.extras if e.path == CALIBRATION.format(size)), None)
    if stored is None:
        raise UserError(
            f"{quantized.folder} has no calibration for {size} px; export {quantized.target} again with the same resolutions."
        )
    reference = load_graph(quantized.path(quantized.file(entry.resolution)))
    calibration = Calibration.from_json(json.loads(quantized.content(stored))).with_codes(reference)
    keep = {"keep": [e["layer"] for e in quantized.details["plan"][size] if e["decision"] == "keep" and e["kind"] != "Class"]}
    settings = job.config.quantize.model_copy(update=keep)
    graph, plan = quantize(load_graph(source.path(entry)), calibration, settings, job.spec.precision)
    if job.spec.precision in ("int8", "fp8"):
        graph = split_qkv(graph)  # TensorRT-RTX runs a quantized qkv layer in FP16 otherwise
    path = job.out / f"graph_{size}.onnx"
    write_bytes(path, serialize(graph))
    return path, [e.to_json() for e in plan]


def _kept(plan: list[dict[str, Any]] | None) -> list[str] | None:
    """Layers that a plan leaves in floating point on purpose."""
    return None if plan is None else [e["layer"] for e in plan if e["decision"] == "keep"]


BUILDERS: dict[str, Callable[[Job], Artifact]] = {
    "float": float_graphs,
    "quantized": quantized_graphs,
    "other": other_graphs,
    "openvino": openvino_graphs,
    "engine": engines,
}


@dataclass
class _Made:
    """What a builder collects on its way to an Artifact."""

    dim: int
    patch: int
    files: list[ArtifactFile] = field(default_factory=list)
    extras: list[ExtraFile] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    capabilities: list[str] = field(default_factory=list)
    reason: str | None = None

    def proves(self, job: Job, graph: ModelProto, size: int, name: str, kept: list[str] | None, gate: bool = True) -> None:
        """What runs in which precision, and what lint finds; a graph that is not what its target says is refused."""
        proof = prove(graph, job.spec.precision)
        if gate:
            refuse(proof, job.spec.precision, f"{job.target} of {job.student} ({name})", kept)
        self.details.setdefault("proof", {})[str(size)] = proof.to_json()
        self.details.setdefault("matmul_types", {})[str(size)] = type_counts(graph)
        self.details.setdefault("lint", {})[str(size)] = [
            f.to_json() for f in lint(graph, name, job.spec.precision, job.reader)
        ]

    def plan(self, size: str) -> list[dict[str, Any]] | None:
        return self.details.get("plan", {}).get(size)


def _artifact(job: Job, made: _Made, source: str, seconds: float, versions: dict[str, str]) -> Artifact:
    return Artifact(
        student=job.student,
        target=job.target,
        precision=job.spec.precision,
        runtime=job.spec.runtime,
        files=made.files,
        source=source,
        dim=made.dim,
        patch=made.patch,
        opset=_opset(made, job),
        max_batch=job.config.max_batch,
        compute_capabilities=made.capabilities,
        build_seconds=round(seconds, 3),
        runnable_here=made.reason is None,
        reason=made.reason,
        versions=versions,
        details=made.details,
        extras=made.extras,
        folder=job.out,
    )


def _opset(made: _Made, job: Job) -> int:
    """Of the ONNX graph: the served one, or the one that an engine was compiled from."""
    served = job.out / made.files[0].path
    return (
        next((o.version for o in load_graph(served).opset_import if not o.domain), OPSET) if served.suffix == ".onnx" else OPSET
    )


def _new_entry(path: Path, backbone: AnyBackbone, preprocess: Preprocess) -> ArtifactFile:
    """The description of a file that has no predecessor."""
    size, tokens = preprocess.size, (preprocess.size // backbone.patch) ** 2
    shapes: list[list[int | str]] = [["batch", backbone.dim], ["batch", tokens, backbone.dim]]
    return ArtifactFile(
        path=path.name,
        resolution=size,
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        inputs=[TensorSpec(name=INPUT, dtype="float32", shape=["batch", 3, size, size])],
        outputs=[TensorSpec(name=n, dtype="float32", shape=s) for n, s in zip(OUTPUTS, shapes, strict=True)],
        preprocess=preprocess.to_json(),
    )


def _described(path: Path, like: ArtifactFile) -> ArtifactFile:
    """A file with the inputs, outputs and preprocessing of the one that it was made from."""
    return like.model_copy(update={"path": path.name, "sha256": sha256_file(path), "bytes": path.stat().st_size})


def _extra(path: Path) -> ExtraFile:
    return ExtraFile(path=path.name, sha256=sha256_file(path), bytes=path.stat().st_size)


def _hash(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def _packages_of(job: Job) -> tuple[str, ...]:
    return {"onnx-int8-modelopt": ("nvidia-modelopt", "onnx"), "openvino-int8-nncf": ("nncf", "openvino")}.get(
        job.target, ("onnxruntime", "onnx")
    )


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}
