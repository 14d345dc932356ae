"""Graphs of unknown origin, opened on a runtime: inputs by name in, outputs out. What they compute is not known here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from distill.errors import EnvironmentFailed
from export.artifact import Unrunnable
from export.engine import EngineRuntime, gpu_capability, load_runtime, one_line
from export.runtimes import Engine, load_openvino
from export.sessions import quiet_options
from export.stopwatch.bench_ports import Port

Feed = dict[str, np.ndarray]
NUMPY_NAMES = ("float16", "float32", "int8", "int32", "int64", "uint8", "bool", "bfloat16")
TORCH_TYPES = {name: getattr(torch, name) for name in NUMPY_NAMES}
TENSORRT_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}


class OnnxGraph:
    """An ONNX file in onnxruntime on the CPU."""

    def __init__(self, path: Path, ports: Sequence[Port], sha256: str, threads: int):
        try:
            self.session = onnxruntime.InferenceSession(path, quiet_options(threads), providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime's exceptions have no common base
            raise Unrunnable(f"onnxruntime {onnxruntime.__version__} cannot load {path.name}: {one_line(e)[:300]}.") from e
        self.conditions = conditions_of(f"onnxruntime {onnxruntime.__version__}", ports, sha256, threads)
        self.name = path.name

    def __call__(self, inputs: Feed) -> list[np.ndarray]:
        try:
            return self.session.run(None, inputs)
        except Exception as e:
            raise Unrunnable(f"{self.conditions['runtime']} fails on {self.name}: {one_line(e)[:300]}.") from e


class OpenVinoGraph:
    """An ONNX file or an OpenVINO graph in OpenVINO on the CPU, compiled for each shape that it is fed, in the plugin's own precision."""

    def __init__(self, path: Path, ports: Sequence[Port], sha256: str, threads: int):
        try:
            ov = load_openvino()
        except EnvironmentFailed as e:
            raise Unrunnable(one_line(e) + ".") from e
        self.core, self.name = ov.Core(), path.name
        self.properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self.requests: dict[Any, Any] = {}
        version = f"openvino {str(ov.__version__).partition('-')[0]}"
        self.conditions = conditions_of(version, ports, sha256, threads)
        try:
            self.model = self.core.read_model(path)
            used = self.core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
        except RuntimeError as e:
            raise Unrunnable(f"{version} cannot load {path.name}: {one_line(e)[-300:]}.") from e
        self.conditions["inference_precision"] = used

    def __call__(self, inputs: Feed) -> Any:
        key = tuple(x.shape for x in inputs.values())
        try:
            if key not in self.requests:
                model = self.model.clone()
                model.reshape({name: list(x.shape) for name, x in inputs.items()})
                self.requests[key] = self.core.compile_model(model, "CPU", self.properties).create_infer_request()
            return self.requests[key].infer(inputs, share_inputs=True, share_outputs=False)
        except RuntimeError as e:
            raise Unrunnable(f"{self.conditions['runtime']} fails on {self.name}: {one_line(e)[-300:]}.") from e


class EngineGraph:
    """A serialized TensorRT or TensorRT-RTX engine on the first CUDA GPU: inputs are copied there and outputs back.

    Attributes:
        ports: its inputs. max_batch: the largest first dimension that its first optimisation profile allows, where that is open.
        stream: what `infer` enqueues on.
    """

    def __init__(self, runtime: EngineRuntime, data: bytes, name: str, sha256: str):
        trt = load_runtime(runtime)
        self.loaded = Engine(runtime, data, name)
        self.stream, self.name = self.loaded.stream, name
        engine = self.loaded.engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        fed = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.ports = [Port(n, self._dtype(n), tuple(None if d < 0 else d for d in engine.get_tensor_shape(n))) for n in fed]
        open_ = [p for p in self.ports if p.shape and p.shape[0] is None]
        self.max_batch = min((engine.get_tensor_profile_shape(p.name, 0)[2][0] for p in open_), default=None)
        self.conditions = {
            **conditions_of(self.loaded.version, self.ports, sha256, None),
            "device": torch.cuda.get_device_name(0),
        }

    def __call__(self, inputs: Feed) -> dict[str, Tensor]:
        with torch.cuda.stream(self.stream):
            found = self.infer({n: torch.from_numpy(x).to("cuda", non_blocking=True) for n, x in inputs.items()})
            return {n: x.cpu() for n, x in found.items()}  # waits for the stream

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs on the GPU -> outputs on the GPU, enqueued on `stream`."""
        context = self.loaded.context
        for name, x in inputs.items():
            context.set_input_shape(name, tuple(x.shape))
            context.set_tensor_address(name, x.data_ptr())
        outputs = {}
        for name in self.loaded.outputs:
            shape, dtype = tuple(context.get_tensor_shape(name)), TORCH_TYPES[self._dtype(name)]
            outputs[name] = torch.empty(shape, dtype=dtype, device="cuda")
            context.set_tensor_address(name, outputs[name].data_ptr())
        if not context.execute_async_v3(self.stream.cuda_stream):
            raise Unrunnable(f"{self.name} failed on the GPU: {self.loaded.log.first() or 'no reason given'}.")
        return outputs

    def _dtype(self, name: str) -> str:
        kind = self.loaded.engine.get_tensor_dtype(name).name
        return TENSORRT_TYPES.get(kind, kind.lower())


def conditions_of(runtime: str, ports: Sequence[Port], sha256: str, threads: int | None) -> dict[str, Any]:
    """Conditions of a foreign graph: its precision is not known, its inputs are."""
    found = {"runtime": runtime, "device": "cpu", "threads": threads, "artifact_sha256": sha256}
    return {**found, "inputs": "; ".join(p.shown() for p in ports)}


def engine_runtime(data: bytes) -> EngineRuntime | None:
    """Which runtime wrote a plan, by its first bytes: `vtrt` as TensorRT-RTX 1.7 writes, `ftrt` as TensorRT; None for no plan."""
    if b"trt" not in data[:8]:
        return None
    return "tensorrt_rtx" if data.startswith(b"vtrt") else "tensorrt"


def why_no_engine(runtime: EngineRuntime) -> str | None:
    """Why no engine of that runtime can be loaded here."""
    if gpu_capability() is None:
        return f"no CUDA GPU on this machine, which a {runtime} engine needs."
    try:
        load_runtime(runtime)
    except EnvironmentFailed as e:
        return one_line(e) + "."
    return None
