"""FP16 and BF16 graphs that keep the features: where half precision overflows or rounds too much, only those layers stay in FP32.

Overflow: one pass of the graph, rounded as a GPU rounds (`rounded.py`), with a tap behind every layer names the first value that is not
finite, and its layer is kept in FP32; if it still overflows when narrowed, its branch, then its block, then the residual stream.

Rounding: where everything is finite but a cosine misses the gate, the fewest blocks to keep are found by bisection (QuickXplain: Junker,
AAAI 2004; about 2 k log2(n / k) passes for k of n), and then by the same bisection the fewest layers of those blocks. Typically one block
is to blame: the one in which a trained ViT's few huge activations appear.

The search looks at PROBE images, the bisection at the worst BATCH of them; the result is checked on all, and images that fail join.

Shape legend: B images, T tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor

from distill.errors import GateFailed, UserError
from distill.files import write_bytes
from distill.models.kinds import AnyBackbone
from export.bisection import least_cosine
from export.graph import torch_graph
from export.graphs.nodes import OUTPUTS, constants, serialize
from export.graphs.typed import STREAM, block_of, layer_nodes, retype, retyped
from export.probes import OnnxProbe, layer_outputs, residual_stream

PROBE, JOIN, BATCH = 16, 4, 4
LARGEST = {"fp16": 65504.0, "bf16": float(torch.finfo(torch.bfloat16).max)}


def fit_half(backbone: AnyBackbone, path: Path, size: int, precision: str, images: Tensor, gate: float) -> dict[str, Any]:
    """Write the FP16 or BF16 graph of a backbone with as few layers in FP32 as reach the gate.

    Args:
        images: [B, 3, size, size] preprocessed; training images. gate: least cosine to FP32 over every vector of every output.

    Returns:
        JSON: `kept_float` (layers in FP32), `why` (layer -> reason), `cosines` (least cosine of the residual stream behind each block, to
        FP32, as it is; None: not finite), `cosines_before` (the same with nothing kept), `outputs` (least cosine by output), `images`,
        `passes` (of the graph over probe images), `precision`, `gate`.

    Raises:
        UserError: no images. GateFailed: the gate is not met with every layer in FP32.
        As `torch_graph`.
    """
    model, report = fit_half_graph(torch_graph(backbone, size), precision, images, gate)
    write_bytes(path, serialize(model))
    return report


def fit_half_graph(source: ModelProto, precision: str, images: Tensor, gate: float) -> tuple[ModelProto, dict[str, Any]]:
    """`fit_half` on an FP32 graph in memory: the typed graph and the report."""
    if not len(images):
        raise UserError(f"{precision} is checked on calibration images and got none; give the data section a training set.")
    search = _Search(source, precision, gate)
    chosen = torch.linspace(0, len(images) - 1, min(PROBE, len(images))).round().long()
    probed = set(chosen.tolist())
    search.look_at(images[chosen])
    kept = search.heavy_weights()
    first = search.measure(kept)
    while True:
        kept = search.run(kept)
        failing = search.failing(kept, images)
        fresh = [i for i in failing if i not in probed][:JOIN]
        if not fresh:
            break
        probed.update(fresh)
        search.look_at(images[fresh])
    last, layers = search.measure(kept), search.ordered(kept)
    if not search.half_products(kept):
        raise GateFailed(
            f"{precision} reaches the gate of {gate} only with every matrix product in FP32; use a lower gate or FP32."
        )
    report = {
        "precision": precision,
        "gate": gate,
        "kept_float": layers,
        "why": {layer: kept[layer] for layer in layers},
        "cosines": last.stream,
        "cosines_before": first.stream,
        "outputs": last.outputs,
        "images": len(images),
        "passes": search.passes,
    }
    return retype(source, precision, layers), report


Batch = tuple[Tensor, dict[str, np.ndarray]]  # images and what FP32 makes of them, by tensor


@dataclass
class _Measured:
    """One pass: least cosines of the stream behind every block and of the outputs (None: not finite).

    Attributes:
        worst: the batch with the least cosine. broken: whose values first were not finite.
    """

    stream: list[float | None]
    outputs: dict[str, float | None]
    worst: Batch
    broken: str | None = None

    def add(self, batch: Batch, stream: list[float], outputs: dict[str, float]) -> None:
        least = min((c for c in self.outputs.values() if c is not None), default=-1.0)
        if min(outputs.values()) < least:
            self.worst = batch
        self.stream = [_lower(a, b) for a, b in zip(self.stream, stream, strict=True)]
        self.outputs = {o: _lower(self.outputs[o], c) for o, c in outputs.items()}

    def passes(self, gate: float) -> bool:
        return all(c is not None and c >= gate for c in self.outputs.values())


@dataclass
class _Search:
    """The search for the layers to keep. `kept` is layer -> reason."""

    source: ModelProto
    precision: str
    gate: float
    passes: int = 0
    batches: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = layer_nodes(self.source)
        self.stream = residual_stream(self.source)
        self.tensors = layer_outputs(self.source)
        self.reference = OnnxProbe(self.source)

    def look_at(self, images: Tensor) -> None:
        """Add images to those that the search measures; the FP32 stream and outputs of each are kept (about 5 MB for a ViT-S at 224)."""
        wanted = [*self.stream.values(), *OUTPUTS]
        self.batches += [(chunk, self.reference.run(chunk, wanted)) for chunk in images.split(BATCH)]

    def heavy_weights(self) -> dict[str, str]:
        """Layers with a constant that the half type cannot hold."""
        stored, nodes = constants(self.source), self.source.graph.node
        heavy = {n for n, t in stored.items() if t.data_type == TensorProto.FLOAT and _peak(t) > LARGEST[self.precision]}
        return {
            layer: f"a weight exceeds {LARGEST[self.precision]:.4g}"
            for layer in self.tensors
            if any(x in heavy for i in self.layers[layer] for x in nodes[i].input)
        }

    def run(self, kept: dict[str, str]) -> dict[str, str]:
        """Keep layers until the images at hand pass."""
        while not (now := self.measure(kept)).passes(self.gate):
            if now.broken is not None:
                kept = {**kept, **self._widened(now.broken, kept)}
                continue
            kept = {**kept, **self._rounding(kept, now)}
        return kept

    def failing(self, kept: dict[str, str], images: Tensor) -> list[int]:
        """Indices of images whose outputs miss the gate, worst first."""
        suspect, scores = self._suspect(kept), []
        for start in range(0, len(images), BATCH):
            chunk = images[start : start + BATCH]
            want, got = (probe.run(chunk, OUTPUTS) for probe in (self.reference, suspect))
            for k in range(len(chunk)):
                cosines = [least_cosine(want[o][k : k + 1], got[o][k : k + 1]) for o in OUTPUTS]
                scores.append((min(-1.0 if np.isnan(c) else c for c in cosines), start + k))
        return [i for score, i in sorted(scores) if score < self.gate]

    def measure(self, kept: dict[str, str], batches: list[Batch] | None = None) -> _Measured:
        """One pass over the images at hand; with `batches` over those, up to the first that misses the gate, and of the outputs only."""
        self.passes += 1
        suspect = self._suspect(kept)
        taps = self._taps(suspect.model) if batches is None else {}
        stream = list(self.stream.values()) if batches is None else []
        result = _Measured([1.0] * len(stream), dict.fromkeys(OUTPUTS, 1.0), self.batches[0])
        for batch in self.batches if batches is None else batches:
            images, wanted = batch
            got = suspect.run(images, list(dict.fromkeys([*taps, *stream, *OUTPUTS])))
            result.add(
                batch, [least_cosine(wanted[t], got[t]) for t in stream], {o: least_cosine(wanted[o], got[o]) for o in OUTPUTS}
            )
            result.broken = next((owner for tensor, owner in taps.items() if not np.isfinite(got[tensor]).all()), None)
            if result.broken is not None or (batches is not None and not result.passes(self.gate)):
                break
        return result

    def ordered(self, kept: dict[str, str]) -> list[str]:
        """In order of execution, without what is part of another."""
        return [n for n in self.layers if n in kept and not self._inside(n, {k: "" for k in kept if k != n})]

    def half_products(self, kept: dict[str, str]) -> list[str]:
        """The products that are not kept in FP32."""
        return [n for n in self.tensors if not self._inside(n, kept)]

    def _suspect(self, kept: dict[str, str]) -> OnnxProbe:
        return OnnxProbe(retyped(self.source, self.precision, self.ordered(kept)), as_gpu=True)

    def _taps(self, model: ModelProto) -> dict[str, str]:
        """Tensors behind every layer and every residual add -> who made them, in order of execution; narrowed twins too."""
        made = [o for n in model.graph.node for o in n.output]
        owner = {tensor: layer for layer, tensor in self.tensors.items()}
        for block in self.stream:
            adds = [i for i in self.layers.get(block, []) if self.source.graph.node[i].op_type == "Add"]
            owner |= {t: block for i in adds if (t := self.source.graph.node[i].output[0]) not in self._inner_tensors()}
        twins = {f"{tensor}_{self.precision}": name for tensor, name in owner.items()}
        return {t: {**owner, **twins}[t] for t in made if t in owner or t in twins}

    def _inner_tensors(self) -> set[str]:
        """Everything that belongs to a layer: a bias add is no residual add."""
        return {o for layer in self.tensors for i in self.layers[layer] for o in self.source.graph.node[i].output}

    def _widened(self, broken: str, kept: dict[str, str]) -> dict[str, str]:
        """What to keep when the value that `broken` makes is not finite: it, or what it is part of."""
        block, limit, names = block_of(broken) or broken, f"{LARGEST[self.precision]:.4g}", list(self.stream)
        inside = f"overflow: nothing in it narrows what exceeds {limit} in {broken}"
        branch, block_itself = ([broken.rpartition(".")[0]], inside), ([block], inside)
        stream = [STREAM], f"overflow: the residual stream exceeds {limit} in {block}"
        rungs = [
            ([broken], f"overflow: values exceed {limit}"),
            *([stream] if self._ends_branch(broken) else [branch, block_itself, stream]),
            (
                names[names.index(block) :] if block in names else [],
                f"overflow: nothing narrows what exceeds {limit} in {block}",
            ),
        ]
        for rung, why in rungs:
            if fresh := [n for n in rung if n in self.layers and not self._inside(n, kept)]:
                return dict.fromkeys(fresh, why)
        raise GateFailed(
            f"{self.precision} is not finite in {broken} whatever stays in FP32; look at the weights of the model."
        )

    def _ends_branch(self, layer: str) -> bool:
        """Whether a layer's output goes into a residual add, and nowhere else."""
        tensor, nodes = self.tensors.get(layer), self.source.graph.node
        readers = [i for i, n in enumerate(nodes) if tensor in n.input]
        return bool(readers) and set(readers) <= set(self.layers.get(STREAM, []))

    def _inside(self, layer: str, kept: dict[str, str]) -> bool:
        return any(layer == k or layer.startswith(f"{k}.") for k in kept)

    def _rounding(self, kept: dict[str, str], now: _Measured) -> dict[str, str]:
        """The fewest layers to keep for the worst images to pass: bisected over blocks, then over the layers of the blocks found."""
        least = min(c for c in now.outputs.values() if c is not None)
        why = f"rounding: with what is listed so far cosine {least:.5f} at worst"
        wholes = [
            b for b in [*self.stream, *(n for n in self.tensors if block_of(n) is None), STREAM] if not self._inside(b, kept)
        ]
        worst = [now.worst]
        if not self._holds(kept, wholes, worst):
            raise GateFailed(
                f"{self.precision} misses the gate of {self.gate} even with every layer in FP32; use a lower gate."
            )
        blocks = self._needed(kept, [], wholes, worst)
        layers = [n for n in self.tensors if not self._inside(n, kept) and self._inside(n, dict.fromkeys(blocks, ""))]
        others = [b for b in blocks if b not in layers and b not in self.stream]
        if layers and self._holds(kept, [*others, *layers], worst):
            return dict.fromkeys([*others, *self._needed(kept, others, layers, worst)], why)
        return dict.fromkeys(blocks, why)

    def _needed(self, kept: dict[str, str], beside: list[str], layers: list[str], batches: list[Batch]) -> list[str]:
        """QuickXplain: a smallest part of `layers` that must be kept, beside `kept` and `beside`, for the batches to pass."""
        if len(layers) == 1:
            return layers
        half = len(layers) // 2
        first, second = layers[:half], layers[half:]
        found: list[str] = []
        if not self._holds(kept, [*beside, *first], batches):
            found = self._needed(kept, [*beside, *first], second, batches)
        if not self._holds(kept, [*beside, *found], batches):
            found = self._needed(kept, [*beside, *found], first, batches) + found
        return found

    def _holds(self, kept: dict[str, str], also: Sequence[str], batches: list[Batch]) -> bool:
        return self.measure({**kept, **dict.fromkeys(also, "")}, batches).passes(self.gate)


def _lower(a: float | None, b: float) -> float | None:
    return None if a is None or np.isnan(b) else min(a, b)


def _peak(tensor: TensorProto) -> float:
    return float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))
