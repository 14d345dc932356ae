"""A backbone with its projection heads: what the training loop moves, averages, freezes and saves.

Shape legend: B images, G = 2 global crops, L local crops, N patches, M chosen patches, D width, K prototypes.
"""

from copy import deepcopy
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distill.models.backbone import Backbone
from distill.models.heads import DINOHead


class Outputs(NamedTuple):
    """What the objectives need of a student: CLS of the global crops [2B, D], prototype logits of global [2B, K] and local [L B, K] CLS
    and of the chosen patches [M, K'].
    """

    cls: Tensor
    dino_global: Tensor
    dino_local: Tensor
    ibot: Tensor


class HeadedBackbone(nn.Module):
    """Backbone, DINO head, and an iBOT head of its own (untied) or None to share DINO's."""

    def __init__(self, backbone: Backbone, dino: DINOHead, ibot: DINOHead | None):
        super().__init__()
        self.backbone, self.dino, self.ibot = backbone, dino, ibot

    def parts(self) -> dict[str, nn.Module]:
        """The sub-modules by name, each with its own gradient clip."""
        return {"backbone": self.backbone, "dino": self.dino} | ({} if self.ibot is None else {"ibot": self.ibot})

    def heads(self) -> dict[str, DINOHead]:
        return {"dino": self.dino} | ({} if self.ibot is None else {"ibot": self.ibot})

    def forward(
        self,
        global_crops: Float[Tensor, "gb 3 H W"],
        local_crops: Float[Tensor, "lb 3 h w"],
        masks: Bool[Tensor, "gb n"] | None,
        chosen: Bool[Tensor, "gb n"],
    ) -> Outputs:
        """Student pass: global crops with `masks` applied to the input, local crops whole; iBOT logits of the `chosen` patches."""
        features = self.backbone(global_crops, masks)
        ibot = (self.ibot or self.dino)(features.patches[chosen])
        dino_global = self.dino(features.cls)
        if local_crops.shape[0] == 0:
            return Outputs(features.cls, dino_global, dino_global[:0], ibot)
        return Outputs(features.cls, dino_global, self.dino(self.backbone(local_crops).cls), ibot)

    @torch.no_grad()
    def teach(self, global_crops: Float[Tensor, "gb 3 H W"], chosen: Bool[Tensor, "gb n"]) -> tuple[Tensor, Tensor]:
        """Teacher pass over unmasked global crops: logits of CLS [2B, K] and of the `chosen` patches [M, K']."""
        features = self.backbone(global_crops)
        return self.dino(features.cls), (self.ibot or self.dino)(features.patches[chosen])


def frozen_copy(model: HeadedBackbone) -> HeadedBackbone:
    """An independent copy in evaluation mode that takes no gradient."""
    return deepcopy(model).requires_grad_(False).eval()
