"""What the student is asked: the sum of DINO, iBOT and KoLeo, against targets that one teacher pass provides for any number of students."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from distill.config import Config
from distill.losses.dino import dino_loss
from distill.losses.ibot import ibot_loss, patch_weights
from distill.losses.koleo import koleo_loss
from distill.losses.targets import Centring, SinkhornKnopp
from distill.models.headed import HeadedBackbone, Outputs

CENTRINGS: dict[str, Callable[[int], nn.Module]] = {"sinkhorn": lambda prototypes: SinkhornKnopp(), "centre": Centring}


class ObjectivesConfig(Config):
    """Weights and temperatures; a weight of 0 leaves the term out.

    Attributes:
        dino, ibot: weights of the cross-entropies; koleo: weight of the sum over both global crops.
        student_temperature: of both cross-entropies.
        teacher_temperature: from, to; linear over the first `temperature_warmup` share of the run, then constant.
        centring: `sinkhorn` (Sinkhorn-Knopp, 3 iterations) or `centre` (softmax with a moving centre).
    """

    dino: float = 1.0
    ibot: float = 1.0
    koleo: float = 0.1
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: float = 0.3
    centring: Literal["sinkhorn", "centre"] = "sinkhorn"

    def problems(self) -> list[str]:
        found = []
        if min(self.dino, self.ibot, self.koleo) < 0 or self.dino + self.ibot == 0:
            found.append(
                "dino, ibot and koleo must be at least 0, and dino or ibot above 0: nothing else ties student to teacher"
            )
        if min(self.student_temperature, *self.teacher_temperature) <= 0:
            found.append("temperatures must be above 0")
        if not 0 <= self.temperature_warmup <= 1:
            found.append(f"temperature_warmup is a share of the run between 0 and 1, got {self.temperature_warmup}")
        return found


class Targets(NamedTuple):
    """The teacher's assignments: CLS [2, B, K], chosen patches [M, K'], and the weight of each chosen patch [M]."""

    dino: Tensor
    ibot: Tensor
    weights: Tensor


def make_centrings(config: ObjectivesConfig, teacher: HeadedBackbone) -> nn.ModuleDict:
    """One centring per objective; their state (if any) travels with the checkpoint."""
    kind = CENTRINGS[config.centring]
    ibot = teacher.ibot or teacher.dino
    return nn.ModuleDict({"dino": kind(teacher.dino.config.prototypes), "ibot": kind(ibot.config.prototypes)})


def teacher_targets(
    teacher: HeadedBackbone, centrings: nn.ModuleDict, global_crops: Tensor, chosen: Tensor, temperature: float
) -> Targets:
    """One teacher pass over the unmasked global crops [2B, 3, H, W]; both crops (and all chosen patches) are centred jointly."""
    dino_logits, ibot_logits = teacher.teach(global_crops, chosen)
    dino = centrings["dino"](dino_logits, temperature)
    return Targets(dino.view(2, -1, dino.shape[-1]), centrings["ibot"](ibot_logits, temperature), patch_weights(chosen))


def student_losses(out: Outputs, targets: Targets, config: ObjectivesConfig) -> dict[str, Tensor]:
    """Weighted terms by name; their sum is what is optimised (and, unlike in the reference, exactly what is logged)."""
    b, k = targets.dino.shape[1:]
    terms: dict[str, Tensor] = {}
    if config.dino:
        t = config.student_temperature
        terms["dino_global"], terms["dino_local"] = dino_loss(
            out.dino_global.view(2, b, k), out.dino_local.view(-1, b, k), targets.dino, t
        )
        terms = {name: config.dino * value for name, value in terms.items()}
    if config.ibot:  # also without any chosen patch: an empty sum keeps the head in every rank's graph
        terms["ibot"] = config.ibot * ibot_loss(out.ibot, targets.ibot, targets.weights, 2 * b, config.student_temperature)
    if config.koleo:
        first, second = out.cls.chunk(2)
        terms["koleo"] = config.koleo * (koleo_loss(first) + koleo_loss(second))
    return terms


@torch.no_grad()
def target_statistics(targets: Targets) -> dict[str, float]:
    """Monitors of collapse, in nats: mean entropy of one assignment, and entropy of the batch's mean assignment (ln K at best)."""
    p = targets.dino.flatten(0, 1)
    mean = p.mean(0)
    return {
        "teacher_entropy": torch.special.entr(p).sum(1).mean().item(),
        "prototype_entropy": torch.special.entr(mean / mean.sum()).sum().item(),
    }
