"""Small networks and images for the tests of export."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.models.backbone import Backbone, BackboneConfig

# LayerScale 1: at its usual 1e-5 an untrained network's blocks do nothing, and any quantizer looks perfect.
TINY: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "patch": 8, "image_size": 32, "layer_scale": 1.0, "init": "fan_in"}
MEDIUM = {**TINY, "dim": 192, "heads": 3}


def backbone(**overrides: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(**{**TINY, **overrides})).eval()


def pictures(n: int, size: int, seed: int = 0) -> Tensor:
    """Smooth random images [n, 3, size, size]: like photographs, neighbouring pixels agree."""
    coarse = torch.randn(n, 3, max(2, size // 8), max(2, size // 8), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode="bicubic")
