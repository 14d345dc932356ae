"""Pieces of `manifest.json` that its schema (`verify.Manifest`) is put together from: strict, and cheap to refuse."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from export.bundling.archive import MAX_FILE, shown
from export.bundling.strict_model import Several, Sha256, Size, Strict

HEAD_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"  # it becomes a file's name; as recipes name their tasks


class ListedFile(Strict):
    path: str
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0, le=MAX_FILE)]


class Port(Strict):
    """A tensor that goes in or comes out: `shape` mixes sizes with names of dynamic axes, `layout` names the axes in words."""

    name: str
    dtype: str
    shape: Several[Size | str]
    layout: str


class StandIn(Strict):
    """How far outputs may lie from the expected ones where another runtime runs the same file (OpenVINO for ONNX Runtime)."""

    cosine_min: float
    max_abs: dict[str, float]


class Expected(Strict):
    """Golden outputs of one file: an .npz of `cls` [n, D] and `patches` [n, N, D], float32, in the order of the golden images.

    Attributes:
        path: the .npz inside the bundle.
        source: the target that computed it: the artifact's own, or what it was made from where it could not run. Of a head: the
            target whose expected outputs are its inputs.
        cosine_min: the least cosine of a CLS or patch vector to the expected one.
        max_abs: the largest absolute difference, per output.
        stand_in: the same for another runtime, where one may run the file.
    """

    path: str
    source: str
    cosine_min: float
    max_abs: dict[str, float]
    stand_in: StandIn | None = None


class BundledHead(Strict):
    """A head that an evaluation trained: an ONNX file from features to what they mean, standardisation inside.

    Attributes:
        name: of the evaluation's task.
        path: heads/NAME.onnx. resolution: of the artifacts' files whose outputs it reads.
        artifacts: targets that have such a file. inputs: its ports, each named like the artifact's output that it reads.
        outputs: `logits` [batch, K] or [batch, N, K], or `metres` [batch, N].
        classes: names of the K outputs; empty where they have none. ids: what a map of classes holds for each; empty for depth.
        trained_on: the target whose features it learned from, such as torch-fp32.
        fit: how it saw whole images: the centre (`crop`), or all of them squeezed to a square (`squash`).
        expected: its golden outputs, for the expected outputs of the target `expected.source` at `resolution`.
    """

    name: Annotated[str, Field(pattern=HEAD_NAME)]
    kind: Literal["classification", "segmentation", "depth"]
    path: str
    resolution: Size
    artifacts: Annotated[Several[str], Field(min_length=1)]
    inputs: Annotated[Several[Port], Field(min_length=1)]
    outputs: Annotated[Several[Port], Field(min_length=1, max_length=1)]
    classes: Several[str]
    ids: Several[Annotated[int, Field(ge=0, le=1 << 31)]]
    trained_on: str
    fit: Literal["crop", "squash"]
    expected: Expected


def head_problems(heads: Sequence[BundledHead], outputs: Mapping[tuple[str, int], Sequence[str]]) -> list[str]:
    """What contradicts itself among the heads, one clause each.

    Args:
        outputs: (target, resolution) -> names of the outputs of the artifact's file there.
    """
    found = []
    given = {key: set(names) for key, names in outputs.items()}
    for head in heads:
        name = f"the head {shown(head.name)}"
        if head.path != f"heads/{head.name}.onnx":
            found.append(f"{name} lies in {shown(head.path)} and not in heads/{shown(head.name)}.onnx")
        needed = {port.name for port in head.inputs}
        if len(set(head.artifacts)) < len(head.artifacts):
            found.append(f"{name} names an artifact twice")
            continue  # a hostile list may be long; this one is refused already
        for target in head.artifacts:
            if not needed <= given.get((target, head.resolution), set()):
                found.append(f"{name} reads what {shown(target)} does not give at {head.resolution} px")
        if head.expected.source not in head.artifacts:
            found.append(f"{name} was proved on {shown(head.expected.source)}, which is none of its artifacts")
        if head.kind == "depth" and (head.classes or head.ids):
            found.append(f"{name} is of depth and has classes")
        if head.kind != "depth" and head.outputs[0].shape[-1:] != [len(head.ids)]:
            found.append(f"{name} has {len(head.ids)} classes, and its output another number")
        if head.classes and len(head.classes) != len(head.ids):
            found.append(f"{name} has {len(head.classes)} names for {len(head.ids)} classes")
        output = "metres" if head.kind == "depth" else "logits"
        if head.outputs[0].name != output or set(head.expected.max_abs) != {output}:
            found.append(f"{name} must give {output}, with a tolerance for it and for nothing else")
    counts = Counter(head.name.casefold() for head in heads)
    return found + [f"the head {shown(n)} appears twice" for n, count in counts.items() if count > 1]
