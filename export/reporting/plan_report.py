"""The quantization plan as a page can show it: a row a block, a column a layer's place in the block, and the reasons in words."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.reporting.labels import PRECISIONS, short_name, target_name

BLOCK = re.compile(r"(?P<block>(?:.*\.)?blocks\.(?P<number>\d+))\.(?P<place>.+)")
CHIPS = {"int8": ("INT8", "c3"), "fp8": ("FP8", "c4"), "w8": ("W8", "c2"), "w4": ("W4", "c2"), "keep": ("float", "keep")}


@dataclass(frozen=True)
class Cell:
    """One layer: what the cell says, its class, and all that is known of it."""

    text: str
    style: str
    tip: str


@dataclass(frozen=True)
class PlanView:
    """One plan and the files that follow it.

    Attributes:
        columns: places in a block, e.g. attn.qkv. rows: (block, a cell a column; None where it has no such layer).
        others: (layer, cell) outside the blocks. reasons: (why, layers) of what stays in floating point.
        counts: how many layers of each kind are quantized, and to what.
    """

    label: str
    counts: str
    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    others: list[tuple[str, Cell]]
    reasons: list[tuple[str, str]]


def plan_views(artifacts: Sequence[Mapping[str, Any]], plan_of: Callable[[Mapping[str, Any]], Any]) -> list[PlanView]:
    """One for each different plan of a model; files that share one are named together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for artifact in artifacts:
        plan = plan_of(artifact)
        if isinstance(plan, list) and plan:
            entries = [e for e in plan if isinstance(e, dict) and "layer" in e and "decision" in e]
            key = artifact["subject"], json.dumps(entries, sort_keys=True)
            groups.setdefault(key, []).append(target_name(artifact["target"]))
    return [_view(subject, targets, json.loads(text)) for (subject, text), targets in groups.items() if text != "[]"]


def _view(subject: str, targets: list[str], entries: list[dict[str, Any]]) -> PlanView:
    layers = [e for e in entries if e.get("kind") != "Class"]
    unquantized = all(e["decision"] == "keep" for e in layers if e.get("kind") == "Product")
    shown = [e for e in layers if not (unquantized and e.get("kind") == "Product")]  # the reasons name them
    columns: list[str] = []
    blocks: dict[str, dict[str, Cell]] = {}
    others = []
    for entry in shown:
        found = BLOCK.fullmatch(entry["layer"])
        if found is None:
            others.append((entry["layer"], _cell(entry)))
            continue
        if found["place"] not in columns:
            columns.append(found["place"])
        blocks.setdefault(f"Block {found['number']}", {})[found["place"]] = _cell(entry)
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if entry["decision"] == "keep":
            reasons.setdefault(str(entry.get("why", "")), []).append(entry["layer"])
    return PlanView(
        label=f"{short_name(subject)}: {', '.join(targets)}",
        counts=_counts(layers),
        columns=columns,
        rows=[(block, [cells.get(c) for c in columns]) for block, cells in blocks.items()],
        others=others,
        reasons=[(why, _listed(names)) for why, names in reasons.items()],
    )


KIND_NAMES = {"Linear": "linear layers", "Product": "attention products", "Conv": "convolutions"}


def _counts(layers: Sequence[Mapping[str, Any]]) -> str:
    """46 of 48 linear layers, 0 of 24 attention products to INT8."""
    said = []
    for kind, words in KIND_NAMES.items():
        mine = [e["decision"] != "keep" for e in layers if e.get("kind") == kind]
        said += [f"{sum(mine)} of {len(mine)} {words}"] if mine else []
    to = dict.fromkeys(PRECISIONS.get(e["decision"], e["decision"]) for e in layers if e["decision"] != "keep")
    return f"{', '.join(said)} to {' and '.join(to) or 'nothing'}"


def _cell(entry: Mapping[str, Any]) -> Cell:
    text, style = CHIPS.get(entry["decision"], (str(entry["decision"]), ""))
    parts = [f"{entry['layer']}: {text}"]
    parts += [str(entry["why"])] if entry.get("why") else []
    parts += [f"input scale {entry['input_scale']:.4g}"] if isinstance(entry.get("input_scale"), int | float) else []
    shape = entry.get("weight_shape")
    parts += [f"weight {' × '.join(map(str, shape))}"] if shape else []
    low, high = entry.get("weight_scale_min"), entry.get("weight_scale_max")
    parts += [f"weight scales {low:.3g} to {high:.3g}"] if isinstance(low, float) and isinstance(high, float) else []
    parts += [f"{entry['mflops']:.3g} MFLOP an image"] if entry.get("mflops") else []
    return Cell(text, style, "; ".join(parts))


def _listed(names: list[str], most: int = 8) -> str:
    """blocks.0.attn.qk to blocks.11.attn.av (24), where there are many."""
    return ", ".join(names) if len(names) <= most else f"{names[0]} to {names[-1]} ({len(names)})"
