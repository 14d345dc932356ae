"""Monitors of collapse: a training that died of it is stopped with a sentence that says what to change, instead of running to its end.

A collapse raises no error and leaves a loss that looks settled. It has two faces, and each statistic sees its own:

    prototype_entropy   falls when all samples choose the same few prototypes (sharpening without centring)
    teacher_entropy     rises to ln K when the targets say nothing (centring without sharpening, or a learning rate far too high)
    effective_rank      falls to 1 when all images have nearly the same features
    nearest_distance    falls to 0 likewise

Sinkhorn-Knopp gives every prototype its share by construction, so with it `prototype_entropy` is full whatever happens; the last two
look at the features themselves, where no centring can hide anything.

Shape legend: S samples (crops), K prototypes, B images, D width.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from distill.config import Config
from distill.errors import DecantError
from distill.losses.assignments import InRows, prototypes_of, rows_of
from distill.losses.ranks import gather_rows, sum_over_ranks
from distill.rows import Row, not_measured

ROWS = 256  # images that rank and distances look at, at most: the decomposition then takes some 20 ms of one core


@torch.no_grad()
def assignment_sums(assignment: Tensor | InRows, at_once: int = 2**20) -> tuple[Float[Tensor, ""], Float[Tensor, "k"]]:
    """Of assignments [S, K], in full or made a few rows at a time: the sum of the samples' entropies in nats (0 is a hard choice, S ln K
    says nothing), and how much of the samples each prototype got, [K].
    """
    k = prototypes_of(assignment)
    device = rows_of(assignment, 0, 0).device
    entropy, total_K = torch.zeros((), device=device), torch.zeros(k, device=device)
    many = max(1, at_once // max(1, k))
    for start in range(0, len(assignment), many):
        rows_SK = rows_of(assignment, start, min(start + many, len(assignment))).float()
        entropy += torch.special.entr(rows_SK).sum()
        total_K += rows_SK.sum(0)
    return entropy, total_K


def prototype_entropy(total_K: Float[Tensor, "k"]) -> Float[Tensor, ""]:
    """Entropy of the mean assignment, in nats: 0 when all samples choose one prototype; S hard choices reach ln min(K, S)."""
    return torch.special.entr(total_K / total_K.sum()).sum()


def effective_rank(x_BD: Float[Tensor, "b d"]) -> float:
    """exp(entropy of the singular values' shares), 1 ... min(B, D); nan where x is not finite (RankMe, arXiv 2210.02885, equation 1).

    Rows are not centred: features that are all alike then have rank 1, however their remainders scatter. The singular values are roots of
    the eigenvalues of the smaller Gram matrix, in double precision: float32's rounding, spread over hundreds of directions, would add up
    to a visible rank. Zero features have rank 1.
    """
    x = x_BD.detach()
    if not bool(x.isfinite().all()):
        return math.nan
    x = (x.cpu() if x.device.type == "mps" else x).double()
    gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return math.exp(torch.special.entr(shares).sum().item())


def nearest_distances(x_BD: Float[Tensor, "b d"]) -> Float[Tensor, "b"]:
    """Euclidean distance of every L2-normalised row to the most similar other row, 0 ... 2: the quantity that KoLeo spreads (arXiv
    1806.03198). Rows must be of different images: two crops of one ought to be near.
    """
    x_BD = F.normalize(x_BD.detach().float(), dim=-1, eps=1e-8)
    similarity = (x_BD @ x_BD.T).fill_diagonal_(-torch.inf)
    return (x_BD - x_BD[similarity.argmax(1)]).norm(dim=-1)


def feature_std(x_BD: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Mean over dimensions of the deviation over images (of L2-normalised features 1 / sqrt(D) at best: SimSiam, arXiv 2011.10566)."""
    return F.normalize(x_BD.detach().float(), dim=-1, eps=1e-8).std(0, correction=0).mean()


class Limits(NamedTuple):
    """What is possible: K prototypes, S samples, B images looked at, D width."""

    prototypes: int
    samples: int
    images: int
    dim: int


@torch.no_grad()
def collapse_statistics(assignment: Tensor | InRows | None, cls_BD: Float[Tensor, "b d"]) -> tuple[dict[str, float], Limits]:
    """All statistics of a step, over all ranks (every rank must call this, and gets the same numbers), and what they could be at best.

    Args:
        assignment: the teacher's, of this rank's CLS (all of its micro-batches), [..., K] or made in rows; None in feature matching,
            which has no prototypes. Of cached targets, cut off after k prototypes, the entropy of a sample is a lower bound.
        cls_BD: the student's CLS, before heads, of one global crop an image; every rank has as many.
    """
    cls_BD = gather_rows(cls_BD.detach().float())[:ROWS]
    nearest = nearest_distances(cls_BD) if len(cls_BD) > 1 else torch.full((1,), torch.nan)
    values = {
        "effective_rank": effective_rank(cls_BD),
        "nearest_distance": nearest.mean().item(),
        "nearest_distance_min": nearest.min().item(),
        "feature_std": feature_std(cls_BD).item(),
    }
    prototypes = samples = 0
    if assignment is not None:
        assignment = assignment.flatten(0, -2) if isinstance(assignment, Tensor) else assignment
        prototypes = prototypes_of(assignment)
        entropy, total_K = assignment_sums(assignment)
        sums = sum_over_ranks(torch.stack([entropy, entropy.new_tensor(len(assignment))]))
        samples = round(sums[1].item())
        values["teacher_entropy"] = (sums[0] / sums[1]).item()
        values["prototype_entropy"] = prototype_entropy(sum_over_ranks(total_K)).item()
    return values, Limits(prototypes, samples, *cls_BD.shape)


class MonitorConfig(Config):
    """When a training counts as dead. Thresholds are shares of what is possible, so they hold at any size; each has a value that turns
    that monitor off.

    Measured with the quickstart's networks (width 48 and 64, K = 64, batch 64), as such shares and after the first fifth of the run.
    Trainings that learn (pretraining with three seeds, distillation with two, a control, a moving centre with three seeds, no KoLeo,
    LayerScale 1e-5): effective rank 0.13 to 0.7, nearest distance 0.12 to 0.95, targets' entropy at most 0.98, prototype entropy at
    least 0.97 with Sinkhorn and, for a few steps, 0.20 with a moving centre. Dead ones: temperature 1 (either centring) has rank 0.012,
    distance 0.013 and targets' entropy 1.0; 100 times the learning rate 0.001, 0.001 and 1.0, with KoLeo only targets' entropy 0.997; no
    centring at all has prototype entropy 0.14 to 0.17 (two seeds) while its features look alive.

    Attributes:
        stop: whether a dead training is stopped; false only logs.
        after: share of the run before which nothing stops. The first steps pass through states that look like collapse: with LayerScale
            1e-5 all images start with the same features. 0.2 is past the longest warm-up of the shipped recipes.
        patience: logged steps in a row beyond a threshold.
        prototype_entropy: least share of ln min(K, S); 0 is off.
        teacher_entropy: largest share of ln K; 1 is off.
        effective_rank: least share of the way from 1 to min(B, D); 0 is off.
        nearest_distance: least mean distance of L2-normalised features (a random pair is 1.4 apart); 0 is off.
    """

    stop: bool = True
    after: float = 0.2
    patience: int = 5
    prototype_entropy: float = 0.18
    teacher_entropy: float = 0.995
    effective_rank: float = 0.02
    nearest_distance: float = 0.02

    def problems(self) -> list[str]:
        found = []
        for name in ("after", "prototype_entropy", "teacher_entropy", "effective_rank"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.nearest_distance <= 2:
            found.append(f"nearest_distance is a distance between 0 and 2, got {self.nearest_distance}")
        if self.patience < 1:
            found.append(f"patience must be at least 1 logged step, got {self.patience}")
        return found

    def thresholds(self, limits: Limits) -> dict[str, tuple[str, float, float]]:
        """By statistic: `below` or `above`, the threshold in the statistic's own unit, and the best or worst possible value."""
        choices, rank = math.log(max(min(limits.prototypes, limits.samples), 1)), min(limits.images, limits.dim)
        nothing = math.log(max(limits.prototypes, 1))
        found = {}
        if self.effective_rank > 0 and rank > 1:
            found["effective_rank"] = ("below", 1 + self.effective_rank * (rank - 1), float(rank))
        if self.nearest_distance > 0 and limits.images > 1:
            found["nearest_distance"] = ("below", self.nearest_distance, 2.0)
        if self.prototype_entropy > 0 and choices > 0:
            found["prototype_entropy"] = ("below", self.prototype_entropy * choices, choices)
        if self.teacher_entropy < 1 and nothing > 0:
            found["teacher_entropy"] = ("above", self.teacher_entropy * nothing, nothing)
        return found


ALIKE = (
    "the features of all images are nearly the same",
    "raise koleo (0.1), lower lr or lengthen warmup, lower teacher_temperature (0.04 to 0.07), use larger batches, in a training of few "
    "steps layer_scale: 1.0",
)
CAUSES = {  # by statistic: what it means, and what to change
    "effective_rank": ALIKE,
    "nearest_distance": ALIKE,
    "prototype_entropy": (
        "nearly all images choose the same prototypes",
        "use centring: sinkhorn, raise teacher_temperature, lower lr",
    ),
    "teacher_entropy": (
        "the teacher's targets are nearly uniform and teach nothing",
        "lower teacher_temperature (0.04 to 0.07), lower lr or lengthen warmup",
    ),
}


class Monitor:
    """Counts how many logged steps in a row each statistic of one student has been beyond its threshold."""

    def __init__(self, config: MonitorConfig, total: int, who: str = "the student"):
        self.config, self.first, self.who = config, round(config.after * total), who
        self.in_a_row: dict[str, int] = {}

    def judge(self, step: int, values: Mapping[str, float], limits: Limits) -> str | None:
        """Take in a logged step; the sentence about a dead training, or None. A statistic that is not finite says nothing."""
        complaint = None
        for name, (side, threshold, possible) in self.config.thresholds(limits).items():
            value = values.get(name, math.nan)
            if step < self.first or not math.isfinite(value):
                continue
            beyond = value < threshold if side == "below" else value > threshold
            self.in_a_row[name] = self.in_a_row.get(name, 0) + 1 if beyond else 0
            if complaint is None and self.in_a_row[name] >= self.config.patience:
                what, remedy = CAUSES[name]
                complaint = (
                    f"Training of {self.who} has collapsed at step {step}, {what}: {name} is {value:.3g}, {side} "
                    f"{threshold:.3g} (possible: {possible:.3g}), in {self.in_a_row[name]} logged steps in a row; {remedy}, "
                    "or set monitors.stop to false to go on regardless."
                )
        return complaint

    def observe(self, step: int, values: Mapping[str, float], limits: Limits) -> None:
        """Take in a logged step.

        Raises:
            DecantError: dead, and `stop` is on. The numbers are the same on every rank, so all of them stop together.
        """
        complaint = self.judge(step, values, limits)
        if complaint and self.config.stop:
            raise DecantError(complaint)

    def state(self) -> dict[str, int]:
        """What a checkpoint must keep so that a resumed run stops at the same step."""
        return dict(self.in_a_row)

    def restore(self, state: Mapping[str, int]) -> None:
        self.in_a_row = dict(state)


METRICS = ("effective_rank", "nearest_distance", "nearest_distance_min", "feature_std", "teacher_entropy", "prototype_entropy")


def monitor_rows(values: Mapping[str, float], limits: Limits, subject: str, **conditions: Any) -> list[Row]:
    """The statistics as rows: entropies in nats, with what was possible among the conditions (add step and images seen)."""
    rows = []
    for name in METRICS:
        if name not in values:
            continue
        of_targets = name in ("teacher_entropy", "prototype_entropy")
        about = {"prototypes": limits.prototypes} if of_targets else {"dim": limits.dim}
        about |= {"of": "teacher's targets" if of_targets else "student's CLS, one global crop an image"} | conditions
        n = limits.samples if of_targets else limits.images
        if math.isfinite(values[name]):
            rows.append(Row(metric=name, value=values[name], n=n, subject=subject, target="torch-fp32", conditions=about))
        else:
            rows.append(not_measured(name, subject, "torch-fp32", "the features were not finite", **about))
    return rows
