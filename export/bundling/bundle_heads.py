"""Heads in a bundle: which of those that an evaluation trained go in, as ONNX files with golden outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.errors import UserError
from distill.evaluate.kept_heads import KeptHead
from distill.evaluate.linear_head import Head
from export.artifact import Artifact
from export.bundling import golden
from export.bundling.golden import Tolerance
from export.bundling.head_graph import head_graph, inputs_of
from export.bundling.ports import LAYOUTS, PATCH
from export.graphs.nodes import serialize
from export.sessions import usual_session

TORCH = "torch-fp32"
Features = Mapping[tuple[str, int], Mapping[str, np.ndarray]]  # (target, resolution) -> expected cls and patches

Json = dict[str, Any]


@dataclass(frozen=True)
class ChosenHead:
    """A head that goes in. Attributes: kept: where it is from. targets: the artifacts that it reads, in the bundle's order."""

    head: Head
    kept: KeptHead
    targets: list[str]


def choose_heads(wanted: bool | list[str], kept: Sequence[KeptHead], chosen: Sequence[Artifact]) -> list[ChosenHead]:
    """One head a task: the one trained on the student in PyTorch where it can be served, else on the first artifact that has such a one.

    Only heads of the last layer and of a resolution of the artifacts can be served. `True` takes all of those, a list those alone.

    Raises:
        UserError: a named head does not exist or cannot be served; the sentence says what there is.
    """
    if wanted is False:
        return []
    order = [TORCH, *(a.target for a in chosen)]
    usable = sorted((k for k in kept if k.target in order), key=lambda k: (k.task, order.index(k.target), k.resolution))
    found: dict[str, ChosenHead] = {}
    reasons: dict[str, str] = {}
    for one in usable:
        if one.task in found or (isinstance(wanted, list) and one.task not in wanted):
            continue
        targets = [a.target for a in chosen if any(e.resolution == one.resolution for e in a.files)]
        head = Head.load(one.path)
        if head.layers != 1:
            reasons[one.task] = f"it reads the last {head.layers} layers, and exported files give the last alone"
        elif not targets:
            reasons.setdefault(
                one.task, f"it was trained at {one.resolution} px, and no artifact of the bundle is of that size"
            )
        else:
            found[one.task] = ChosenHead(head, one, targets)
    for name in wanted if isinstance(wanted, list) else []:
        if name not in found:
            there = ", ".join(dict.fromkeys(k.task for k in usable)) or "none"
            why = f"cannot go in ({reasons[name]})" if name in reasons else "no evaluation of this run trained"
            raise UserError(f"bundle.heads names {name}, which {why}. Name others, or leave it out; there are: {there}.")
    return list(found.values())


def add_heads(files: dict[str, Any], heads: Sequence[ChosenHead], expected: Features, tolerance: Tolerance) -> list[Json]:
    """Add the graphs and their golden outputs -> the manifest's `heads`.

    Args:
        expected: the artifacts' expected outputs.
        tolerance: of a head's own outputs, for the same features on another machine.
    """
    described = []
    for chosen in heads:
        head, kept = chosen.head, chosen.kept
        source = chosen.targets[0]
        features = expected[source, kept.resolution]
        data = serialize(head_graph(head, features["cls"].shape[1], kept.target))
        session = usual_session(data, 1)
        outputs = [port.name for port in session.get_outputs()]
        values = session.run(outputs, {n: features[n] for n in inputs_of(head)})
        results = dict(zip(outputs, values, strict=True))
        path, vectors = f"heads/{kept.task}.onnx", f"golden/heads/{kept.task}.npz"
        files[path], files[vectors] = data, golden.as_npz(results)
        described.append(
            {
                "name": kept.task,
                "kind": head.kind,
                "path": path,
                "resolution": kept.resolution,
                "artifacts": chosen.targets,
                "inputs": [port(p, head.kind) for p in session.get_inputs()],
                "outputs": [port(p, head.kind) for p in session.get_outputs()],
                "classes": head.names,
                "ids": [] if head.kind == "depth" else [int(v) for v in head.values],
                "trained_on": kept.target,
                "fit": "crop" if head.kind == "classification" else "squash",
                "expected": {"path": vectors, "source": source, **golden.limits(tolerance, results)},
            }
        )
    return described


def port(found: Any, kind: str) -> Json:
    """A port of an ONNX Runtime session as the manifest has it."""
    classes = "batch, class" if kind == "classification" else f"batch, {PATCH}, class"
    return {"name": found.name, "dtype": "float32", "shape": found.shape, "layout": LAYOUTS.get(found.name, classes)}
