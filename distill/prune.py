"""Structured pruning: fewer heads, hidden units, channels and blocks, chosen by importance for each unit of cost saved.

    measure (importance.py) -> choose -> cut -> recover by distillation (train.py), in `steps` rounds, each a part of the way

All kinds of units stand in one list: at every turn the one goes whose removal loses least importance for each MAC, or for each
millisecond, that it saves. What cost means is a function of the widths: multiply-adds, or a table of latencies measured on the runtime
that will serve the model (export/stopwatch/block_latency.py). The layers that read what is cut are fitted again, by least squares on
training images, to what is left, and norms over fewer channels are rescaled to keep their output's size: at 0.75 of the MACs of a trained
ViT-S/14 the features keep a cosine of 0.93 before any recovery, and of 0.4 without it.

The result is a new network with its widths in its config (`BackboneConfig.blocks`), never a pickled one.

Shape legend: D width, H heads, d width of a head, I hidden width.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill.config import Config
from distill.errors import UserError
from distill.importance import Activations, Kind, Scores, damped, norm_read_by, with_norms
from distill.models.backbone import Backbone, BackboneConfig, BlockWidths, flops_per_image, parameter_count
from distill.models.headed import HeadedBackbone
from distill.unit_groups import UnitGroups, linear

Part = Literal["heads", "mlp", "dim", "blocks"]
PARTS: tuple[Part, ...] = ("heads", "mlp", "dim", "blocks")
Cost = Callable[[BackboneConfig], float]
CLOSE = 0.01  # a cut that lands this share below the target is as good as one that lands on it


class PruneConfig(Config):
    """What is cut, how far, and by what.

    Attributes:
        macs: share of the multiply-adds that is kept; latency_ms: latency at batch 1 to reach, by the target runtime's table. One of both.
        parts: what may be cut.
        importance: `taylor` (gradients of the distillation loss), `activation` (variance written to the residual stream) or `magnitude`.
        round_to: hidden widths and the embedding width stay multiples of it.
        steps: rounds of cutting and recovery on the way; the cost falls by the same factor in each.
        images: training images that importance is measured on, in every round.
        least: share of a part that stays at least: of every block's heads and hidden width, of the embedding width, of the blocks.
        sparsity: `2:4` zeroes two of every four weights of the blocks' linear layers besides, and keeps them so through recovery.
    """

    macs: float | None = None
    latency_ms: float | None = None
    parts: list[Part] = Field(default_factory=lambda: list(PARTS))
    importance: Kind = "taylor"
    round_to: Literal[8, 16, 32, 64] = 16
    steps: int = 1
    images: int = 512
    least: float = 0.25
    sparsity: Literal["2:4"] | None = None

    def problems(self) -> list[str]:
        found = []
        if (self.macs is None) == (self.latency_ms is None):
            found.append("macs or latency_ms must be given, one of both: it says how far to prune")
        if self.macs is not None and not 0 < self.macs <= 1:
            found.append(f"macs is the share of multiply-adds to keep, above 0 and at most 1, got {self.macs}")
        if self.macs == 1 and self.sparsity is None:
            found.append("macs 1 prunes nothing: lower it, or set sparsity")
        if self.latency_ms is not None and not (math.isfinite(self.latency_ms) and self.latency_ms > 0):
            found.append(f"latency_ms must be above 0, got {self.latency_ms}")
        if not self.parts:
            found.append("parts must name at least one of heads, mlp, dim, blocks")
        if len(set(self.parts)) < len(self.parts):
            found.append("parts names a part twice")
        if self.steps < 1:
            found.append(f"steps must be at least 1, got {self.steps}")
        if self.images < 1:
            found.append(f"images must be at least 1, got {self.images}")
        if not 0 <= self.least <= 1:
            found.append(f"least is a share between 0 and 1, got {self.least}")
        return found

    def targets(self, start: float) -> list[float]:
        """Cost to reach in every round, from the unpruned network's cost; it falls by the same factor in each.

        Raises:
            UserError: the network is faster than `latency_ms` already.
        """
        end = start * self.macs if self.macs is not None else self.latency_ms
        assert end is not None
        if end > start:
            raise UserError(f"prune.latency_ms is {end:g} ms and the unpruned network takes {start:.3g} ms: ask for less.")
        return [start * (end / start) ** (k / self.steps) for k in range(1, self.steps)] + [end]


def macs(config: BackboneConfig) -> float:
    """Multiply-adds of an image at the model's own resolution."""
    return flops_per_image(config, config.image_size) / 2


