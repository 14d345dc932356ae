"""What can be exported: target name -> builder. Each builder writes one artifact folder, `artifact.json` last."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from distill.config import Config
from distill.data.preprocess import Preprocess
from distill.errors import UserError
from distill.files import sha256_file, write_bytes, write_json
from distill.models.checkpoints import load_backbone, load_preprocess
from distill.models.kinds import AnyBackbone
from distill.progress import Progress
from export.artifact import NAME, Artifact, ArtifactFile, ExtraFile, TensorSpec, read_artifact
from export.engine import RTX_CAPABILITIES, EngineRuntime, build_engine, load_runtime
from export.graph import INPUT, OPSET, OUTPUTS, export_onnx, load_graph, serialize, type_counts, verify_precision
from export.parity import Gates
from export.quantize import QuantizeConfig, activation_scales, plan_scales, quantize
from export.runtimes import why_unrunnable

Target = Literal["onnx-fp32", "onnx-fp16", "onnx-int8", "rtx-fp16", "rtx-int8", "trt-fp16", "trt-int8"]
PLAN = "plan.json"


class ExportConfig(Config):
    """What is exported and how.

    Attributes:
        targets: artifacts to make; what they are made from is made too.
        resolutions: a file for each, in pixels; the student's input size when not given.
        max_batch, opt_batch: the largest batch of an engine and the one that it is tuned for.
        compute_capabilities: GPUs that TensorRT-RTX compiles for: 8.6 and 8.9 are the consumer Ampere and Ada, 12.0 Blackwell.
        quantize: how INT8 is made. gates: parity that every artifact must reach.
    """

    targets: list[Target] = ["onnx-fp32", "onnx-int8", "rtx-fp16", "rtx-int8"]  # noqa: RUF012  pydantic copies it
    resolutions: list[int] | None = None
    max_batch: int = 64
    opt_batch: int = 8
    compute_capabilities: list[str] = ["8.6", "8.9", "12.0"]  # noqa: RUF012
    quantize: QuantizeConfig = QuantizeConfig()
    gates: Gates = Gates()

    def problems(self) -> list[str]:
        """What contradicts itself in these settings, one sentence each."""
        found = []
        if not self.targets:
            found.append("targets must name at least one of " + ", ".join(get_args(Target)))
        if len(set(self.targets)) < len(self.targets):
            found.append("targets names one twice")
        if self.resolutions is not None and (not self.resolutions or min(self.resolutions) < 1):
            found.append(f"resolutions must be sizes of at least 1 px, or be left out, got {self.resolutions}")
        elif self.resolutions is not None and len(set(self.resolutions)) < len(self.resolutions):
            found.append("resolutions names one twice")
        if not 1 <= self.opt_batch <= self.max_batch:
            found.append(f"opt_batch must be between 1 and max_batch {self.max_batch}, got {self.opt_batch}")
        unknown = [c for c in self.compute_capabilities if c not in RTX_CAPABILITIES]
        if unknown:
            found.append(f"compute_capabilities: TensorRT-RTX compiles for {', '.join(RTX_CAPABILITIES)}, not for {unknown[0]}")
        if not self.compute_capabilities and any(t.startswith("rtx-") for t in self.targets):
            found.append("compute_capabilities must name at least one GPU generation for the rtx targets")
        return found

    def sizes(self, preprocess: Preprocess) -> list[int]:
        """Resolutions to export for a student with this preprocessing."""
        return self.resolutions or [preprocess.size]


@dataclass(frozen=True)
class Job:
    """One target of one student, as its builder gets it."""

    target: Target
    config: ExportConfig
    student: str
    model_folder: Path
    sources: dict[str, Path]
    calibration: Callable[[int], Tensor]
    out: Path
    progress: Progress

    def source(self, target: str) -> Artifact:
        assert target in self.sources, f"{self.target} needs the folder of {target}"
        return read_artifact(self.sources[target])


def prerequisites(target: str) -> list[str]:
    """Targets whose artifacts this one is made from."""
    return list(BUILDERS[target][1])


def in_order(targets: list[Target]) -> list[Target]:
    """These targets and all that they are made from, each after its prerequisites."""
    order: list[Target] = []
    for target in targets:
        for needed in (*in_order(list(BUILDERS[target][1])), target):
            if needed not in order:
                order.append(needed)
    return order


def build_target(
    target: Target,
    config: ExportConfig,
    student: str,
    model_folder: Path,
    sources: dict[str, Path],
    calibration: Callable[[int], Tensor],
    out: Path,
    progress: Progress,
) -> Artifact:
    """Write the artifact of one target into `out`: a file a resolution, then `artifact.json`.

    Args:
        model_folder: of the student (model.json and weights).
        sources: folder of each of `prerequisites(target)`.
        calibration: resolution -> preprocessed training images [n, 3, resolution, resolution]; called by onnx-int8 only.

    Raises:
        EnvironmentFailed: the runtime that compiles is missing; the run goes on and the target's rows say "not measured".
        UserError: settings that do not fit the model. GateFailed: the artifact is not what its name says.
    """
    (out / NAME).unlink(missing_ok=True)  # while files are being replaced the folder is not an artifact
    out.mkdir(parents=True, exist_ok=True)
    return BUILDERS[target][0](Job(target, config, student, model_folder, sources, calibration, out, progress)).write()


def at_resolution(preprocess: Preprocess, size: int) -> Preprocess:
    """The same preprocessing for another resolution: the crop keeps its share of the resized image."""
    return replace(preprocess, size=size, resize=max(size, round(preprocess.resize * size / preprocess.size)))


def _float_onnx(job: Job, precision: Literal["fp32", "fp16"]) -> Artifact:
    backbone, preprocess = load_backbone(job.model_folder), load_preprocess(job.model_folder)
    began, made, types = time.perf_counter(), _Made(backbone.dim, backbone.patch), {}
    for size in job.config.sizes(preprocess):
        path = job.out / f"model_{size}.onnx"
        export_onnx(backbone, path, size, precision)
        types[str(size)] = type_counts(load_graph(path))
        made.files.append(_new_entry(path, backbone, at_resolution(preprocess, size)))
    made.details = {"matmul_types": types}
    return _artifact(job, made, precision, "onnxruntime", "torch-fp32", time.perf_counter() - began, _versions("torch", "onnx"))


def _int8_onnx(job: Job) -> Artifact:
    source, settings = job.source("onnx-fp32"), job.config.quantize
    began, made = time.perf_counter(), _Made(source.dim, source.patch)
    plans, types, hashes, count = {}, {}, {}, 0
    for entry in source.files:
        size, images = str(entry.resolution), job.calibration(entry.resolution)[: settings.images]
        scales = activation_scales(source.path(entry), images, settings)
        graph, plan = quantize(load_graph(source.path(entry)), scales, settings)
        verify_precision(graph, "int8", entry.path)
        write_bytes(job.out / entry.path, serialize(graph))
        made.files.append(_described(job.out / entry.path, entry))
        plans[size], types[size], count = [e.to_json() for e in plan], type_counts(graph), len(images)
        hashes[size] = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    write_json(job.out / PLAN, plans)
    made.extras.append(_extra(job.out / PLAN))
    made.details = {
        "calibration": settings.calibration,
        "calibration_images": count,
        "calibration_sha256": hashes,
        "matmul_types": types,
        "plan": plans,
        "remainder": "fp32",
    }
    versions = _versions("onnx", "onnxruntime")
    return _artifact(job, made, "int8", "onnxruntime", "onnx-fp32", time.perf_counter() - began, versions)


def _engine(job: Job, runtime: EngineRuntime, precision: Literal["fp16", "int8"]) -> Artifact:
    """FP16 compiles onnx-fp16 as it is. INT8 puts onnx-int8's scales into onnx-fp16, so that what is not quantized is FP16."""
    load_runtime(runtime)
    source = job.source("onnx-fp16")
    made, infos, graphs = _Made(source.dim, source.patch), {}, {}
    for entry in source.files:
        graph, size = source.path(entry), str(entry.resolution)
        if precision == "int8":
            graph = _half_int8_graph(job, source, entry)
            made.extras.append(_extra(graph))
        batches = 1, job.config.opt_batch, job.config.max_batch
        path = job.out / f"model_{size}.engine"
        infos[size] = build_engine(graph, path, runtime, precision, batches, job.config.compute_capabilities)
        graphs[size] = sha256_file(graph)
        made.files.append(_described(path, entry))
    first = next(iter(infos.values()))
    made.details = {
        "profile": dict(zip(("min", "opt", "max"), first.profile, strict=True)),
        "matmul_types": {size: info.matmul_types for size, info in infos.items()},
        "layers": {size: info.layers for size, info in infos.items()},
        "build_seconds": {size: info.seconds for size, info in infos.items()},
        "graph_sha256": graphs,
        "remainder": "fp16",
        "notes": first.notes,
    }
    made.capabilities, made.reason = first.capabilities, why_unrunnable(runtime, first.capabilities)
    seconds, versions = sum(info.seconds for info in infos.values()), {runtime: first.version, **_versions("onnx")}
    return _artifact(job, made, precision, runtime, "onnx-fp16", seconds, versions)


