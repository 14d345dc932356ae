"""ONNX -> engine, by TensorRT for RTX (compiles without a GPU) or TensorRT (on the GPU it builds for), through a thin adapter.

Both are strongly typed: the graph decides every precision, no flag does. So a graph is checked against the precision in its
name before it is compiled, and the engine after (`export/engine_proof.py`). TensorRT 10.3 to 11.x and TensorRT-RTX 1.x differ in what
they have: that is found by `hasattr` and said in one sentence of `EngineInfo.notes`.
"""

import hashlib
import importlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from onnx import ModelProto

from distill.errors import DecantError, EnvironmentFailed, GateFailed, UserError
from distill.files import write_bytes
from export.artifact import Precision
from export.engine_config import EngineConfig, apply_config, attach_timing_cache, save_timing_cache
from export.engine_proof import inspector_json, prove_engine, prove_plan
from export.graph import INPUT, load_graph, serialize, type_counts, verify_precision
from export.graphs.anatomy import Anatomy
from export.graphs.attention_blocks import attention_blocks
from export.proof import QUANTIZED_CLAIMS, Proof, prove, refuse

EngineRuntime = Literal["tensorrt_rtx", "tensorrt"]
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
HOW_TO_INSTALL = {
    "tensorrt_rtx": "pip install tensorrt_rtx (wheels exist for Linux and Windows on x86-64)",
    "tensorrt": "pip install 'decant-vision[tensorrt]'",
}
# Seen with TensorRT-RTX 1.7: what it answers says nothing of the cause.
HINTS = {
    "STRIP_PLAN": "without a GPU it compiles no engine for a later refit: leave out strip_plan",
    "REFIT": "without a GPU it compiles no engine for a later refit: leave out refit",
    "VERSION_COMPATIBLE": "the lean runtime may be missing here: exclude_lean_runtime compiles without it",
}


@dataclass(frozen=True)
class EngineInfo:
    """A built engine: seconds of building, hash and size of its file, the GPUs it was compiled for, and what is inside.

    Attributes:
        capabilities: compute capabilities, e.g. ["8.6", "8.9"].
        profile: smallest, most likely and largest batch. layers: of the network as parsed.
        matmul_types: matrix products by element type in the compiled graph.
        notes: what this version of the runtime could not do, one sentence each.
        proof: what the engine runs, as far as it can be read here.
    """

    seconds: float
    sha256: str
    bytes: int
    capabilities: list[str]
    profile: tuple[int, int, int]
    layers: int
    matmul_types: dict[str, int]
    notes: list[str]
    version: str
    proof: Proof


def load_runtime(runtime: EngineRuntime) -> Any:
    """The Python module of a runtime.

    Raises:
        EnvironmentFailed: it is not installed, or its libraries do not load.
    """
    try:
        module = importlib.import_module(runtime)
        module.Logger  # noqa: B018  the bare `tensorrt` package imports without its libraries and then has nothing
    except ModuleNotFoundError as e:
        raise EnvironmentFailed(f"{runtime} is not installed; {HOW_TO_INSTALL[runtime]}.") from e
    except (ImportError, OSError, AttributeError, RuntimeError) as e:
        raise EnvironmentFailed(f"{runtime} is installed but does not load ({one_line(e)}); {HOW_TO_INSTALL[runtime]}.") from e
    return module


def build_engine(
    graph: Path,
    out: Path,
    runtime: EngineRuntime,
    precision: Precision,
    batches: tuple[int, int, int],
    capabilities: list[str],
    config: EngineConfig | None = None,
) -> EngineInfo:
    """Compile an ONNX file and write the engine, if it runs what its name says.

    Args:
        batches: smallest, most likely and largest batch: the first optimisation profile.
        capabilities: GPUs to compile for, e.g. ["8.6", "12.0"] (tensorrt_rtx). `tensorrt` compiles for the GPU that it finds.
        config: everything else; defaults when None.

    Raises:
        EnvironmentFailed: the runtime is missing, or `tensorrt` finds no GPU.
        GateFailed: the graph or the engine is not in `precision`, or the runtime refuses it.
        UserError: a compute capability that this version does not know, a timing cache of another one.
    """
    config = config or EngineConfig()
    trt = load_runtime(runtime)
    model = load_graph(graph)
    verify_precision(model, precision, graph.name)
    targets, crossed, name = _targets(trt, runtime, capabilities), runtime == "tensorrt_rtx", f"{runtime} {trt.__version__}"
    log = collecting_log(trt)
    began = time.perf_counter()
    builder = trt.Builder(log)
    network, parser = _parse(trt, builder, log, serialize(model), name, graph.name)
    layers, settings = network.num_layers, builder.create_builder_config()
    _set_targets(trt, settings, runtime, targets)
    for shapes in (batches, *(p.shapes() for p in config.profiles)):
        _add_profile(builder, network, settings, shapes)
    notes = apply_config(trt, settings, config, name, crossed) + attach_timing_cache(settings, config, name, crossed)
    plan = builder.build_serialized_network(network, settings)
    seconds = time.perf_counter() - began
    del parser  # not before: it owns the weights that the network points to
    if plan is None:
        hint = next((f" ({HINTS[f]})" for f in config.flags() if f in HINTS), "")
        raise GateFailed(f"{name} cannot compile {graph.name}: {log.first() or 'it gave no reason'}{hint}.")
    data = bytes(plan)
    save_timing_cache(settings, config, crossed)
    proof = _proof(trt, log, runtime, model, data, precision)
    refuse(proof, precision, f"the {runtime} engine of {graph.name}")
    write_bytes(out, data)
    return EngineInfo(
        seconds=seconds,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        capabilities=targets,
        profile=batches,
        layers=layers,
        matmul_types=type_counts(model),
        notes=notes,
        version=trt.__version__,
        proof=proof,
    )


