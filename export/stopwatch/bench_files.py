"""Any file that holds a network, as cases for the stopwatch: ONNX and OpenVINO files, engines, bundles, artifacts, model folders.

Foreign graphs are read and run, nothing more: what they compute is not known here, so a call is timed from inputs in host memory
to outputs in host memory. A TensorRT engine runs native code when it is loaded: name only files that you trust.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from onnx import ModelProto
from onnx.external_data_helper import uses_external_data
from pydantic import ValidationError

from distill.encoder import Encoder, TorchEncoder
from distill.errors import GateFailed, UserError
from distill.files import sha256_file
from distill.models.checkpoints import load_backbone, load_preprocess
from export.artifact import NAME, Artifact, ArtifactFile, ExtraFile, TensorSpec, Unrunnable, read_artifact
from export.bundling.verify import Manifest, unpack
from export.graphs.anatomy import read_model
from export.runtimes import load_openvino, open_artifact
from export.stopwatch.bench_case import Case
from export.stopwatch.bench_graphs import EngineGraph, OnnxGraph, OpenVinoGraph, engine_runtime, why_no_engine
from export.stopwatch.bench_ports import Port, checked, feed, only_batch, onnx_ports, resolution_of

ENGINES = (".engine", ".plan", ".trt")
GraphRuntime = str  # onnxruntime or openvino: what may run a foreign ONNX file
GRAPH_RUNTIMES = ("onnxruntime", "openvino")
NO_BUILD = "it was not built here, so nobody told how long that took."


@dataclass(frozen=True)
class Wanted:
    """What is asked of files: image sides where they are open or several, and on which runtimes an ONNX file is timed."""

    resolution: int | None = None
    runtimes: tuple[GraphRuntime, ...] = ("onnxruntime",)


@contextmanager
def cases_of(targets: list[Path], wanted: Wanted) -> Iterator[list[list[Case]]]:
    """The cases of every target, in order; bundles are verified and unpacked into a folder that is gone afterwards.

    Raises:
        UserError: a target is nothing that can be timed, or a bundle that does not verify.
        EnvironmentFailed: `openvino` is asked for and not installed.
    """
    with tempfile.TemporaryDirectory(prefix="decant-bench-") as folder:
        labels = distinct(targets)
        yield [
            cases_of_one(path, label, wanted, Path(folder) / str(i))
            for i, (path, label) in enumerate(zip(targets, labels, strict=True))
        ]


def distinct(paths: list[Path]) -> list[str]:
    """As few of the last parts of each path as tell all of them apart.

    Raises:
        UserError: a target is named twice.
    """
    whole = [p.resolve() for p in paths]
    if twice := next((p for i, p in enumerate(whole) if p in whole[:i]), None):
        raise UserError(f"{twice} is named twice; name each target once (the noise floor already opens the first one twice).")
    labels = []
    for path in whole:
        n = next(n for n in range(1, len(path.parts) + 1) if sum(p.parts[-n:] == path.parts[-n:] for p in whole) == 1)
        labels.append(PurePosixPath(*path.parts[-n:]).as_posix())
    return labels


def cases_of_one(path: Path, label: str, wanted: Wanted, folder: Path) -> list[Case]:
    """The cases of one target; `folder` does not exist and may be filled."""
    if path.is_dir():
        if (path / NAME).is_file():
            return artifact_cases(read_artifact(path), label, wanted)
        if (path / "model.json").is_file():
            return [model_case(path, label, wanted)]
        raise UserError(f"{path} is no artifact ({NAME}), model (model.json) or run (run.json); name one of those, or a file.")
    if not path.is_file():
        raise UserError(f"There is no file {path}; check the path.")
    if path.name.endswith((".tar.gz", ".tgz")):
        try:
            manifest = unpack(path, folder).manifest
        except GateFailed as e:  # here no gate of a run, but a wrong argument
            raise UserError(str(e)) from e
        return [case for a in bundled(manifest, folder) for case in artifact_cases(a, label, wanted)]
    if path.suffix == ".onnx":
        return onnx_cases(path, label, wanted)
    if path.suffix == ".xml":
        return [openvino_case(path, label, wanted)]
    if path.suffix in ENGINES:
        return [engine_case(path, label, wanted)]
    raise UserError(
        f"{path} is of no kind that can be timed; name an .onnx, an OpenVINO .xml, an engine ({', '.join(ENGINES)}), "
        "a bundle (.tar.gz), or the folder of an artifact, a model or a run."
    )


def artifact_cases(artifact: Artifact, label: str, wanted: Wanted) -> list[Case]:
    """A case for every resolution of an artifact, or for the one that is asked for."""
    files = artifact.files if wanted.resolution is None else [artifact.file(wanted.resolution)]
    return [
        Case(
            label,
            artifact.target,
            entry.resolution,
            partial(open_artifact, artifact, entry.resolution),
            entry.bytes + weights_bytes(artifact, entry),
            artifact.max_batch,
            build_s=artifact.build_seconds or None,
        )
        for entry in files
    ]


def weights_bytes(artifact: Artifact, entry: ArtifactFile) -> int:
    """Bytes of the weights that lie beside an OpenVINO graph."""
    return sum(e.bytes for e in artifact.extras if entry.path.endswith(".xml") and e.path == entry.path[:-4] + ".bin")


def bundled(manifest: Manifest, folder: Path) -> list[Artifact]:
    """The artifacts of a bundle that was verified and unpacked into `folder`.

    Raises:
        UserError: one of a runtime or precision that this version does not know.
    """
    listed = {f.path: f for f in manifest.files}
    found = []
    for a in manifest.artifacts:
        home = f"artifacts/{a.target}/"
        files: list[dict[str, Any]] = [
            {
                "path": f.path.removeprefix(home),
                "resolution": f.resolution,
                "sha256": listed[f.path].sha256,
                "bytes": listed[f.path].bytes,
                "inputs": [TensorSpec(name=p.name, dtype=p.dtype, shape=list(p.shape)) for p in f.inputs],
                "outputs": [TensorSpec(name=p.name, dtype=p.dtype, shape=list(p.shape)) for p in f.outputs],
                "preprocess": {},
            }
            for f in a.files
        ]
        extras: list[dict[str, Any]] = [
            {"path": name.removeprefix(home), "sha256": entry.sha256, "bytes": entry.bytes}
            for name, entry in listed.items()
            if name.startswith(home) and "/" not in name.removeprefix(home) and name not in {f.path for f in a.files}
        ]
        hint = a.compatibility.inference_precision
        try:
            found.append(
                Artifact(
                    student=manifest.student,
                    target=a.target,
                    precision=a.precision,  # type: ignore[arg-type]
                    runtime=a.runtime,  # type: ignore[arg-type]
                    files=[ArtifactFile(**f) for f in files],
                    source="bundle",
                    dim=a.dim,
                    patch=a.patch,
                    opset=a.opset,
                    max_batch=a.max_batch,
                    compute_capabilities=list(a.compatibility.compute_capabilities),
                    build_seconds=0.0,  # a bundle does not tell
                    details={"openvino": {"inference_precision": hint}} if hint else {},
                    extras=[ExtraFile(**e) for e in extras],
                    folder=folder / "artifacts" / a.target,
                )
            )
        except ValidationError as e:
            raise UserError(
                f"The bundle's artifact {a.target} is of a kind that this version does not know ({e.errors()[0]['msg']})."
            ) from e
    return found


def model_case(folder: Path, label: str, wanted: Wanted) -> Case:
    preprocess = load_preprocess(folder)

    def open_model(threads: int) -> Encoder:
        return TorchEncoder(load_backbone(folder))

    size = wanted.resolution or preprocess.size
    weights = (folder / "backbone.safetensors").stat().st_size if (folder / "backbone.safetensors").is_file() else None
    if size != preprocess.size:
        preprocess = replace(preprocess, size=size, resize=max(size, preprocess.resize))
    return Case(label, "torch-fp32", size, open_model, weights, preprocess=preprocess)


def onnx_cases(path: Path, label: str, wanted: Wanted) -> list[Case]:
    """A foreign ONNX file on each runtime that is asked for."""
    model = read_model(path)
    size = path.stat().st_size + external_bytes(model, path)
    ports, digest = onnx_ports(model, path.name), sha256_file(path)
    openers: dict[str, Callable[[int], Any]] = {
        "onnxruntime": partial(OnnxGraph, path, ports, digest),
        "openvino": partial(OpenVinoGraph, path, ports, digest),
    }
    if "openvino" in wanted.runtimes:
        load_openvino()
    return [graph_case(path, label, runtime, ports, size, openers[runtime], wanted) for runtime in wanted.runtimes]


def external_bytes(model: ModelProto, path: Path) -> int:
    """Bytes of the files beside an ONNX file that hold its weights.

    Raises:
        UserError: one of them is missing.
    """
    places = {
        next((e.value for e in t.external_data if e.key == "location"), "")
        for t in model.graph.initializer
        if uses_external_data(t)
    }
    for place in sorted(places):
        if not (path.parent / place).is_file():
            raise UserError(f"{path} keeps weights in {place}, which does not lie beside it; copy both into one folder.")
    return sum((path.parent / place).stat().st_size for place in places)


def openvino_case(path: Path, label: str, wanted: Wanted) -> Case:
    """A foreign OpenVINO graph."""
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise UserError(f"{path} keeps its weights in {weights.name}, which does not lie beside it; copy both into one folder.")
    ov = load_openvino()
    try:
        model = ov.Core().read_model(path)
    except RuntimeError as e:
        raise UserError(
            f"{path} is no OpenVINO graph, or is truncated ({' '.join(str(e).split())[-120:]}); export it again."
        ) from e
    ports = [
        Port(
            i.any_name,
            str(i.element_type.to_dtype()) if i.element_type.get_type_name() != "bf16" else "bfloat16",
            tuple(d.get_length() if d.is_static else None for d in i.partial_shape),
        )
        for i in model.inputs
    ]
    size = path.stat().st_size + weights.stat().st_size
    return graph_case(
        path,
        label,
        "openvino",
        checked(ports, path.name),
        size,
        partial(OpenVinoGraph, path, ports, sha256_file(weights)),
        wanted,
    )


def engine_case(path: Path, label: str, wanted: Wanted) -> Case:
    """A serialized engine: opened once to read what it takes. Where it cannot be loaded the case says so when it is opened.

    Raises:
        UserError: the file is no engine.
    """
    data = path.read_bytes()
    runtime, digest = engine_runtime(data), sha256_file(path)
    if runtime is None:
        raise UserError(f"{path} does not begin as a TensorRT engine does; build it again.")
    try:
        if reason := why_no_engine(runtime):
            raise Unrunnable(reason)
        graph = EngineGraph(runtime, data, path.name, digest)
    except Unrunnable as e:
        return Case(label, runtime, wanted.resolution, partial(refuse, str(e)), len(data))
    ports, most = checked(graph.ports, path.name), graph.max_batch

    def open_engine(threads: int) -> EngineGraph:
        return EngineGraph(runtime, data, path.name, digest)

    return replace(graph_case(path, label, runtime, ports, len(data), open_engine, wanted), max_batch=most)


def refuse(reason: str, threads: int) -> Any:
    """What a case opens with that this machine cannot execute."""
    raise Unrunnable(reason)


def graph_case(
    path: Path, label: str, runtime: str, ports: list[Port], size: int, opener: Callable[[int], Any], wanted: Wanted
) -> Case:
    """A foreign graph as a case; an open dimension that cannot be guessed is an error now."""
    resolution = resolution_of(ports, wanted.resolution, path.name)
    inputs = partial(fed, ports, resolution, path.name)
    inputs(only_batch(ports) or 1)
    return Case(label, runtime, resolution, opener, size, only_batch=only_batch(ports), inputs=inputs)


def fed(ports: list[Port], resolution: int | None, name: str, batch: int) -> dict[str, Any]:
    return feed(ports, batch, resolution, name)