def _half_int8_graph(job: Job, source: Artifact, entry: ArtifactFile) -> Path:
    """onnx-fp16 with onnx-int8's scales, written beside the engine: what a device that compiles for itself starts from."""
    int8 = job.source("onnx-int8")
    plans = json.loads(int8.content(next(e for e in int8.extras if e.path == PLAN)))
    if str(entry.resolution) not in plans:
        raise UserError(
            f"{int8.folder} has no scales for {entry.resolution} px; export onnx-int8 again with the same resolutions."
        )
    graph, _ = quantize(load_graph(source.path(entry)), plan_scales(plans[str(entry.resolution)]), job.config.quantize)
    path = job.out / f"graph_{entry.resolution}.onnx"
    write_bytes(path, serialize(graph))
    return path


BUILDERS: dict[str, tuple[Callable[[Job], Artifact], tuple[Target, ...]]] = {
    "onnx-fp32": (lambda job: _float_onnx(job, "fp32"), ()),
    "onnx-fp16": (lambda job: _float_onnx(job, "fp16"), ()),
    "onnx-int8": (_int8_onnx, ("onnx-fp32",)),
    "rtx-fp16": (lambda job: _engine(job, "tensorrt_rtx", "fp16"), ("onnx-fp16",)),
    "rtx-int8": (lambda job: _engine(job, "tensorrt_rtx", "int8"), ("onnx-fp16", "onnx-int8")),
    "trt-fp16": (lambda job: _engine(job, "tensorrt", "fp16"), ("onnx-fp16",)),
    "trt-int8": (lambda job: _engine(job, "tensorrt", "int8"), ("onnx-fp16", "onnx-int8")),
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


def _artifact(
    job: Job, made: _Made, precision: str, runtime: str, source: str, seconds: float, versions: dict[str, str]
) -> Artifact:
    return Artifact(
        student=job.student,
        target=job.target,
        precision=precision,  # type: ignore[arg-type]
        runtime=runtime,  # type: ignore[arg-type]
        files=made.files,
        source=source,
        dim=made.dim,
        patch=made.patch,
        opset=OPSET,
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


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}
