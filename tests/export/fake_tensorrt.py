"""TensorRT's Python API as far as the adapter may touch it, with exactly the names that 10.3, 10.12 and 11 have: no GPU, no wheel from the
ordinary index. What is set is written down; a name that a version lacks is an AttributeError, as with the real one.
"""

import json
import types
from collections.abc import Callable
from typing import Any

from onnx import ModelProto

from export.graphs.anatomy import Anatomy
from export.graphs.attention_blocks import attention_blocks
from export.proof import prove

COMMON = (
    *("DEBUG", "GPU_FALLBACK", "REFIT", "DISABLE_TIMING_CACHE", "TF32", "SPARSE_WEIGHTS", "SAFETY_SCOPE", "DIRECT_IO"),
    *("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "ERROR_ON_TIMING_CACHE_MISS", "DISABLE_COMPILATION_CACHE", "STRIP_PLAN"),
    *("REFIT_IDENTICAL", "WEIGHT_STREAMING"),
)
OF_10_3 = ("FP16", "INT8", "BF16", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
OF_11 = ("REFIT_INDIVIDUAL", "STRICT_NANS", "MONITOR_MEMORY", "EDITABLE_TIMING_CACHE", "DISTRIBUTIVE_INDEPENDENCE")
FLAGS = {"10.3.0": (*COMMON, *OF_10_3), "10.12.0": (*COMMON, *OF_10_3, *OF_11), "11.4.0": (*COMMON, *OF_11)}
NEWER = ("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY")
LEVELS = {"10.3.0": ("NONE", "AMPERE_PLUS"), "10.12.0": NEWER, "11.4.0": NEWER}
WEAK = ("EXPLICIT_BATCH", "STRONGLY_TYPED")
NETWORK = {"10.3.0": WEAK, "10.12.0": WEAK, "11.4.0": ("STRONGLY_TYPED",)}


class Cache:
    def __init__(self, data: bytes):
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"+measured"


class BuilderConfig:
    """What `builder.create_builder_config()` gives; `pools` and `profiles` are what was asked."""

    def __init__(self) -> None:
        self.flags, self.pools, self.profiles = {"TF32"}, {}, []
        self.profiling_verbosity = self.hardware_compatibility_level = None
        self.cache: Cache | None = None
        self.refuse_cache = False

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: str, limit: int) -> None:
        self.pools[pool] = limit

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> Cache:
        return Cache(data)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.cache = cache
        return not cache.data.startswith(b"other version")

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def names(*members: str) -> types.SimpleNamespace:
    """An enumeration whose members are their own names."""
    return types.SimpleNamespace(**{m: m for m in members})


def fake(version: str, inspect: Callable[[], dict[str, Any]] | None = None, plan: bytes | None = b"plan") -> Any:
    """A module `tensorrt`; `module.config` is the builder config of the last build, `module.network_bits` its network's flags.

    Args:
        inspect: what the engine inspector answers; without it the engine does not load.
        plan: what a build gives.
    """
    trt: Any = types.ModuleType("tensorrt")
    trt.__version__ = version
    trt.Logger = object
    trt.BuilderFlag = names(*FLAGS[version])
    trt.HardwareCompatibilityLevel = names(*LEVELS[version])
    trt.ProfilingVerbosity = names("LAYER_NAMES_ONLY", "DETAILED", "NONE")
    trt.MemoryPoolType = names("WORKSPACE")
    trt.LayerInformationFormat = names("JSON", "ONELINE")
    trt.NetworkDefinitionCreationFlag = types.SimpleNamespace(**{n: i for i, n in enumerate(NETWORK[version])})

    class ILogger:
        ERROR, INTERNAL_ERROR = "ERROR", "INTERNAL_ERROR"

        def __init__(self) -> None: ...

    class Profile:
        def __init__(self) -> None:
            self.shapes: tuple = ()

        def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
            self.shapes = shapes

    class Network:
        num_layers, num_inputs = 71, 1

        def get_input(self, index: int) -> Any:
            return types.SimpleNamespace(name="images", shape=(-1, 3, 32, 32))

    class Builder:
        def __init__(self, log: Any):
            self.log = log

        def create_network(self, bits: int) -> Network:
            trt.network_bits = bits
            return Network()

        def create_builder_config(self) -> BuilderConfig:
            trt.config = BuilderConfig()
            return trt.config

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
            if plan is None:
                self.log.log("ERROR", "Error Code 10: could not find any implementation for node blocks.0.attn.qkv.")
            return plan

    class OnnxParser:
        def __init__(self, network: Network, log: Any): ...

        def parse(self, data: bytes) -> bool:
            return bool(data)

    class Runtime:
        def __init__(self, log: Any): ...

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            if inspect is None:
                return None
            inspector = types.SimpleNamespace(get_engine_information=lambda _: json.dumps(inspect()))
            return types.SimpleNamespace(create_engine_inspector=lambda: inspector)

    trt.ILogger, trt.Builder, trt.OnnxParser, trt.Runtime = ILogger, Builder, OnnxParser, Runtime
    return trt


def layer(name: str, kind: str, source: str, version: int, nodes: list[str] | None = None, tactic: str = "") -> dict:
    """A layer as an inspector lists it: one type key in TensorRT 10, two in 11."""
    words = {"INT8": "Int8", "FLOAT16": "Half", "FLOAT": "Float", "FP8": "FP8", "BFLOAT16": "BFloat16"}[source]
    linear = (
        "Row major linear FP16 format"
        if source == "FLOAT16"
        else f"Thirty-two wide channel vectorized row major {words} format"
    )
    keys = {"Format/Datatype": linear} if version == 10 else {"Format": "kLINEAR", "DataType": words}
    tensors = [{"Name": "a", "Location": "Device", "Dimensions": [1, 17, 192], **keys}]
    metadata = "\x1e".join(f"[ONNX Layer: {n}]" for n in nodes or [])
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": tensors,
        "Outputs": tensors,
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": metadata,
    }


def engine_of(graph: ModelProto, version: int, linear: str, fused: bool = True, except_for: str = "-") -> dict:
    """What an inspector would say of an engine whose linear layers run in `linear`."""
    products = prove(graph).products
    layers = [layer("Reformatting CopyNode for Input Tensor 0 to patch_embed.proj", "Reformat", "FLOAT", version)]
    for p in products:
        if p.kind == "attention" and fused:
            continue
        type_ = "FLOAT16" if p.kind != "linear" or except_for in p.name else linear
        layers.append(layer(f"{p.name}_myl0_3", "gemm", type_, version, [p.name], "sm80_xmma_gemm"))
    for b in attention_blocks(Anatomy(graph)) if fused else []:
        layers.append(layer(f"_gemm_mha_v2_{b.softmax}", "kgen", "FLOAT16", version, [b.qk, b.softmax, b.av], "_gemm_mha_v2"))
    io = {"Bindings": ["images", "cls"]} if version == 10 else {"I/O Tensors": [{"Name": "images", "IOMode": "Input"}]}
    return {"Layers": layers, **io}
