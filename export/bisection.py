"""Parity with bisection: the first block, and the layer in it, from which two forms of a network differ.

The residual stream `blocks.i` is compared behind blocks that a binary search chooses, through the final LayerNorm of the reference: "as
if the network ended here". Raw, a residual stream hides errors: a few channels are a hundred times the others and make any cosine 1.
Within the guilty block its layers are compared in order of execution.

Shape legend: B images, T tokens, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto
from torch import Tensor

from distill.errors import EnvironmentFailed, GateFailed
from distill.models.kinds import AnyBackbone
from export.artifact import Artifact, Unrunnable
from export.engine import one_line
from export.graph import torch_graph
from export.graphs.typed import retype
from export.probes import EngineProbe, OnnxProbe, OpenVinoProbe, Probe, TorchProbe
from export.runtimes import why_unrunnable

BATCH, IMAGES = 4, 8
LARGE = 0.25


@dataclass(frozen=True)
class Guilty:
    """Where two forms of a network part.

    Attributes:
        block: `blocks.3`, `patch_embed` before the first block, `norm` behind the last.
        layer: the layer in it, e.g. `blocks.3.mlp.fc1`; None where no single layer is below the gate.
        before, after: least cosine over tokens of the residual stream in front of the block and behind it (nan: not finite).
        layer_cosine: least cosine of the layer's output.
        compared: how many points of the network were compared.
    """

    block: str
    layer: str | None
    before: float
    after: float
    layer_cosine: float | None
    compared: int

    def sentence(self) -> str:
        """For a gate's message: "the first guilty block is blocks.3 (in it blocks.3.mlp.fc1): cosine 0.99991 in front, 0.412 behind"."""
        inside = f" (in it {self.layer}, cosine {_shown(self.layer_cosine)})" if self.layer else ""
        return (
            f"the first guilty block is {self.block}{inside}: cosine {_shown(self.before)} in front of it, "
            f"{_shown(self.after)} behind it"
        )


class Unbisectable(Exception):
    """The two forms have no points in common to compare; the message is the reason, one sentence."""


def first_guilty(reference: Probe, suspect: Probe, images: Tensor, gate: float) -> Guilty | None:
    """The first block behind which the least cosine falls below `gate`; None when it never does.

    Args:
        reference, suspect: two forms of a network (`probes.py`). They may differ in precision, in runtime, or in quantization.
        images: [B, 3, H, W] preprocessed.
        gate: least cosine over every token of every image.

    Raises:
        Unbisectable: no residual stream is known in one of them.
    """
    meter = _Meter(reference, suspect, images)
    blocks = [b for b in reference.stream() if b in suspect.stream()]
    if not blocks:
        lacking = reference if not reference.stream() else suspect
        raise Unbisectable(f"{lacking.label} names no residual stream: its blocks cannot be told apart")
    good, bad = -1, len(blocks)
    while bad - good > 1:
        middle = (good + bad) // 2
        if meter.stream(blocks[middle]) >= gate:
            good = middle
        else:
            bad = middle
    if bad == len(blocks):
        outputs = [meter.plain(o) for o in ("cls", "patches")]
        if min(outputs) >= gate:
            return None
        return Guilty("norm", None, meter.stream(blocks[-1]), min(outputs), None, meter.compared)
    before = meter.stream(blocks[good]) if good >= 0 else 1.0
    if bad == 0 and (embedding := _worst_fall(meter, _shared(reference, suspect, None), 1.0, gate)):
        return Guilty("patch_embed", embedding[0], 1.0, embedding[1], embedding[1], meter.compared)
    layer, cosine = _worst_fall(meter, _shared(reference, suspect, blocks[bad]), before, gate) or (None, None)
    return Guilty(blocks[bad], layer, before, meter.stream(blocks[bad]), cosine, meter.compared)


def explain(backbone: AnyBackbone, artifact: Artifact, images: Tensor, gate: float, resolution: int | None = None) -> str:
    """Where an artifact on disk leaves the backbone that it was made from, in words: for `parity.failed_gates`.

    Args:
        images: [B, 3, resolution, resolution]; the first IMAGES are used. gate: of the artifact's precision.
    """
    size = artifact.file(resolution).resolution
    try:
        suspect = artifact_probe(artifact, backbone, size)
        found = first_guilty(TorchProbe(backbone.at_size(size)), suspect, images[:IMAGES], gate)
    except (Unbisectable, Unrunnable, GateFailed, EnvironmentFailed) as e:
        return f"which block is to blame could not be found: {one_line(e)}"
    if found is None:
        return f"on {len(images[:IMAGES])} images every block is above the gate"
    return found.sentence()


