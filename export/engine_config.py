"""Settings of an engine and how they become flags of TensorRT or TensorRT-RTX; what a version lacks becomes one sentence."""

from pathlib import Path
from typing import Any, Literal

from distill.config import Config
from distill.errors import UserError
from distill.files import write_bytes

MB = 1 << 20
HARDWARE = {"none": "NONE", "ampere_plus": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}
VERBOSITY = {"none": "NONE", "names": "LAYER_NAMES_ONLY", "detailed": "DETAILED"}


class BatchProfile(Config):
    """An optimisation profile: the batches that it takes and the one that it is tuned for."""

    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 64

    def problems(self) -> list[str]:
        if 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            return []
        got = f"{self.min_batch}, {self.opt_batch}, {self.max_batch}"
        return [f"profiles: min_batch, opt_batch and max_batch must be at least 1 and not decrease, got {got}"]

    def shapes(self) -> tuple[int, int, int]:
        return self.min_batch, self.opt_batch, self.max_batch


class EngineConfig(Config):
    """How TensorRT and TensorRT-RTX compile. Precision is not here: it is in the graph, and networks are strongly typed.

    Attributes:
        profiles: further optimisation profiles, beside the one of export.opt_batch and export.max_batch; e.g. a second one tuned for
            batch 1. Each costs building time and file size.
        workspace_mb: scratch memory that a kernel may use, in MiB; the runtime's own limit when not given.
        version_compatible: the engine also loads in later versions of the same major one. The lean runtime that this takes is inside
            unless `exclude_lean_runtime`.
        refit: weights can be replaced without compiling again. strip_plan: the file holds no weights, a refit puts them in.
        hardware_compatibility: other GPUs than the one that compiles: `ampere_plus` any newer one, `same_compute_capability` any of
            its generation. For TensorRT-RTX the compute capabilities say that.
        timing_cache: file with measured kernels, read if it is there and written back: later builds are faster and alike.
        sparse_weights: use 2:4 sparse kernels where weights have that pattern.
        weight_streaming: weights may stay in the host's memory and stream to the GPU.
        tf32: FP32 products may round their inputs to TF32 (the runtimes' default).
        profiling: what an engine tells about its layers; `detailed` is needed to prove what it runs.
    """

    profiles: list[BatchProfile] = []  # noqa: RUF012  pydantic copies it
    workspace_mb: int | None = None
    version_compatible: bool = False
    exclude_lean_runtime: bool = False
    refit: bool = False
    strip_plan: bool = False
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    timing_cache: str | None = None
    sparse_weights: bool = False
    weight_streaming: bool = False
    tf32: bool = True
    profiling: Literal["none", "names", "detailed"] = "detailed"

    def problems(self) -> list[str]:
        found = [p for profile in self.profiles for p in profile.problems()]
        if self.workspace_mb is not None and self.workspace_mb < 1:
            found.append(f"workspace_mb must be at least 1, got {self.workspace_mb}")
        if self.exclude_lean_runtime and not self.version_compatible:
            found.append("exclude_lean_runtime does nothing without version_compatible")
        return found

    def flags(self) -> list[str]:
        """Names of the builder flags that are asked for."""
        wanted = {
            "VERSION_COMPATIBLE": self.version_compatible,
            "EXCLUDE_LEAN_RUNTIME": self.exclude_lean_runtime,
            # A stripped plan is refitted with the weights that it was built from, or with any when refit is asked for as well.
            "REFIT": self.refit,
            "REFIT_IDENTICAL": self.strip_plan and not self.refit,
            "STRIP_PLAN": self.strip_plan,
            "SPARSE_WEIGHTS": self.sparse_weights,
            "WEIGHT_STREAMING": self.weight_streaming,
        }
        return [name for name, asked in wanted.items() if asked]


def apply_config(trt: Any, builder_config: Any, config: EngineConfig, name: str, cross_compiled: bool) -> list[str]:
    """Set everything on a builder's config except profiles; returns what could not be set, one sentence each.

    Args:
        name: of the runtime with its version, e.g. "tensorrt 10.3.0".
        cross_compiled: for other GPUs than the one here, as TensorRT-RTX does.
    """
    notes = _set_flags(trt, builder_config, config, name)
    if config.workspace_mb is not None:
        if hasattr(builder_config, "set_memory_pool_limit") and hasattr(trt, "MemoryPoolType"):
            builder_config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_mb * MB)
        else:
            notes.append(f"{name} has no memory pools: workspace_mb is left out")
    notes += _set_hardware(trt, builder_config, config, name, cross_compiled)
    levels = getattr(trt, "ProfilingVerbosity", None)
    if levels is not None and hasattr(levels, VERBOSITY[config.profiling]):
        builder_config.profiling_verbosity = getattr(levels, VERBOSITY[config.profiling])
    else:
        notes.append(f"{name} has no {config.profiling} profiling: the engine's layers cannot be listed")
    return notes


def attach_timing_cache(builder_config: Any, config: EngineConfig, name: str, cross_compiled: bool) -> list[str]:
    """Read the timing cache, or begin one. It is left out where it does nothing or stops the compiling for other GPUs.

    Raises:
        UserError: the file was made by another version or on another GPU.
    """
    if config.timing_cache is None:
        return []
    if cross_compiled:
        return [f"{name} keeps no timing cache and compiles for absent GPUs only without one: timing_cache is left out"]
    if not hasattr(builder_config, "create_timing_cache"):
        return [f"{name} has no timing cache: timing_cache is left out"]
    path = Path(config.timing_cache)
    cache = builder_config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or builder_config.set_timing_cache(cache, False) is False:
        raise UserError(f"{path} is a timing cache of another version or GPU, which {name} refuses; delete it or name another.")
    return []


def save_timing_cache(builder_config: Any, config: EngineConfig, cross_compiled: bool) -> None:
    """Write back what the build has measured."""
    if config.timing_cache is None or cross_compiled or not hasattr(builder_config, "get_timing_cache"):
        return
    cache = builder_config.get_timing_cache()
    if cache is not None:
        path = Path(config.timing_cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, bytes(cache.serialize()))


def _set_flags(trt: Any, builder_config: Any, config: EngineConfig, name: str) -> list[str]:
    notes = []
    for flag in config.flags():
        if hasattr(trt.BuilderFlag, flag):
            builder_config.set_flag(getattr(trt.BuilderFlag, flag))
        else:
            notes.append(f"{name} has no {flag}: the engine is built without it")
    if hasattr(trt.BuilderFlag, "TF32"):
        if not config.tf32:
            builder_config.clear_flag(trt.BuilderFlag.TF32)
    elif not config.tf32:
        notes.append(f"{name} has no TF32 to turn off")
    return notes


def _set_hardware(trt: Any, builder_config: Any, config: EngineConfig, name: str, cross_compiled: bool) -> list[str]:
    if config.hardware_compatibility == "none":
        return []
    level = HARDWARE[config.hardware_compatibility]
    if cross_compiled:
        return [f"{name} takes no hardware compatibility: export.compute_capabilities say for which GPUs it compiles"]
    if not hasattr(trt, "HardwareCompatibilityLevel") or not hasattr(trt.HardwareCompatibilityLevel, level):
        return [f"{name} has no hardware compatibility {level}: the engine runs only on GPUs like the one that built it"]
    builder_config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    return []
