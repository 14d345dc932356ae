"""What the student is asked: DINO, iBOT, KoLeo, feature matching and Gram anchoring, against targets that one teacher pass provides for
any number of students.

Shape legend: B images of a micro-batch, C = 2 B global crops, N patches, M chosen patches, K prototypes, D the teacher's width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.config import Config
from distill.data.loader import Batch
from distill.encoder import Features
from distill.losses.dino import dino_global, dino_local
from distill.losses.gram import GramConfig, gram_loss
from distill.losses.ibot import patch_weights
from distill.losses.koleo import koleo_loss
from distill.losses.matching import FeatureStandardizer, MatchConfig, match_losses
from distill.losses.targets import Assignment, Centring, SinkhornKnopp
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead

CENTRINGS: dict[str, Callable[[int], nn.Module]] = {"sinkhorn": lambda prototypes: SinkhornKnopp(), "centre": Centring}


class ObjectivesConfig(Config):
    """Weights and temperatures; a weight of 0 leaves the term out, and so does null.

    Attributes:
        dino, ibot: weights of the cross-entropies; koleo: weight of the sum over both global crops.
        koleo_group: KoLeo looks for neighbours among so many images; null: among the whole batch of all processes.
        match: feature matching, for a teacher without heads; gram: anchoring of patch similarities.
        student_temperature: of both cross-entropies.
        teacher_temperature: from, to; linear over the first `temperature_warmup` share of the run, then constant.
        centring: `sinkhorn` (Sinkhorn-Knopp, 3 iterations) or `centre` (softmax with a moving centre).
    """

    dino: float = 1.0
    ibot: float = 1.0
    koleo: float = 0.1
    koleo_group: int | None = None
    match: MatchConfig | None = None
    gram: GramConfig | None = None
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: float = 0.3
    centring: Literal["sinkhorn", "centre"] = "sinkhorn"

    def problems(self) -> list[str]:
        found = []
        if min(self.dino, self.ibot, self.koleo) < 0:
            found.append("dino, ibot and koleo must be at least 0")
        elif self.dino + self.ibot == 0 and self.match is None and self.gram is None:
            found.append("dino or ibot must be above 0, or match or gram given: nothing else ties student to teacher")
        if self.koleo_group is not None and self.koleo_group < 2:
            found.append(f"koleo_group must be at least 2 images, got {self.koleo_group}")
        if min(self.student_temperature, *self.teacher_temperature) <= 0:
            found.append("temperatures must be above 0")
        if not 0 <= self.temperature_warmup <= 1:
            found.append(f"temperature_warmup is a share of the run between 0 and 1, got {self.temperature_warmup}")
        return found

    def needs_heads(self) -> bool:
        return bool(self.dino or self.ibot)

    def needs_features(self) -> bool:
        return self.match is not None or self.gram is not None


@dataclass(frozen=True)
class Targets:
    """What the teacher says about one micro-batch, on one student grid.

    Attributes:
        dino: assignments of CLS [2, B, K], or None.
        ibot: assignments of the M chosen patches, or None; weights: [M], see `patch_weights`.
        features: the teacher's, standardised if asked, patches on the student's grid; for matching.
        anchor: patches [C, N, D] whose similarities are to be kept; for Gram anchoring.
        seen: a frozen backbone's features of the same crops, where student and teacher share it.
    """

    dino: Tensor | None
    ibot: Assignment | None
    weights: Tensor
    features: Features | None = None
    anchor: Tensor | None = None
    seen: Features | None = None


def make_centrings(config: ObjectivesConfig, teacher: HeadedBackbone, grids: Sequence[int] = (0,)) -> nn.ModuleDict:
    """What has a state besides the networks: a centring per objective (patches: and per grid), the teacher's standardiser. It travels
    with the checkpoint.
    """
    kind, made = CENTRINGS[config.centring], nn.ModuleDict()
    if config.dino and teacher.dino is not None:
        made["dino"] = kind(teacher.dino.config.prototypes)
    if config.ibot and teacher.patch_head is not None:
        made.update({f"ibot{grid or ''}": kind(teacher.patch_head.config.prototypes) for grid in grids})
    if config.match is not None and config.match.standardize:
        made["standardise"] = FeatureStandardizer(teacher.backbone.dim, config.match.standardize_steps)
    return made


class Guide:
    """The teacher at work: one pass over a step's global crops, then targets for every grid that a student has.

    Args:
        size: pixels that the crops are resized to for the teacher; None as they are.
    """

    def __init__(self, teacher: HeadedBackbone, config: ObjectivesConfig, centrings: nn.ModuleDict, size: int | None = None):
        self.teacher, self.config, self.centrings, self.size = teacher, config, centrings, size

    @torch.no_grad()
    def look(self, parts: Sequence[Batch]) -> list[Features]:
        """The teacher's features of every micro-batch's unmasked global crops."""
        found = []
        for part in parts:
            crops = part.global_crops if part.teacher_crops is None else part.teacher_crops
            if self.size is not None and crops.shape[-1] != self.size:
                smaller = crops.shape[-1] > self.size
                crops = F.interpolate(crops, (self.size, self.size), mode="bicubic", antialias=smaller)
            found.append(self.teacher(crops, None, lambda _, features: features))
        return found

    def observe(self, features: Sequence[Features]) -> None:
        """Take a step's features (of all micro-batches) into the standardiser's statistics; once a step, before `targets`."""
        if "standardise" in self.centrings:
            standardiser: Any = self.centrings["standardise"]
            standardiser.observe(features)

    @torch.no_grad()
    def targets(
        self,
        features: Sequence[Features],
        chosen: Sequence[Tensor],
        temperature: float,
        grid: int = 0,
        share_features: bool = False,
        anchors: Sequence[Tensor] | None = None,
    ) -> list[Targets]:
        """Targets of all micro-batches, centred jointly over them and over all processes.

        Args:
            features: of the teacher, per micro-batch; chosen: [C, N] bool, the patches that iBOT asks.
            grid: the student's patches a side, where they differ from the teacher's; 0: as they are.
            share_features: hand the features on: the student has the same frozen backbone.
            anchors: patches [C, N, D'] for Gram anchoring; None: the teacher's.
        """
        vectors = self.vectors(features, chosen, grid)
        found = self.centred(*vectors, [patch_weights(c) for c in chosen], temperature, grid)
        if not (self.config.needs_features() or share_features):
            return found
        on_grid = [resampled(f, grid) for f in features]
        standard = on_grid
        if "standardise" in self.centrings:
            # On the teacher's own grid: resampling is a weighted mean, before or after is the same.
            standard = [resampled(self.centrings["standardise"](f), grid) for f in features]
        return [
            Targets(
                t.dino,
                t.ibot,
                t.weights,
                s if self.config.match is not None else None,
                a if self.config.gram is not None else None,
                f if share_features else None,
            )
            for t, f, s, a in zip(found, features, standard, anchors or [f.patches for f in on_grid], strict=True)
        ]

    def vectors(self, features: Sequence[Features], chosen: Sequence[Tensor], grid: int) -> tuple[list[Tensor], list[Tensor]]:
        """Bottleneck vectors of CLS [C, E] and of the chosen patches [M, E'] of every micro-batch; empty lists where a term is off."""
        dino: list[Tensor] = []
        ibot: list[Tensor] = []
        if self.config.dino:
            dino = self.teacher(None, None, partial(_bottlenecks, which="dino"), [f.cls for f in features])
        if self.config.ibot:
            rows = [resampled(f, grid).patches[c] for f, c in zip(features, chosen, strict=True)]
            ibot = self.teacher(None, None, partial(_bottlenecks, which="ibot"), rows)
        return dino, ibot

    def centred(
        self, dino: list[Tensor], ibot: list[Tensor], weights: list[Tensor], temperature: float, grid: int
    ) -> list[Targets]:
        """Bottleneck vectors -> targets: the product with the prototypes, centring, temperature."""
        cls: list[Any] = [None] * len(weights)
        patches: list[Any] = [None] * len(weights)
        if dino:
            logits = self.teacher(None, None, partial(_logits, which="dino"), dino)
            cls = [a.whole().view(2, len(a) // 2, -1) for a in self.centrings["dino"](logits, temperature)]
        if ibot:
            logits = self.teacher(None, None, partial(_logits, which="ibot"), ibot)
            patches = self.centrings[f"ibot{grid or ''}"](logits, temperature)
        return [Targets(*both) for both in zip(cls, patches, weights, strict=True)]


def _head(model: HeadedBackbone, which: str) -> DINOHead:
    head = model.dino if which == "dino" else model.patch_head
    assert head is not None
    return head


def _bottlenecks(model: HeadedBackbone, rows: Any, which: str) -> list[Tensor]:
    return [_head(model, which).bottleneck(x) for x in rows]


def _logits(model: HeadedBackbone, vectors: Any, which: str) -> list[Tensor]:
    return [_head(model, which).logits(z) for z in vectors]


def resampled(features: Features, grid: int) -> Features:
    """Patch features on a grid of `grid` x `grid` (bilinear, antialiased when shrinking); 0: as they are."""
    c, n, d = features.patches.shape
    side = round(n**0.5)
    if grid in (0, side):
        return features
    maps = features.patches.float().transpose(1, 2).reshape(c, d, side, side)
    maps = F.interpolate(maps, (grid, grid), mode="bilinear", antialias=grid < side)
    return Features(features.cls, maps.flatten(2).transpose(1, 2))


def local_terms(
    model: HeadedBackbone, features: Features, targets: Targets, config: ObjectivesConfig, local_crops: int
) -> dict[str, Tensor]:
    """Weighted terms of the local crops [L B, ...]."""
    assert model.dino is not None
    assert targets.dino is not None
    ce = partial(model.dino.cross_entropy, temperature=config.student_temperature)
    return {"dino_local": config.dino * dino_local(features.cls, targets.dino, local_crops, ce)}


def global_terms(
    model: HeadedBackbone,
    features: Features,
    targets: Targets,
    config: ObjectivesConfig,
    local_crops: int,
    chosen: Tensor,
    anchored: bool = True,
) -> dict[str, Tensor]:
    """Weighted terms of the global crops [2 B, ...]; with those of the local ones, their sum is what is optimised (and, unlike in the
    reference, exactly what is logged).
    """
    terms: dict[str, Tensor] = {}
    if config.dino:
        assert model.dino is not None
        assert targets.dino is not None
        ce = partial(model.dino.cross_entropy, temperature=config.student_temperature)
        terms["dino_global"] = config.dino * dino_global(features.cls, targets.dino, local_crops, ce)
    if config.ibot:  # also without any chosen patch: an empty sum keeps the head in every rank's graph
        assert model.patch_head is not None
        assert targets.ibot is not None
        rows = features.patches[chosen]
        loss = model.patch_head.cross_entropy(rows, targets.ibot, targets.weights, config.student_temperature)
        terms["ibot"] = config.ibot * loss
    if config.koleo:
        first, second = features.cls.chunk(2)
        terms["koleo"] = config.koleo * (koleo_loss(first, config.koleo_group) + koleo_loss(second, config.koleo_group))
    if config.match is not None:
        assert model.match is not None
        assert targets.features is not None
        terms |= match_losses(model.match(features), targets.features, config.match)
    if config.gram is not None and anchored:
        assert targets.anchor is not None
        terms["gram"] = config.gram.weight * gram_loss(features.patches, targets.anchor)
    return terms