def artifact_probe(artifact: Artifact, backbone: AnyBackbone, size: int) -> Probe:
    """The probe of an artifact's file, on the runtime that serves it.

    Raises:
        Unrunnable: this machine cannot execute it.
    """
    entry = artifact.file(size)
    data = artifact.content(entry)
    if artifact.runtime == "onnxruntime":
        return OnnxProbe(ModelProto.FromString(data), artifact.target)
    if reason := why_unrunnable(artifact.runtime, artifact.compute_capabilities):
        raise Unrunnable(reason)
    if artifact.runtime == "openvino":
        hint = artifact.details.get("openvino", {}).get("inference_precision")
        properties = {"INFERENCE_PRECISION_HINT": hint} if hint else {}
        if not entry.path.endswith(".xml"):
            return OpenVinoProbe(data, ModelProto.FromString(data), artifact.target, properties)
        weights = next(artifact.content(e) for e in artifact.extras if e.path == f"{entry.path.removesuffix('.xml')}.bin")
        return OpenVinoProbe((data, weights), torch_graph(backbone, size), artifact.target, properties)
    return EngineProbe(_graph_of_engine(artifact, backbone, size), artifact, artifact.target)


def _graph_of_engine(artifact: Artifact, backbone: AnyBackbone, size: int) -> ModelProto:
    """What the engine was compiled from: the graph beside it, or the backbone's own in that precision."""
    beside = [e for e in artifact.extras if e.path == f"graph_{size}.onnx"]
    if beside:
        return ModelProto.FromString(artifact.content(beside[0]))
    return retype(torch_graph(backbone, size), artifact.precision)


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Least cosine over all vectors of the last axis; nan when a value is not finite on one side only, or on both."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / np.maximum(norms, 1e-12)).min())


class _Meter:
    """Cosines between the two, each point measured once. Not finite compares as below every gate."""

    def __init__(self, reference: Probe, suspect: Probe, images: Tensor):
        self.reference, self.suspect, self.images = reference, suspect, images
        self.scale, self.shift = reference.final_norm()
        self.known: dict[str, float] = {}

    @property
    def compared(self) -> int:
        return len(self.known)

    def stream(self, block: str) -> float:
        ours, theirs = self.reference.stream()[block], self.suspect.stream()[block]
        return self._measured(block, lambda x: _normalised(x, self.scale, self.shift), ours, theirs)

    def plain(self, tensor: str) -> float:
        return self._measured(tensor, lambda x: x, tensor)

    def layer(self, layer: str) -> float:
        return self._measured(layer, lambda x: x, self.reference.layers()[layer], self.suspect.layers()[layer])

    def _measured(self, key: str, view: Callable[[np.ndarray], np.ndarray], ours: str, theirs: str | None = None) -> float:
        if key not in self.known:
            worst = 1.0
            for chunk in self.images.split(BATCH):
                a = self.reference.run(chunk, [ours])[ours]
                b = self.suspect.run(chunk, [theirs or ours])[theirs or ours]
                cosine = least_cosine(view(a), view(b)) if a.shape == b.shape else float("nan")
                worst = cosine if np.isnan(cosine) else min(worst, cosine)
                if np.isnan(worst):
                    break
            self.known[key] = worst
        return self.known[key]


def _worst_fall(meter: _Meter, layers: Sequence[str], before: float, gate: float) -> tuple[str, float] | None:
    """The layer to blame: the first that is not finite; else the first below the gate whose cosine falls, from that of the layer in front,
    by at least LARGE of the worst fall. Softmax and what reads a broken layer often fall further than the broken layer itself.
    """
    falls = []
    for layer in layers:
        cosine = meter.layer(layer)
        if np.isnan(cosine):
            return layer, cosine
        falls.append((before - cosine, layer, cosine))
        before = cosine
    below = [f for f in falls if f[2] < gate]
    worst = max((f[0] for f in below), default=0.0)
    return next((f[1:] for f in below if f[0] >= LARGE * worst), None)


def _shared(reference: Probe, suspect: Probe, block: str | None) -> list[str]:
    """Layers that both know, inside a block or (None) outside all of them in front."""
    ours: Mapping[str, str] = reference.layers()
    theirs = suspect.layers()
    inside = [n for n in ours if n in theirs]
    if block is None:
        return [n for n in inside if "blocks." not in n]
    return [n for n in inside if n.startswith(f"{block}.")]


def _normalised(x: np.ndarray, scale: np.ndarray | None, shift: np.ndarray | None) -> np.ndarray:
    """LayerNorm over the last axis, in float64."""
    with np.errstate(invalid="ignore", over="ignore"):
        x = x.astype(np.float64)
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x if scale is None or shift is None else x * scale + shift


def _shown(cosine: float | None) -> str:
    return "not finite" if cosine is None or np.isnan(cosine) else f"{cosine:.5f}"
