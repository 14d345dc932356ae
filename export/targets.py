"""What can be exported: a table of targets and the settings of an export. How each is built, is in `builders.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from distill.config import Config
from distill.data.preprocess import Preprocess
from distill.progress import Progress
from export.artifact import Artifact, Precision, Runtime, read_artifact
from export.engine import RTX_CAPABILITIES
from export.engine_config import EngineConfig
from export.parity import Gates
from export.quantize import QuantizeConfig

Target = Literal[
    "onnx-fp32", "onnx-fp16", "onnx-bf16", "onnx-int8", "onnx-fp8", "onnx-w8", "onnx-w4", "onnx-int8-dynamic", "onnx-int8-modelopt",
    "openvino-fp32", "openvino-bf16", "openvino-int8", "openvino-int8-nncf",
    "rtx-fp16", "rtx-bf16", "rtx-int8", "rtx-fp8", "rtx-w4",
    "trt-fp16", "trt-bf16", "trt-int8", "trt-fp8", "trt-w4",
]  # fmt: skip
Builder = Literal["float", "quantized", "other", "openvino", "engine"]
PLAN = "plan.json"


@dataclass(frozen=True)
class Spec:
    """A target.

    Attributes:
        build: which of the builders makes it. needs: the targets whose artifacts it is made from, the first being its source.
        ours: quantized by our planner, or not at all; the others are other people's quantizers, for comparison.
        always: can be built wherever decant is installed; another one is optional, and its rows say what is missing.
        schema: raise it when the builder writes another file from the same settings: a finished run then exports it anew.
    """

    precision: Precision
    runtime: Runtime
    build: Builder
    needs: tuple[Target, ...] = ()
    ours: bool = True
    always: bool = False
    schema: int = 1

    @property
    def searches(self) -> bool:
        """Whether an accuracy budget is searched for here; targets made from this one follow its plan."""
        return self.build == "quantized"


def _engines(name: str, runtime: Runtime) -> dict[str, Spec]:
    """FP16 and BF16 graphs are compiled as they are. A quantized engine is the FP16 graph with the quantized ONNX target's calibration,
    so that what is not quantized is FP16."""
    return {
        f"{name}-fp16": Spec("fp16", runtime, "engine", ("onnx-fp16",)),
        f"{name}-bf16": Spec("bf16", runtime, "engine", ("onnx-bf16",)),
        f"{name}-int8": Spec("int8", runtime, "engine", ("onnx-fp16", "onnx-int8")),
        f"{name}-fp8": Spec("fp8", runtime, "engine", ("onnx-fp16", "onnx-fp8")),
        f"{name}-w4": Spec("w4", runtime, "engine", ("onnx-fp16", "onnx-w4")),
    }


SPECS: dict[str, Spec] = {
    "onnx-fp32": Spec("fp32", "onnxruntime", "float", always=True),
    "onnx-fp16": Spec("fp16", "onnxruntime", "float", always=True),
    "onnx-bf16": Spec("bf16", "onnxruntime", "float", always=True),
    "onnx-int8": Spec("int8", "onnxruntime", "quantized", ("onnx-fp32",), always=True, schema=2),
    "onnx-fp8": Spec("fp8", "onnxruntime", "quantized", ("onnx-fp32",), always=True, schema=2),
    "onnx-w8": Spec("w8", "onnxruntime", "quantized", ("onnx-fp32",), always=True, schema=2),
    "onnx-w4": Spec("w4", "onnxruntime", "quantized", ("onnx-fp32",), always=True, schema=2),
    "onnx-int8-dynamic": Spec("int8", "onnxruntime", "other", ("onnx-fp32",), ours=False),
    "onnx-int8-modelopt": Spec("int8", "onnxruntime", "other", ("onnx-fp32",), ours=False),
    "openvino-fp32": Spec("fp32", "openvino", "openvino", ("onnx-fp32",)),
    "openvino-bf16": Spec("bf16", "openvino", "openvino", ("onnx-fp32",)),
    "openvino-int8": Spec("int8", "openvino", "openvino", ("onnx-int8",), schema=2),
    "openvino-int8-nncf": Spec("int8", "openvino", "other", ("onnx-fp32",), ours=False),
    **_engines("rtx", "tensorrt_rtx"),
    **_engines("trt", "tensorrt"),
}
assert set(SPECS) == set(get_args(Target))


class ExportConfig(Config):
    """What is exported and how.

    Attributes:
        targets: artifacts to make; what they are made from is made too.
        resolutions: a file for each, in pixels; the student's input size when not given.
        max_batch, opt_batch: the largest batch of an engine and the one that it is tuned for.
        compute_capabilities: GPUs that TensorRT-RTX compiles for: 8.6 and 8.9 are the consumer Ampere and Ada, 12.0 Blackwell.
        quantize: how quantized targets are made. engine: how engines are compiled. gates: parity that every artifact must reach.
    """

    targets: list[Target] = ["onnx-fp32", "onnx-int8", "rtx-fp16", "rtx-int8"]  # noqa: RUF012  pydantic copies it
    resolutions: list[int] | None = None
    max_batch: int = 64
    opt_batch: int = 8
    compute_capabilities: list[str] = ["8.6", "8.9", "12.0"]  # noqa: RUF012
    quantize: QuantizeConfig = QuantizeConfig()
    engine: EngineConfig = EngineConfig()
    gates: Gates = Gates()

    def problems(self) -> list[str]:
        """What contradicts itself in these settings, one sentence each."""
        found = []
        if not self.targets:
            found.append("targets must name at least one of " + ", ".join(SPECS))
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
        if self.quantize.budget is not None and not any(SPECS[t].searches for t in in_order(list(self.targets))):
            found.append("quantize has a budget and nothing to judge: no target is quantized by our planner")
        return found

    def sizes(self, preprocess: Preprocess) -> list[int]:
        """Resolutions to export for a student with this preprocessing."""
        return self.resolutions or [preprocess.size]


@dataclass(frozen=True)
class Images:
    """The images that an export looks at.

    Attributes:
        training: (number, resolution) -> preprocessed training images [n, 3, resolution, resolution], always the same.
        held_out: (number, resolution, number of those that calibrate) -> training images that are none of those.
        accuracy: resolution, full-precision encoder, its hash, folder for features, progress -> what measures the points that an artifact
            loses (export/quantizing/budget_measures.py); None where the recipe has no labels.
    """

    training: Callable[[int, int], Tensor]
    held_out: Callable[[int, int, int], Tensor]
    accuracy: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Job:
    """One target of one model, as its builder gets it."""

    target: Target
    config: ExportConfig
    student: str
    model_folder: Path
    sources: dict[str, Path]
    images: Images
    out: Path
    progress: Progress

    @property
    def spec(self) -> Spec:
        return SPECS[self.target]

    @property
    def reader(self) -> Literal["tensorrt", "onnxruntime", "openvino"]:
        """Who will run the graph, as lint names them. An ONNX file of ours is also what engines are compiled from."""
        return "openvino" if self.spec.runtime == "openvino" else "onnxruntime" if not self.spec.ours else "tensorrt"

    def source(self, target: str) -> Artifact:
        assert target in self.sources, f"{self.target} needs the folder of {target}"
        return read_artifact(self.sources[target])


def prerequisites(target: str) -> list[Target]:
    """Targets whose artifacts this one is made from."""
    return list(SPECS[target].needs)


def in_order(targets: list[Target]) -> list[Target]:
    """These targets and all that they are made from, each after its prerequisites."""
    order: list[Target] = []
    for target in targets:
        for needed in (*in_order(prerequisites(target)), target):
            if needed not in order:
                order.append(needed)
    return order


def at_resolution(preprocess: Preprocess, size: int) -> Preprocess:
    """The same preprocessing for another resolution: the crop keeps its share of the resized image."""
    return replace(preprocess, size=size, resize=max(size, round(preprocess.resize * size / preprocess.size)))
