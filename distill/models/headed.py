"""A backbone with its projection heads: what the training loop moves, averages, freezes and saves.

Shape legend: B images, N patches, M chosen patches, D width, K prototypes.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distill.models.heads import DINOHead
from distill.models.kinds import AnyBackbone
from distill.models.match_head import MatchHead

R = TypeVar("R")


class HeadedBackbone(nn.Module):
    """Backbone, DINO head, an iBOT head of its own (untied) or None to share DINO's, and a projector to the teacher's features.

    Any of the heads may be missing: a public teacher has none, a student that only matches features has the projector alone.
    """

    def __init__(
        self, backbone: AnyBackbone, dino: DINOHead | None = None, ibot: DINOHead | None = None, match: MatchHead | None = None
    ):
        super().__init__()
        self.backbone, self.dino, self.ibot, self.match = backbone, dino, ibot, match

    def parts(self) -> dict[str, nn.Module]:
        """The sub-modules by name, each with its own gradient clip."""
        found = {"backbone": self.backbone, "dino": self.dino, "ibot": self.ibot, "match": self.match}
        return {name: module for name, module in found.items() if module is not None}

    def heads(self) -> dict[str, DINOHead]:
        """The heads that are saved with the model; a projector is of no use after training."""
        return {n: h for n, h in (("dino", self.dino), ("ibot", self.ibot)) if h is not None}

    @property
    def patch_head(self) -> DINOHead | None:
        return self.ibot or self.dino

    def forward(
        self,
        crops: Tensor | None,
        masks: Tensor | None,
        use: Callable[["HeadedBackbone", Any], R],
        features: Any = None,
    ) -> R:
        """What `use` makes of the Features of crops [B, 3, H, W], masked where `masks` [B, N] says, or of `features` already there.

        Losses and heads run in here, so that wrappers for several processes see every parameter in use.
        """
        if features is None:
            assert crops is not None
            # Its gradient is of no use, so nothing is kept for it.
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_frozen):
                features = self.backbone(crops) if masks is None else self.backbone(crops, masks)
        return use(self, features)

    @property
    def backbone_frozen(self) -> bool:
        """Whether only the heads learn."""
        return not any(p.requires_grad for p in self.backbone.parameters())

    def train(self, mode: bool = True) -> "HeadedBackbone":
        """Training mode, except for a frozen backbone: its batch norms must not move."""
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        return self


def frozen(model: HeadedBackbone) -> HeadedBackbone:
    """The model itself, in evaluation mode and without gradients."""
    return model.requires_grad_(False).eval()


def frozen_copy(model: HeadedBackbone) -> HeadedBackbone:
    """An independent copy in evaluation mode that takes no gradient. A frozen backbone is shared: it never differs."""
    memo = {id(model.backbone): model.backbone} if model.backbone_frozen else {}
    return frozen(deepcopy(model, memo))