def gpu_capability() -> str | None:
    """Compute capability of this machine's first CUDA GPU, e.g. "8.6"; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}.{minor}"


def one_line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")


def collecting_log(trt: Any) -> Any:
    """A TensorRT logger that collects errors instead of printing them; `.first()` is the first, which names the cause."""

    class Collected(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(one_line(message))

        def first(self) -> str:
            return self.errors[0] if self.errors else ""

    return Collected()


def _targets(trt: Any, runtime: EngineRuntime, capabilities: list[str]) -> list[str]:
    """The compute capabilities that the engine will be for."""
    if runtime == "tensorrt":
        found = gpu_capability()
        if found is None:
            raise EnvironmentFailed(
                "tensorrt compiles only on a machine with the CUDA GPU that it compiles for, and there is none here."
            )
        return [found]
    if not hasattr(trt, "ComputeCapability"):
        raise EnvironmentFailed(
            f"{runtime} {trt.__version__} compiles only for the GPU that it finds; install a newer {runtime}."
        )
    known = {m.removeprefix("SM") for m in trt.ComputeCapability.__members__ if m.startswith("SM")}
    if unknown := [c for c in capabilities if c.replace(".", "") not in known]:
        names = ", ".join(f"{k[:-1]}.{k[-1]}" for k in sorted(known, key=int))
        raise UserError(
            f"export.compute_capabilities: {runtime} {trt.__version__} does not compile for {unknown[0]}, only for {names}."
        )
    return list(capabilities)


def _parse(trt: Any, builder: Any, log: Any, data: bytes, runtime: str, name: str) -> tuple[Any, Any]:
    flags = trt.NetworkDefinitionCreationFlag
    # 10.x has weak typing as its default and 8.x/9.x an implicit batch; 11 has neither choice.
    bits = sum(1 << int(getattr(flags, f)) for f in ("STRONGLY_TYPED", "EXPLICIT_BATCH") if hasattr(flags, f))
    network = builder.create_network(bits)
    parser = trt.OnnxParser(network, log)
    if parser.parse(data):
        return network, parser
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    reasons = [f"{e.node_name() or 'a node'} ({e.node_operator()}): {one_line(e.desc())}" for e in errors]
    raise GateFailed(f"{runtime} cannot parse {name}: {reasons[0] if reasons else log.first() or 'it gave no reason'}.")


def _set_targets(trt: Any, config: Any, runtime: EngineRuntime, capabilities: list[str]) -> None:
    if runtime == "tensorrt":
        return
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), i)


def _add_profile(builder: Any, network: Any, config: Any, batches: tuple[int, int, int]) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    assert [i.name for i in inputs] == [INPUT], f"the graph's inputs are {[i.name for i in inputs]}"
    rest = tuple(inputs[0].shape)[1:]
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *((b, *rest) for b in batches))
    config.add_optimization_profile(profile)


def _proof(trt: Any, log: Any, runtime: EngineRuntime, model: ModelProto, plan: bytes, precision: Precision) -> Proof:
    """What the engine runs: of a plan of TensorRT-RTX from its kernel listing, of TensorRT's from the inspector, else from the graph."""
    anatomy = Anatomy(model)
    graph, blocks = prove(anatomy, precision if precision in QUANTIZED_CLAIMS else None), attention_blocks(anatomy)
    if runtime == "tensorrt_rtx":
        return prove_plan(plan, graph, blocks)
    try:
        return prove_engine(inspector_json(trt, plan, log), graph, blocks)
    except DecantError as e:
        return replace(graph, notes=(*graph.notes, f"the engine's layers were not listed: {one_line(e)}"))
