"""A network in one of its forms, any inner tensor of which can be looked at: torch, ONNX Runtime, OpenVINO, an engine on a GPU.

What is compared has the same name in every form: the residual stream `blocks.i`, a layer's output behind the bias, activation and
LayerScale that follow it (`blocks.3.mlp.fc1`), and the outputs `cls` and `patches`.

Shape legend: B images, T tokens, D width.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, helper, numpy_helper
from torch import Tensor, nn

from distill.models.kinds import AnyBackbone
from export.artifact import Artifact
from export.graphs.nodes import INPUT, OUTPUTS, constants, element_types, serialize
from export.graphs.rounded import rounded
from export.graphs.typed import layer_nodes
from export.sessions import exact_session

STREAM = re.compile(r"(net\.)?blocks\.\d+")
Norm = tuple[np.ndarray | None, np.ndarray | None]


class Probe(Protocol):
    """`stream` and `layers`: name -> the tensor that holds it, in order of execution. `run`: images [B, 3, H, W] -> float32 by tensor."""

    label: str

    def stream(self) -> Mapping[str, str]: ...

    def layers(self) -> Mapping[str, str]: ...

    def final_norm(self) -> Norm: ...

    def run(self, images: Tensor, tensors: Sequence[str]) -> dict[str, np.ndarray]: ...


class OnnxProbe:
    """An ONNX graph in ONNX Runtime on the CPU.

    Args:
        as_gpu: compute as a GPU would, every half value rounded (`rounded.py`). BF16 graphs always are: ONNX Runtime lacks the kernels.
    """

    def __init__(self, model: ModelProto, label: str = "the ONNX graph", as_gpu: bool = False, threads: int | None = None):
        halves = set(element_types(model).values())
        self.label, self.threads = label, threads
        self.model = rounded(model) if "BFLOAT16" in halves or (as_gpu and "FLOAT16" in halves) else model
        self.sessions: dict[tuple[str, ...], onnxruntime.InferenceSession] = {}

    def stream(self) -> Mapping[str, str]:
        return residual_stream(self.model)

    def layers(self) -> Mapping[str, str]:
        return layer_outputs(self.model)

    def final_norm(self) -> Norm:
        return final_norm_of(self.model)

    def run(self, images: Tensor, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        key = tuple(tensors)
        if key not in self.sessions:
            self.sessions = {key: self._session(key)}  # one at a time: each holds the weights
        found = self.sessions[key].run(None, {INPUT: images.float().contiguous().numpy()})
        return dict(zip(key, found, strict=True))

    def _session(self, tensors: tuple[str, ...]) -> onnxruntime.InferenceSession:
        return exact_session(serialize(tapped(self.model, tensors)), self.threads)


class OpenVinoProbe:
    """A model in OpenVINO on the CPU: an ONNX graph, or an IR read by OpenVINO together with the ONNX graph that it was made from.

    Args:
        model: what OpenVINO reads: bytes of an ONNX graph, or of an IR's (.xml, .bin).
        graph: its ONNX graph, or that of its origin: an IR has kept the tensors' names, but not all of the tensors.
        properties: of `compile_model`.
    """

    def __init__(
        self,
        model: bytes | tuple[bytes, bytes],
        graph: ModelProto,
        label: str = "OpenVINO",
        properties: dict[str, Any] | None = None,
    ):
        from export.runtimes import load_openvino

        self.ov, self.label, self.source, self.graph = load_openvino(), label, model, graph
        self.core = self.ov.Core()
        self.properties = properties or {}
        known = {name for op in self._read().get_ops() for out in op.outputs() for name in out.get_names()}
        self._stream = {b: t for b, t in residual_stream(graph).items() if t in known}
        self._layers = {n: t for n, t in layer_outputs(graph).items() if t in known}
        self.compiled: dict[tuple[int, tuple[str, ...]], Any] = {}

    def stream(self) -> Mapping[str, str]:
        return self._stream

    def layers(self) -> Mapping[str, str]:
        return self._layers

    def final_norm(self) -> Norm:
        return final_norm_of(self.graph)

    def run(self, images: Tensor, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        key = len(images), tuple(tensors)
        if key not in self.compiled:
            self.compiled = {key: self._compile(tuple(tensors), list(images.shape))}
        found = self.compiled[key]([images.float().contiguous().numpy()])
        return {t: np.array(found[t], np.float32) for t in tensors}

    def _read(self) -> Any:
        return self.core.read_model(*self.source) if isinstance(self.source, tuple) else self.core.read_model(self.source)

    def _compile(self, tensors: tuple[str, ...], shape: list[int]) -> Any:
        model = self._read()
        model.reshape(shape)  # with the batch left open, OpenVINO 2026.4 fails on a tap inside its fused attention
        model.add_outputs([t for t in tensors if t not in OUTPUTS])
        for output in model.outputs:
            if output.get_element_type() != self.ov.Type.f32:
                processing = self.ov.preprocess.PrePostProcessor(model)
                processing.output(output.get_any_name()).tensor().set_element_type(self.ov.Type.f32)
                model = processing.build()
        return self.core.compile_model(model, "CPU", self.properties)


class TorchProbe:
    """A backbone in torch, float32, through hooks."""

    def __init__(self, backbone: AnyBackbone, label: str = "torch"):
        self.backbone, self.label = backbone.eval(), label
        self.modules = dict(backbone.named_modules())

    def stream(self) -> Mapping[str, str]:
        return {n: n for n in self.modules if STREAM.fullmatch(n)}

    def layers(self) -> Mapping[str, str]:
        linears = [n for n, m in self.modules.items() if isinstance(m, nn.Linear | nn.Conv2d)]
        return {n: self._tail(n) for n in linears}

    def final_norm(self) -> Norm:
        norms = [m for n, m in self.modules.items() if n in ("norm", "net.norm") and isinstance(m, nn.LayerNorm)]
        if not norms or norms[0].weight is None:
            return None, None
        return norms[0].weight.detach().numpy(), norms[0].bias.detach().numpy()

    def run(self, images: Tensor, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}

        def keep(name: str) -> Any:
            return lambda _module, _inputs, x: found.__setitem__(name, x.detach().float().numpy())

        hooks = [self.modules[t].register_forward_hook(keep(t)) for t in tensors if t not in OUTPUTS]
        try:
            with torch.no_grad():
                out = self.backbone(images.float())
        finally:
            for hook in hooks:
                hook.remove()
        found |= {"cls": out.cls.numpy(), "patches": out.patches.numpy()}
        return {t: found[t] for t in tensors}

    def _tail(self, name: str) -> str:
        """The module whose output ends what follows a linear layer: the activation behind fc1, LayerScale behind proj and fc2."""
        branch, _, last = name.rpartition(".")
        block = branch.rpartition(".")[0]
        after = {"fc1": f"{branch}.act", "proj": f"{block}.ls1", "fc2": f"{block}.ls2"}.get(last, name)
        fused = last == "fc1" and not isinstance(self.modules.get(f"{branch}.act"), nn.GELU | nn.ReLU)
        return name if fused or after not in self.modules or isinstance(self.modules[after], nn.Identity) else after


class EngineProbe:
    """An engine on this machine's GPU, compiled again from its graph for every set of tensors that is looked at."""

    def __init__(self, graph: ModelProto, artifact: Artifact, label: str = "the engine"):
        self.graph, self.artifact, self.label = graph, artifact, label
        self.engines: dict[tuple[str, ...], Any] = {}

    def stream(self) -> Mapping[str, str]:
        return residual_stream(self.graph)

    def layers(self) -> Mapping[str, str]:
        return layer_outputs(self.graph)

    def final_norm(self) -> Norm:
        return final_norm_of(self.graph)

    def run(self, images: Tensor, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        key = tuple(tensors)
        if key not in self.engines:
            self.engines = {key: self._compiled(key)}
        engine = self.engines[key]
        with torch.cuda.stream(engine.stream):
            found = engine.infer(images.to("cuda", torch.float32).contiguous())
            values = {name: value.float().cpu().numpy() for name, value in found.items()}
        return {t: values[name] for t, name in zip(key, tap_names(self.graph, key), strict=True)}

    def _compiled(self, tensors: tuple[str, ...]) -> Any:
        from export.engine import build_engine, gpu_capability
        from export.runtimes import Engine

        here, runtime = gpu_capability(), self.artifact.runtime
        assert here is not None
        with tempfile.TemporaryDirectory() as folder:
            source, plan = Path(folder) / "tapped.onnx", Path(folder) / "tapped.engine"
            source.write_bytes(serialize(tapped(self.graph, tensors)))
            build_engine(source, plan, runtime, self.artifact.precision, (1, 4, 16), [here])  # type: ignore[arg-type]
            return Engine(runtime, plan.read_bytes(), f"{self.label} with taps")


def tapped(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """The graph with exactly these tensors as outputs, in this order, in FLOAT (a half tensor behind a cast)."""
    out, types = ModelProto(), element_types(model)
    out.CopyFrom(model)
    del out.graph.output[:]
    for tensor, name in zip(tensors, tap_names(model, tensors), strict=True):
        if name != tensor:
            out.graph.node.append(helper.make_node("Cast", [tensor], [name], name=name, to=1))
        out.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    assert set(tensors) <= set(types), f"no tensor is called {sorted(set(tensors) - set(types))}"
    return out


def tap_names(model: ModelProto, tensors: Sequence[str]) -> list[str]:
    """What `tapped` calls the outputs."""
    types = element_types(model)
    return [t if types[t] == "FLOAT" else f"{t}_tap" for t in tensors]


def residual_stream(model: ModelProto) -> dict[str, str]:
    """`blocks.i` -> the tensor of the residual stream behind block i, in order of execution.

    Our own graphs name it. In other people's it is found by the pre-norm Transformer's shape: what a LayerNormalization reads and a later
    Add skips past it; two such points are a block. Empty where neither is there.
    """
    outputs = [o for n in model.graph.node for o in n.output]
    if named := [o for o in outputs if STREAM.fullmatch(o)]:
        return {o: o for o in named}
    norms = [n for n in model.graph.node if n.op_type == "LayerNormalization"]
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for x in node.input:
            readers.setdefault(x, []).append(node.op_type)
    points = [n.input[0] for n in norms if "Add" in readers[n.input[0]]]
    if len(points) < 2 or len(points) % 2:
        return {}
    behind = [
        n.input[0] for n in norms if "Add" not in readers[n.input[0]] and outputs.index(n.input[0]) > outputs.index(points[-1])
    ]
    ends = [*points[2::2], *behind[:1]]
    return {f"blocks.{i}": tensor for i, tensor in enumerate(ends)}


def layer_outputs(model: ModelProto) -> dict[str, str]:
    """Layer -> the tensor behind its bias, activation and LayerScale, in order of execution; linear layers and attention's products."""
    found = layer_nodes(model)
    products = {n.name: i for i, n in enumerate(model.graph.node)}
    ordered = sorted((n for n in found if n in products), key=lambda n: products[n])
    return {n: model.graph.node[found[n][-1]].output[0] for n in ordered}


def final_norm_of(model: ModelProto) -> Norm:
    """Scale and shift of the last LayerNormalization; (None, None) for a graph without one, or whose are computed."""
    stored = constants(model)
    norms = [n for n in model.graph.node if n.op_type == "LayerNormalization" and len(n.input) == 3]
    if not norms or not all(x in stored for x in norms[-1].input[1:]):
        return None, None
    scale, shift = (numpy_helper.to_array(stored[x]).astype(np.float64) for x in norms[-1].input[1:])
    return scale, shift
