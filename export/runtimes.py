"""Every artifact as an Encoder, on the runtime that will serve it; what this machine cannot execute raises `Unrunnable`."""

import os
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from distill.encoder import Encoder, Features
from distill.errors import EnvironmentFailed, UserError
from export.artifact import Artifact, ArtifactFile, Unrunnable, read_artifact
from export.engine import EngineRuntime, collecting_log, gpu_capability, load_runtime, one_line
from export.graph import INPUT, OUTPUTS
from export.quantize import quiet_options

__all__ = ["EngineEncoder", "OnnxEncoder", "Unrunnable", "open_artifact", "read_artifact", "why_unrunnable"]


def open_artifact(artifact: Artifact, resolution: int | None = None, threads: int | None = None) -> Encoder:
    """An artifact's file as an Encoder.

    Args:
        resolution: which file; the first without one.
        threads: of onnxruntime on the CPU; all that this process may use without it. Naming it keeps ONNX files off a GPU.

    Raises:
        Unrunnable: this machine cannot execute it.
        UserError: no file for that resolution, or the file was changed since it was exported.
    """
    entry = artifact.file(resolution)
    if artifact.runtime == "onnxruntime":
        return OnnxEncoder(artifact, entry, threads)
    if reason := why_unrunnable(artifact.runtime, artifact.compute_capabilities):
        raise Unrunnable(reason)
    return EngineEncoder(artifact, entry)


def why_unrunnable(runtime: str, capabilities: list[str]) -> str | None:
    """Why this machine cannot execute an engine compiled for these compute capabilities; None when it can."""
    if runtime == "onnxruntime":
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
        try:
            self.session = onnxruntime.InferenceSession(data, quiet_options(count), providers=providers)
        except (
            Exception
        ) as e:  # onnxruntime's exceptions have no common base; the bytes are the exported ones, so it is the runtime
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


class EngineEncoder:
    """A TensorRT or TensorRT-RTX engine on the first CUDA GPU, with torch's CUDA tensors as its buffers.

    `__call__` copies images to the GPU and features back; `infer` is the engine alone, for measuring it apart from the copies.
    """

    def __init__(self, artifact: Artifact, entry: ArtifactFile):
        assert artifact.runtime != "onnxruntime"
        runtime: EngineRuntime = artifact.runtime
        trt = load_runtime(runtime)
        data = artifact.content(entry)  # hashed first: deserializing runs native code from the file
        self.log = collecting_log(trt)
        self.runtime = trt.Runtime(self.log)
        if hasattr(self.runtime, "get_engine_validity"):
            validity, diagnostics = self.runtime.get_engine_validity(data)
            if validity == trt.EngineValidity.INVALID:
                raise Unrunnable(
                    f"{runtime} {trt.__version__} says that {entry.path} cannot run here: {_diagnosis(trt, diagnostics)}"
                )
        self.engine = self.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise Unrunnable(f"{runtime} {trt.__version__} cannot load {entry.path}: {self.log.first() or 'it gave no reason'}")
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()
        self.entry, self.target, self.max_batch = entry, artifact.target, artifact.max_batch
        self.conditions = conditions_of(artifact, entry, f"{runtime} {trt.__version__}", torch.cuda.get_device_name(0), None)

    def infer(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] float32 on the GPU -> outputs by name on the GPU. Enqueued on `self.stream`, not waited for."""
        if len(images) > self.max_batch:
            raise UserError(
                f"{self.entry.path} was built for batches up to {self.max_batch}, got {len(images)}; raise export.max_batch."
            )
        self.context.set_input_shape(INPUT, tuple(images.shape))
        outputs = {}
        for name in OUTPUTS:
            shape = tuple(self.context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=torch.float32, device=images.device)
            self.context.set_tensor_address(name, outputs[name].data_ptr())
        self.context.set_tensor_address(INPUT, images.data_ptr())
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise EnvironmentFailed(
                f"{self.entry.path} failed on the GPU: {self.log.first() or 'no reason given'}; free some GPU memory."
            )
        return outputs

    def __call__(self, images: Tensor) -> Features:
        images = _checked(images, self.entry)
        with torch.cuda.stream(self.stream):
            outputs = self.infer(images.to("cuda", non_blocking=True))
            cls, patches = (outputs[name].cpu() for name in OUTPUTS)  # waits for the stream
        return Features(cls, patches)


def _diagnosis(trt: Any, diagnostics: int) -> str:
    names = [n for n, m in trt.EngineInvalidityDiagnostics.__members__.items() if int(diagnostics) & int(m)]
    return ", ".join(names).lower().replace("_", " ") or f"diagnostics {diagnostics}"
