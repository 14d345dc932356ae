"""Feature matching: the student's features, projected to the teacher's width, against the frozen teacher's features of the same crops.
It needs no heads, so it is the way to learn from a teacher that comes without them.

Sources: RADIO (arXiv 2312.06709, section 3: 0.9 cosine + 0.1 smooth-L1 for patches, cosine alone for the summary token) and UNIC
(arXiv 2408.05088, section 3: cosine and smooth-L1 in equal parts on CLS and patches, teacher features standardised).

Shape legend: C crops, N patches, D teacher's width, ... any leading dimensions.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from distill.config import Config
from distill.encoder import Features
from distill.losses.ranks import sum_over_ranks

Kind = Literal["cosine", "smooth_l1", "both"]
LEAST_STD = (
    1e-3  # of the root mean square deviation over all dimensions: one that hardly varies must not be blown up to unit variance
)


class MatchConfig(Config):
    """Feature matching as an objective; a weight of 0 leaves that part out.

    Attributes:
        cls, patches: weights of the two terms, each the mean over crops (and patches) of the distance below.
        kind: `cosine` is 1 - cos, blind to scale; `smooth_l1` (beta 1) sees it; `both` is their weighted sum.
        cosine_share: weight of the cosine in `both`, the rest being smooth-L1's. RADIO 0.9, UNIC 0.5.
        hidden: width of the projectors' hidden layer; 0 is a single linear layer.
        standardize: subtract the teacher's mean and divide by its deviation, per dimension. Without it a few dimensions of a public
            ViT, with deviations tens of times the others', are most of every distance, and the mean is most of every cosine.
        standardize_steps: steps whose features make those statistics; then they are frozen.
    """

    cls: float = 1.0
    patches: float = 1.0
    kind: Kind = "both"
    cosine_share: float = 0.9
    hidden: int = 2048
    standardize: bool = True
    standardize_steps: int = 100

    def problems(self) -> list[str]:
        found = []
        if min(self.cls, self.patches) < 0 or self.cls + self.patches == 0:
            found.append("cls and patches are weights of at least 0, and one of them above 0: otherwise leave matching out")
        if not 0 <= self.cosine_share <= 1:
            found.append(f"cosine_share is a share between 0 and 1, got {self.cosine_share}")
        if self.kind != "both" and self.cosine_share != MatchConfig.model_fields["cosine_share"].default:
            found.append(f"cosine_share belongs to kind: both, and kind is {self.kind}: drop one of them")
        if self.hidden < 0:
            found.append(f"hidden must be at least 0 (0 is one linear layer), got {self.hidden}")
        if self.standardize and self.standardize_steps < 1:
            found.append(
                f"standardize_steps must be at least 1, got {self.standardize_steps}: there is nothing to standardise with"
            )
        if not self.standardize and self.standardize_steps != MatchConfig.model_fields["standardize_steps"].default:
            found.append("standardize_steps belongs to standardize: true, and standardize is false: drop one of them")
        return found


def match_distance(
    student: Float[Tensor, "... d"], teacher: Float[Tensor, "... d"], kind: Kind = "both", cosine_share: float = 0.9
) -> Float[Tensor, ""]:
    """Mean over all tokens of 1 - cos, of the dimensions' mean smooth-L1, or of their weighted sum.

    Always float32: a cosine near 1 has no digits left in half precision. No gradient reaches the teacher.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.float(), teacher.detach().float()
        share = {"cosine": 1.0, "smooth_l1": 0.0, "both": cosine_share}[kind]
        loss = student.new_zeros(())
        if share > 0:
            loss = loss + share * (1 - F.cosine_similarity(student, teacher, dim=-1, eps=1e-6)).mean()
        if share < 1:
            loss = loss + (1 - share) * F.smooth_l1_loss(student, teacher)
        return loss


def match_losses(student: Features, teacher: Features, config: MatchConfig) -> dict[str, Tensor]:
    """Weighted terms by name: `match_cls` for cls [C, D], `match_patches` for patches [C, N, D].

    `student` is already of the teacher's width (distill/models/match_head.py) and `teacher` on the student's grid and, if so
    configured, standardised. Both must come from the same crops: unlike DINO's, this loss compares no two views.
    """
    terms = {}
    if config.cls:
        terms["match_cls"] = config.cls * match_distance(student.cls, teacher.cls, config.kind, config.cosine_share)
    if config.patches:
        terms["match_patches"] = config.patches * match_distance(
            student.patches, teacher.patches, config.kind, config.cosine_share
        )
    return terms


class RunningMoments(nn.Module):
    """Mean and deviation per dimension of every token seen so far; buffers `count` [], `mean` [D], `squares` [D] (sum of squared
    deviations), merged batch by batch as in Chan et al. 1983, which loses no digits to a large mean.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("squares", torch.zeros(dim))

    @torch.no_grad()
    def update(self, tokens: Sequence[Tensor]) -> None:
        """Take in tokens [..., D] of this rank's micro-batches, together with every other rank's. Batches not finite are left out."""
        flat = [x.detach().reshape(-1, x.shape[-1]).float() for x in tokens]
        count = sum_over_ranks(torch.tensor(sum(len(x) for x in flat), device=self.mean.device))
        mean = sum_over_ranks(torch.stack([x.sum(0) for x in flat]).sum(0)) / count.clamp_min(1)
        squares = sum_over_ranks(torch.stack([(x - mean).square().sum(0) for x in flat]).sum(0))
        if count == 0 or not bool((mean + squares).isfinite().all()):
            return
        share = count / (self.count + count)
        step = mean - self.mean
        self.squares += squares + step.square() * self.count * share
        self.mean += step * share
        self.count += count

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """(x - mean) / deviation in float32; x itself before anything was seen."""
        variance = self.squares / self.count.clamp_min(1)
        inverse = (variance + LEAST_STD**2 * variance.mean()).clamp_min(1e-12).rsqrt()
        return (x.float() - self.mean) * torch.where(self.count > 0, inverse, 1.0)


class FeatureStandardizer(nn.Module):
    """Teacher features to zero mean and unit deviation per dimension, CLS and patches apart.

    The statistics are those of all tokens of the first `steps` steps, over all ranks and micro-batches, and are then frozen. UNIC lets a
    moving average run on to the end; here the targets of an image stop moving once the learning rate has warmed up, so that they can be
    cached, are the same for a second student, and do not depend on where a run was interrupted. `steps` batches are plenty: with n tokens
    the mean is known to deviation / sqrt(n). All of it is buffers, so it travels with a checkpoint.
    """

    steps_seen: Tensor

    def __init__(self, dim: int, steps: int):
        super().__init__()
        self.steps = steps
        self.cls, self.patches = RunningMoments(dim), RunningMoments(dim)
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    def observe(self, micro_batches: Sequence[Features]) -> None:
        """Take in one step's teacher features (all of its micro-batches, before any of them is standardised); nothing once frozen.

        Every rank must call this in the same steps.
        """
        if self.steps_seen >= self.steps:
            return
        self.cls.update([f.cls for f in micro_batches])
        self.patches.update([f.patches for f in micro_batches])
        self.steps_seen += 1

    @torch.no_grad()
    def forward(self, features: Features) -> Features:
        with torch.autocast(features.cls.device.type, enabled=False):
            return Features(self.cls(features.cls), self.patches(features.patches))