@dataclass(frozen=True)
class Cuts:
    """What goes: numbers of heads and hidden units per block, channels, whole blocks (their other entries then mean nothing)."""

    heads: list[list[int]]
    hidden: list[list[int]]
    dim: list[int]
    blocks: list[int]


@dataclass(frozen=True)
class PruneReport:
    """One round, for the report (JSON by `to_json`).

    Attributes:
        cost_before, cost_after, target: MACs or milliseconds, as `cost` counts.
        lost: share of all importance that went, by part.
        before, after: widths: {"dim", "head_dim", "blocks": [{"heads", "hidden"}], "parameters", "macs"}.
        blocks_cut: numbers of whole blocks that went; order: parts in the order of the turns, with how many units went in a row.
    """

    importance: str
    target: float
    cost_before: float
    cost_after: float
    lost: dict[str, float]
    before: dict[str, Any]
    after: dict[str, Any]
    blocks_cut: list[int]
    order: list[tuple[str, int]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prune(
    model: HeadedBackbone,
    config: PruneConfig,
    target: float,
    scores: Scores,
    cost: Cost = macs,
    seen: Activations | None = None,
    original: BackboneConfig | None = None,
) -> tuple[HeadedBackbone, PruneReport]:
    """A smaller copy of a model that costs at most `target`, and what was done. The heads' first layers follow a narrower embedding.

    Args:
        target: of this round, in the units of `cost` (`PruneConfig.targets`).
        scores, seen: of this very model (`importance.measure`); without activations nothing is fitted again.
        cost: of an image, from widths.
        original: the unpruned network, whose widths `least` is a share of; the model itself in the first round.

    Raises:
        UserError: the target cannot be reached with these parts and `least`, or the backbone is not one of ours.
    """
    groups = UnitGroups(model)
    scores = scores if seen is None else with_norms(scores, seen)
    chooser = _Chooser(config, groups.config, original or groups.config, scores, cost)
    cuts = chooser.run(target)
    after = chooser.now()
    pruned = cut(groups, cuts, after, seen)
    before = groups.config
    report = PruneReport(
        scores.kind,
        target,
        cost(before),
        cost(after),
        chooser.lost(),
        _described(before),
        _described(after),
        cuts.blocks,
        chooser.order,
    )
    return pruned, report


def _described(config: BackboneConfig) -> dict[str, Any]:
    blocks = [b.model_dump() for b in config.widths()]
    sizes = {"parameters": parameter_count(config, mask_token=False), "macs": round(macs(config))}
    return {"dim": config.shape()[0], "head_dim": config.head_width(), "blocks": blocks} | sizes


class _Chooser:
    """The greedy choice. Units of a part are sorted by importance once; the state is how many of each went."""

    def __init__(self, config: PruneConfig, start: BackboneConfig, original: BackboneConfig, scores: Scores, cost: Cost):
        self.config, self.start, self.scores, self.cost = config, start, scores, cost
        self.dim = start.shape()[0]
        self.widths: list[BlockWidths] = list(start.widths())
        self.kept = list(range(len(self.widths)))
        self.sorted = {
            "heads": [s.argsort().tolist() for s in scores.heads],
            "mlp": [s.argsort().tolist() for s in scores.hidden],
            "dim": [scores.dim.argsort().tolist()],
        }
        # Importance of the n least units, n = 0, 1, ...
        self.sums = {
            name: [torch.cat([torch.zeros(1, dtype=torch.float64), s.double().sort().values.cumsum(0)]) for s in all_]
            for name, all_ in (("heads", scores.heads), ("mlp", scores.hidden), ("dim", [scores.dim]))
        }
        wide, least = original.widths(), config.least
        self.least_heads = max(1, math.ceil(least * max(b.heads for b in wide)))
        self.least_hidden = max(config.round_to, math.ceil(least * max(b.hidden for b in wide)))
        self.least_dim = max(config.round_to, math.ceil(least * original.shape()[0]))
        self.least_blocks = max(1, math.ceil(least * len(wide)))
        self.order: list[tuple[str, int]] = []

    def now(self) -> BackboneConfig:
        return self._config(self.dim, self.widths, self.kept)

    def _config(self, dim: int, widths: list[BlockWidths], kept: list[int]) -> BackboneConfig:
        blocks = [widths[i] for i in kept]
        if dim == self.start.shape()[0] and blocks == self.start.widths():
            return self.start  # nothing was cut, and nothing has to be said
        shape = {"dim": dim, "head_dim": self.start.head_width(), "blocks": blocks, "heads": None, "depth": None}
        return self.start.model_copy(update=shape)

    def run(self, target: float) -> Cuts:
        here = self.cost(self.now())
        while here > target:
            moves = [m for m in self._moves() if m[2] < here]
            if not moves:
                raise UserError(
                    f"Pruning to {target:.4g} is out of reach: with parts {', '.join(self.config.parts)} and least "
                    f"{self.config.least:g} the smallest network costs {here:.4g}. Lower least, allow more parts, or ask for less."
                )
            # A block or a slice of the whole width may jump past the target: rather many small cuts than one too deep.
            fine = [m for m in moves if m[2] >= target * (1 - CLOSE)] or [min(moves, key=lambda m: abs(m[2] - target))]
            part, i, here, _ = min(fine, key=lambda m: m[3] / (here - m[2]))
            self._take(part, i)
        return self._cuts()

    def _moves(self) -> list[tuple[str, int, float, float]]:
        """Every possible cut: (part, block, cost afterwards, importance lost)."""
        found: list[tuple[str, int, float, float]] = []
        for part in self.config.parts:
            for i in [0] if part == "dim" else self.kept:
                after = self._after(part, i)
                if after is not None:
                    found.append((part, i, self.cost(self._config(*after)), self._loss(part, i, *after)))
        return found

    def _after(self, part: str, i: int) -> tuple[int, list[BlockWidths], list[int]] | None:
        """The state (dim, widths, kept blocks) after one cut; None where `least` forbids it."""
        if part == "blocks":
            return (self.dim, self.widths, [k for k in self.kept if k != i]) if len(self.kept) > self.least_blocks else None
        if part == "dim":
            dim = self._smaller(self.dim)
            return (dim, self.widths, self.kept) if dim >= self.least_dim else None
        b, widths = self.widths[i], list(self.widths)
        if part == "heads":
            widths[i] = BlockWidths(heads=b.heads - 1, hidden=b.hidden)
            return (self.dim, widths, self.kept) if widths[i].heads >= self.least_heads else None
        widths[i] = BlockWidths(heads=b.heads, hidden=self._smaller(b.hidden))
        return (self.dim, widths, self.kept) if widths[i].hidden >= self.least_hidden else None

    def _smaller(self, width: int) -> int:
        """The next multiple of `round_to` below."""
        return (width - 1) // self.config.round_to * self.config.round_to

    def _gone(self, dim: int, widths: list[BlockWidths]) -> dict[str, list[int]]:
        before = self.start.widths()
        return {
            "heads": [a.heads - b.heads for a, b in zip(before, widths, strict=True)],
            "mlp": [a.hidden - b.hidden for a, b in zip(before, widths, strict=True)],
            "dim": [self.start.shape()[0] - dim],
        }

    def _loss(self, part: str, i: int, dim: int, widths: list[BlockWidths], kept: list[int]) -> float:
        gone = self._gone(self.dim, self.widths)
        if part == "blocks":
            return sum(float(self.sums[p][i][-1] - self.sums[p][i][gone[p][i]]) for p in ("heads", "mlp"))
        sums = self.sums[part][i]
        return float(sums[self._gone(dim, widths)[part][i]] - sums[gone[part][i]])

    def _take(self, part: str, i: int) -> None:
        after = self._after(part, i)
        assert after is not None
        self.dim, self.widths, self.kept = after
        name = part if part == "dim" else f"{part} {i}"
        if self.order and self.order[-1][0] == name:
            self.order[-1] = (name, self.order[-1][1] + 1)
        else:
            self.order.append((name, 1))

    def _cuts(self) -> Cuts:
        gone = self._gone(self.dim, self.widths)
        heads, hidden = (
            [sorted(order[:n]) for order, n in zip(self.sorted[p], gone[p], strict=True)] for p in ("heads", "mlp")
        )
        blocks = [i for i in range(len(self.widths)) if i not in self.kept]
        return Cuts(heads, hidden, sorted(self.sorted["dim"][0][: gone["dim"][0]]), blocks)

    def lost(self) -> dict[str, float]:
        """Share of a part's whole importance that is gone; of `blocks` the share of all heads and hidden units that went with them."""
        gone = self._gone(self.dim, self.widths)
        found = {}
        for part in ("heads", "mlp", "dim"):
            total = sum(float(s[-1]) for s in self.sums[part])
            lost = sum(float(s[n]) for s, n in zip(self.sums[part], gone[part], strict=True))
            found[part] = lost / total if total else 0.0
        both = [float(a[-1] + b[-1]) for a, b in zip(self.sums["heads"], self.sums["mlp"], strict=True)]
        found["blocks"] = sum(v for i, v in enumerate(both) if i not in self.kept) / sum(both) if sum(both) else 0.0
        return found


def cut(groups: UnitGroups, cuts: Cuts, after: BackboneConfig, seen: Activations | None = None) -> HeadedBackbone:
    """Carry out cuts: a new backbone of config `after` with what is left, and the heads on it. `groups` is used up.

    Args:
        seen: activations of the model; with them layers are fitted to what is left, and norms are rescaled.
    """
    if seen is not None:
        _refit(groups, cuts, seen)
        if cuts.dim:
            _rescale_norms(groups, cuts.dim, seen)
    for i in range(len(groups.blocks)):
        if i not in cuts.blocks:
            groups.cut("heads", cuts.heads[i], i)
            groups.cut("hidden", cuts.hidden[i], i)
    groups.cut("dim", cuts.dim)
    kept = [i for i in range(len(groups.blocks)) if i not in cuts.blocks]
    place = {str(old): str(new) for new, old in enumerate(kept)}
    state: dict[str, Tensor] = {}
    for name, value in groups.tensors().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            if parts[1] not in place:
                continue
            parts[1] = place[parts[1]]
        state[".".join(parts)] = value
    backbone = Backbone(after)
    backbone.load_state_dict(state, strict=True)
    old = groups.model
    for part in (old.dino, old.ibot, old.match):
        if part is not None:
            part.requires_grad_(True)
    return HeadedBackbone(backbone, old.dino, old.ibot, old.match).eval()


@torch.no_grad()
def _refit(groups: UnitGroups, cuts: Cuts, seen: Activations) -> None:
    """Fit every layer that reads units which go to those that stay, by least squares on the activations seen."""
    width, depth = groups.config.head_width(), len(groups.blocks)
    for i in [i for i in range(depth) if i not in cuts.blocks]:
        columns = [h * width + j for h in cuts.heads[i] for j in range(width)]
        _fit(groups.blocks[i].attn.proj, columns, *seen.attended[i])
        _fit(groups.blocks[i].mlp.fc2, cuts.hidden[i], *seen.hidden[i])
    for name in groups.readers("dim"):
        _fit(linear(groups.model, name), cuts.dim, *seen.normed[norm_read_by(name, depth)])


def _fit(layer: nn.Linear, gone: list[int], mean: Tensor, cov: Tensor) -> None:
    """The best prediction of the inputs that go, linear in those that stay, moves into the weight and bias."""
    if not gone:
        return
    stay = sorted(set(range(layer.in_features)) - set(gone))
    cov, w = cov.double(), layer.weight.double()
    known = torch.linalg.solve(damped(cov[stay][:, stay]), cov[stay][:, gone])  # [stay, gone]
    layer.weight[:, stay] = (w[:, stay] + w[:, gone] @ known.T).to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.add_((w[:, gone] @ (mean[gone] - known.T @ mean[stay])).to(layer.bias.dtype))


@torch.no_grad()
def _rescale_norms(groups: UnitGroups, gone: list[int], seen: Activations) -> None:
    """Multiply the gains of norms so that what is left comes out as large as it did: by the ratio of the deviations over channels, root
    mean square over tokens, without and with the channels that go.
    """
    stay = sorted(set(range(groups.config.shape()[0])) - set(gone))
    norms = [n for b in groups.blocks for n in (b.norm1, b.norm2)] + [groups.model.backbone.norm]
    for norm, (mean, cov) in zip(norms, seen.stream, strict=True):
        second = cov.double() + mean[:, None] * mean
        norm.weight.mul_(math.sqrt(_spread(second[stay][:, stay]) / _spread(second)))


def _spread(second: Tensor) -> float:
    """Mean over tokens of the variance over channels, from E[x x^T] [D, D]."""
    return max(float(torch.diagonal(second).mean() - second.mean()), 1e-12)
