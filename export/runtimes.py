"""Every artifact as an Encoder, on the runtime that will serve it; what this machine cannot execute raises `Unrunnable`."""

import os
from pathlib import PurePath
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from distill.encoder import Encoder, Features
from distill.errors import EnvironmentFailed, UserError
from export.artifact import Artifact, ArtifactFile, Unrunnable, read_artifact
from export.engine import collecting_log, gpu_capability, load_runtime, one_line
from export.graphs.nodes import INPUT, OUTPUTS
from export.sessions import exact_session, usual_session

__all__ = [
    "Engine",
    "EngineEncoder",
    "OnnxEncoder",
    "OpenVinoEncoder",
    "Unrunnable",
    "load_openvino",
    "open_artifact",
    "read_artifact",
    "why_unrunnable",
]

OPENVINO_SHAPES = 3  # batch sizes that OpenVINO compiles for by themselves: about 5 % faster than with the batch left open


def open_artifact(artifact: Artifact, resolution: int | None = None, threads: int | None = None) -> Encoder:
    """An artifact's file as an Encoder.

    Args:
        resolution: which file; the first without one.
        threads: of ONNX Runtime or OpenVINO on the CPU; all that this process may use without it. Naming it keeps ONNX files off a GPU.

    Raises:
        Unrunnable: this machine cannot execute it.
        UserError: no file for that resolution, or the file was changed since it was exported.
    """
    entry = artifact.file(resolution)
    if artifact.runtime == "onnxruntime":
        return OnnxEncoder(artifact, entry, threads)
    if artifact.runtime == "openvino":
        return OpenVinoEncoder(artifact, entry, threads)
    if reason := why_unrunnable(artifact.runtime, artifact.compute_capabilities):
        raise Unrunnable(reason)
    return EngineEncoder(artifact, entry)


def why_unrunnable(runtime: str, capabilities: list[str]) -> str | None:
    """Why this machine cannot execute what that runtime takes, an engine for these compute capabilities; None when it can."""
    if runtime == "onnxruntime":
        return None
    if runtime == "openvino":
        try:
            load_openvino()
        except EnvironmentFailed as e:
            return one_line(e)
        return None
    compiled = f"the {runtime} engine is compiled for SM {', '.join(capabilities)}"
    found = gpu_capability()
    if found is None:
        return f"no CUDA GPU on this machine; {compiled}"
    if found not in capabilities:
        return f"this machine's GPU is SM {found}; {compiled}"
    try:
        load_runtime(runtime)  # type: ignore[arg-type]
    except EnvironmentFailed as e:
        return one_line(e)
    return None


def load_openvino() -> Any:
    """The `openvino` module.

    Raises:
        EnvironmentFailed: it is not installed, or its libraries do not load.
    """
    try:
        import openvino

        openvino.Core  # noqa: B018  a broken installation imports as an empty namespace
    except ModuleNotFoundError as e:
        raise EnvironmentFailed("openvino is not installed; pip install 'decant-vision[openvino]'.") from e
    except (ImportError, OSError, AttributeError, RuntimeError) as e:
        raise EnvironmentFailed(
            f"openvino is installed but does not load ({one_line(e)}); pip install 'decant-vision[openvino]'."
        ) from e
    return openvino


def conditions_of(artifact: Artifact, entry: ArtifactFile, runtime: str, device: str, threads: int | None) -> dict[str, Any]:
    return {
        "runtime": runtime,
        "precision": artifact.precision,
        "device": device,
        "threads": threads,
        "resolution": entry.resolution,
        "artifact_sha256": entry.sha256,
    }


def available_cores() -> int:
    """Cores that this process may use (a container often has fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked(images: Tensor, entry: ArtifactFile) -> Tensor:
    size = entry.resolution
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size) or not len(images):
        raise UserError(f"{entry.path} takes images [batch, 3, {size}, {size}] and got {list(images.shape)}.")
    return images.detach().float().contiguous()


def made_here(target: str) -> bool:
    """Whether our quantizer made it: files of other tools are run as their users would, at ONNX Runtime's defaults."""
    return target.count("-") < 2


