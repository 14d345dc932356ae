"""A bundle as a Triton model repository."""

import json
import shutil
from pathlib import Path

from distill.data.preprocess import Preprocess
from distill.errors import GateFailed, UserError
from distill.files import read_json
from export.bundling.archive import shown
from export.bundling.verify import BundledArtifact, BundledFile, Manifest
from export.graphs.nodes import serialize
from export.graphs.preprocess_graph import PIXELS, preprocess_graph

TRITON = {"onnxruntime": ("onnxruntime", "model.onnx"), "tensorrt": ("tensorrt", "model.plan")}
TRITON_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}
QUEUE_US = 1000
"""How long Triton waits for a batch to fill: about a tenth of what a small student takes on a CPU."""


def triton(bundle: Path, manifest: Manifest, files: Path, out: Path) -> list[str]:
    """NAME/config.pbtxt and NAME/1/model.* for every file, NAME-pixels for the ensemble with its preprocessing."""
    served = [(a, f) for a in manifest.artifacts if a.runtime in TRITON for f in a.files]
    if not served:
        raise UserError(
            f"{bundle} holds no artifact that Triton serves (ONNX Runtime or TensorRT); export onnx-fp32 or another."
        )
    sizes = sorted({f.resolution for _, f in served})
    largest = max(a.max_batch for a, _ in served)
    for size in sizes:
        graph = preprocess_graph(settings(bundle, files, size))
        name = f"{manifest.student}-preprocess-{size}"
        ports = ([(PIXELS, "uint8", [-1, -1, 3])], [("preprocessed", "float32", [3, size, size])])
        add_model(out, name, backend_config(name, "onnxruntime", largest, *ports), "model.onnx", serialize(graph))
    for artifact, file in served:
        backend, filename = TRITON[artifact.runtime]
        name = f"{manifest.student}-{artifact.target}-{file.resolution}"
        inputs, outputs = ([(p.name, p.dtype, numbers(p.shape[1:])) for p in ports] for ports in (file.inputs, file.outputs))
        add_model(out, name, backend_config(name, backend, artifact.max_batch, inputs, outputs), filename, files / file.path)
        add_model(out, f"{name}-pixels", ensemble_config(name, manifest.student, artifact, file), None, None)
    return [f"Serve: tritonserver --model-repository=DIR (models {manifest.student}-TARGET-SIZE; -pixels takes uint8 pictures)"]


def settings(bundle: Path, files: Path, size: int) -> Preprocess:
    """What preprocess.json says of a resolution."""
    try:
        return Preprocess.from_json(read_json(files / "preprocess.json")["resolutions"][str(size)])
    except (ValueError, KeyError, TypeError) as e:
        raise GateFailed(f"{bundle}: its preprocess.json has no usable settings for {size} px; rebuild it.") from e


def numbers(shape: list[int | str]) -> list[int]:
    return [s if isinstance(s, int) else -1 for s in shape]


def add_model(out: Path, name: str, config: str, filename: str | None, content: Path | bytes | None) -> None:
    """Version 1 of a model; an ensemble's is an empty folder, which Triton insists on."""
    (out / name / "1").mkdir(parents=True)
    (out / name / "config.pbtxt").write_text(config, encoding="utf-8")
    if isinstance(content, Path):
        shutil.copyfile(content, out / name / "1" / str(filename))
    elif content is not None:
        (out / name / "1" / str(filename)).write_bytes(content)
    else:
        (out / name / "1" / ".keep").write_bytes(b"")  # git, tar and object stores lose empty folders


Ports = list[tuple[str, str, list[int]]]


def backend_config(name: str, backend: str, max_batch: int, inputs: Ports, outputs: Ports) -> str:
    """config.pbtxt of a model that a backend runs."""
    lines = [f"name: {quoted(name)}", f"backend: {quoted(backend)}", f"max_batch_size: {max_batch}"]
    lines += port_lines("input", inputs) + port_lines("output", outputs)
    return "\n".join([*lines, f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_US} }}"]) + "\n"


def port_lines(kind: str, ports: Ports) -> list[str]:
    lines = []
    for name, dtype, dims in ports:
        if dtype not in TRITON_TYPES:
            raise UserError(
                f"Triton's configuration is not written for {shown(dtype)} ({shown(name)}); leave out that artifact."
            )
        lines.append(f"{kind} {{ name: {quoted(name)} data_type: {TRITON_TYPES[dtype]} dims: {dims} }}")
    return lines


def ensemble_config(name: str, student: str, artifact: BundledArtifact, file: BundledFile) -> str:
    """config.pbtxt of preprocessing and model in a row."""
    outputs = [(p.name, p.dtype, numbers(p.shape[1:])) for p in file.outputs]
    lines = [f"name: {quoted(name + '-pixels')}", 'platform: "ensemble"', f"max_batch_size: {artifact.max_batch}"]
    lines += port_lines("input", [(PIXELS, "uint8", [-1, -1, 3])]) + port_lines("output", outputs)
    kept = {p.name: p.name for p in file.outputs}
    lines.append("ensemble_scheduling {")
    lines += step(f"{student}-preprocess-{file.resolution}", {PIXELS: PIXELS}, {"preprocessed": "preprocessed"})
    lines += step(name, {file.inputs[0].name: "preprocessed"}, kept)
    return "\n".join([*lines, "}"]) + "\n"


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> list[str]:
    maps = [
        f"    {kind}_map {{ key: {quoted(k)} value: {quoted(v)} }}"
        for kind, ports in (("input", inputs), ("output", outputs))
        for k, v in ports.items()
    ]
    return ["  step {", f"    model_name: {quoted(model)} model_version: -1", *maps, "  }"]


def quoted(text: str) -> str:
    """A string of protobuf's text format; JSON's escapes are among its own."""
    return json.dumps(text)
