"""Projectors from a student's width to its teacher's, for feature matching (distill/losses/matching.py). Dropped after training."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from distill.encoder import Features


class Projector(nn.Module):
    """tokens [..., D] -> [..., D']: Linear, LayerNorm, GELU, Linear (RADIO, arXiv 2312.06709, section 3), or one Linear.

    The norm between, which UNIC's projector lacks, keeps the GELU's input at unit scale whatever the student's width and initialisation,
    so that one learning rate serves all sizes. None in front: a backbone's features leave its final LayerNorm. None at the end: the
    teacher's scale must be reachable. Weights start at deviation 1 / sqrt(fan in), so the first output is about as large as a
    standardised target.
    """

    def __init__(self, dim: int, teacher_dim: int, hidden: int):
        super().__init__()
        widths = [dim, hidden, teacher_dim] if hidden else [dim, teacher_dim]
        first, *rest = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(first, *(part for layer in rest for part in (nn.LayerNorm(hidden), nn.GELU(), layer)))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        return self.layers(x)


class MatchHead(nn.Module):
    """Features of width `dim` -> Features of width `teacher_dim`; CLS and patches each through a projector of their own.

    `hidden` 0 makes both single linear layers. `cls`, `patches`: leave out a projector whose loss has no weight, since a parameter
    without gradient stalls distributed training; its tokens are then not returned ([B, 0] and [B, N, 0]).
    """

    def __init__(self, dim: int, teacher_dim: int, hidden: int, cls: bool = True, patches: bool = True):
        super().__init__()
        self.cls = Projector(dim, teacher_dim, hidden) if cls else None
        self.patches = Projector(dim, teacher_dim, hidden) if patches else None

    def forward(self, features: Features) -> Features:
        def project(projector: Projector | None, x: Tensor) -> Tensor:
            return x[..., :0] if projector is None else projector(x)

        return Features(project(self.cls, features.cls), project(self.patches, features.patches))


def identity_match_head(dim: int, cls: bool = True, patches: bool = True) -> MatchHead:
    """Features as they are, fixed: for a student that must keep its teacher's very features, such as one that is trained for its
    quantization with itself in floating point as teacher. Its targets must not be standardised (`standardize: false`).
    """
    head = MatchHead(dim, dim, 0, cls, patches)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)
    return head.requires_grad_(False)


def match_head_parameters(dim: int, teacher_dim: int, hidden: int, parts: int = 2) -> int:
    """Trainable parameters by formula; `parts` 1 where only CLS or only patches are matched."""
    linear = dim * teacher_dim + teacher_dim
    mlp = dim * hidden + hidden + 2 * hidden + hidden * teacher_dim + teacher_dim
    return parts * (mlp if hidden else linear)