class OnnxEncoder:
    """An ONNX artifact in onnxruntime: on a CUDA GPU where onnxruntime has one and `threads` is None, else on the CPU."""

    def __init__(self, artifact: Artifact, entry: ArtifactFile, threads: int | None = None):
        assert threads is None or threads >= 1
        cuda = (
            threads is None and "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()
        )
        providers = [*(["CUDAExecutionProvider"] if cuda else []), "CPUExecutionProvider"]
        count = threads or available_cores()
        data = artifact.content(entry)
        opened = exact_session if made_here(artifact.target) else usual_session
        try:
            self.session = opened(data, count, providers)
        except Exception as e:  # its exceptions have no common base; the bytes are the exported ones, so it is the runtime
            raise Unrunnable(f"onnxruntime {onnxruntime.__version__} cannot load {entry.path}: {one_line(e)}") from e
        on_gpu = self.session.get_providers()[0] == "CUDAExecutionProvider"  # it falls back to the CPU without an error
        device = torch.cuda.get_device_name(0) if on_gpu else "cpu"
        self.entry, self.target = entry, artifact.target
        self.conditions = conditions_of(
            artifact, entry, f"onnxruntime {onnxruntime.__version__}", device, None if on_gpu else count
        )

    def __call__(self, images: Tensor) -> Features:
        array = np.ascontiguousarray(_checked(images, self.entry).cpu().numpy())
        cls, patches = self.session.run(list(OUTPUTS), {INPUT: array})
        return Features(torch.from_numpy(cls), torch.from_numpy(patches))


class OpenVinoEncoder:
    """An OpenVINO artifact on the CPU: an ONNX graph, or an IR (.xml) whose weights are the extra file of the same stem (.bin).

    `artifact.details["openvino"]["inference_precision"]` is what floating-point operations compute in: "f32", "bf16", or None for the
    plugin's own choice (bf16 where the CPU has it); without the entry the artifact's precision says. What the plugin then uses is
    in the conditions. Compiled for a batch of 1, for the first other sizes that come, each by itself, then once for any; with
    `batch_open` once for any at once, as a file with an open batch is compiled by who gives it no thought.
    """

    def __init__(self, artifact: Artifact, entry: ArtifactFile, threads: int | None = None, batch_open: bool = False):
        assert threads is None or threads >= 1
        self.shapes = 0 if batch_open else OPENVINO_SHAPES
        first = None if batch_open else 1
        try:
            ov = load_openvino()
        except EnvironmentFailed as e:
            raise Unrunnable(one_line(e)) from e
        self.count = threads or available_cores()
        self.entry, self.target, self.name = entry, artifact.target, f"openvino {_short_version(ov)}"
        self.core, self.requests = ov.Core(), dict[int | None, Any]()
        default = {"fp32": "f32", "bf16": "bf16"}.get(artifact.precision)
        self.hint = artifact.details.get("openvino", {}).get("inference_precision", default)
        data = (artifact.content(entry), *_weights_beside(artifact, entry))
        try:
            self.model = self.core.read_model(*data)
            self.requests[first] = self._compile(first)
        except Exception as e:  # a RuntimeError of its own; the bytes are the exported ones, so it is the runtime
            raise Unrunnable(f"{self.name} cannot load {entry.path}: {one_line(e)}") from e
        used = str(self.requests[first].get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string())
        if artifact.precision == "bf16" and used != "bf16":
            raise Unrunnable(f"{self.name} computes in {used} on this CPU, which lacks BF16; {entry.path} is called bf16")
        self.conditions = {
            **conditions_of(artifact, entry, self.name, "cpu", self.count),
            "inference_precision": used,
        }

    def __call__(self, images: Tensor) -> Features:
        array = np.ascontiguousarray(_checked(images, self.entry).cpu().numpy())
        # The input is read in place; outputs are copied out of the request, which reuses its buffers.
        found = self._request(len(array)).infer({INPUT: array}, share_inputs=True, share_outputs=False)
        cls, patches = (torch.from_numpy(found[name]) for name in OUTPUTS)
        return Features(cls, patches)

    def _request(self, batch: int) -> Any:
        key = batch if batch in self.requests or len(self.requests) < self.shapes else None
        if key not in self.requests:
            self.requests[key] = self._compile(key)
        return self.requests[key]

    def _compile(self, batch: int | None) -> Any:
        model = self.model.clone()
        if batch is not None:
            size = self.entry.resolution
            model.reshape([batch, 3, size, size])
        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.count, "NUM_STREAMS": 1}
        if self.hint is not None:
            properties["INFERENCE_PRECISION_HINT"] = self.hint
        return self.core.compile_model(model, "CPU", properties).create_infer_request()


def _weights_beside(artifact: Artifact, entry: ArtifactFile) -> list[bytes]:
    """The weights of an IR, proved to be those that artifact.json names; nothing for an ONNX graph, which holds its own."""
    if not entry.path.endswith(".xml"):
        return []
    wanted = PurePath(entry.path).with_suffix(".bin").name
    found = [e for e in artifact.extras if e.path == wanted]
    if not found:
        raise UserError(f"{artifact.folder} holds {entry.path} without its weights {wanted}; run the export stage again.")
    return [artifact.content(found[0])]


def _short_version(ov: Any) -> str:
    """`2026.4.0` of `2026.4.0-21234-abcdef`."""
    return str(ov.__version__).partition("-")[0]


class Engine:
    """A deserialized TensorRT or TensorRT-RTX engine on the first CUDA GPU, with torch's CUDA tensors as its buffers.

    Args:
        data: the plan; hash it first, as deserializing runs native code from it. name: of the file, for messages.

    Raises:
        Unrunnable: the runtime refuses it.
    """

    def __init__(self, runtime: str, data: bytes, name: str):
        trt = load_runtime(runtime)  # type: ignore[arg-type]
        self.name, self.version = name, f"{runtime} {trt.__version__}"
        self.log = collecting_log(trt)
        self.runtime = trt.Runtime(self.log)
        if hasattr(self.runtime, "get_engine_validity"):
            validity, diagnostics = self.runtime.get_engine_validity(data)
            if validity == trt.EngineValidity.INVALID:
                raise Unrunnable(f"{self.version} says that {name} cannot run here: {_diagnosis(trt, diagnostics)}")
        self.engine = self.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise Unrunnable(f"{self.version} cannot load {name}: {self.log.first() or 'it gave no reason'}")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.outputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()

    def infer(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] float32 on the GPU -> outputs by name on the GPU. Enqueued on `self.stream`, not waited for."""
        self.context.set_input_shape(INPUT, tuple(images.shape))
        outputs = {}
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=torch.float32, device=images.device)
            self.context.set_tensor_address(name, outputs[name].data_ptr())
        self.context.set_tensor_address(INPUT, images.data_ptr())
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise EnvironmentFailed(
                f"{self.name} failed on the GPU: {self.log.first() or 'no reason given'}; free some GPU memory."
            )
        return outputs


class EngineEncoder:
    """An engine as an Encoder.

    `__call__` copies images to the GPU and features back; `infer` is the engine alone, for measuring it apart from the copies.
    """

    def __init__(self, artifact: Artifact, entry: ArtifactFile):
        assert artifact.runtime in ("tensorrt_rtx", "tensorrt")
        data = artifact.content(entry)  # hashed first: deserializing runs native code from the file
        self.engine = Engine(artifact.runtime, data, entry.path)
        self.stream = self.engine.stream
        self.entry, self.target, self.max_batch = entry, artifact.target, artifact.max_batch
        self.conditions = conditions_of(artifact, entry, self.engine.version, torch.cuda.get_device_name(0), None)

    def infer(self, images: Tensor) -> dict[str, Tensor]:
        """As `Engine.infer`.

        Raises:
            UserError: more images than the engine was built for.
        """
        if len(images) > self.max_batch:
            raise UserError(
                f"{self.entry.path} was built for batches up to {self.max_batch}, got {len(images)}; raise export.max_batch."
            )
        return self.engine.infer(images)

    def __call__(self, images: Tensor) -> Features:
        images = _checked(images, self.entry)
        with torch.cuda.stream(self.stream):
            outputs = self.infer(images.to("cuda", non_blocking=True))
            cls, patches = (outputs[name].cpu() for name in OUTPUTS)  # waits for the stream
        return Features(cls, patches)


def _diagnosis(trt: Any, diagnostics: int) -> str:
    names = [n for n, m in trt.EngineInvalidityDiagnostics.__members__.items() if int(diagnostics) & int(m)]
    return ", ".join(names).lower().replace("_", " ") or f"diagnostics {diagnostics}"
