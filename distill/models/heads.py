"""The projection head of DINO and iBOT: an MLP to a bottleneck, L2-normalised, times weight-normed prototypes.

Shape legend: ... any leading dimensions, D width in, E bottleneck, K prototypes.
"""

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from distill.cast_cache import CastCache
from distill.config import Config
from distill.losses.prototypes import prototype_cross_entropy
from distill.losses.targets import Assignment

MOST = 2**24  # of any size in a head; beyond it a number is a slip of the finger


class HeadConfig(Config):
    """A projection head (DINO paper, appendix C; sizes of DINOv2).

    Attributes:
        prototypes: K. 65,536 for S and B, 131,072 for L and g.
        hidden, bottleneck, layers: the MLP.
        init: `dinov2` (deviation 0.02) or `fan_in`, as for the backbone.
        bias: whether the MLP has biases.
    """

    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    bias: bool = True
    init: Literal["dinov2", "fan_in"] = "dinov2"

    def problems(self) -> list[str]:
        least = {"prototypes": 2, "hidden": 1, "bottleneck": 1, "layers": 1}
        sizes = {"prototypes": self.prototypes, "hidden": self.hidden, "bottleneck": self.bottleneck, "layers": self.layers}
        found = [f"{n} must be at least {least[n]}, got {v}" for n, v in sizes.items() if v < least[n]]
        return found + [f"{n} must be at most {MOST:,}, got {v}" for n, v in sizes.items() if v > MOST]


class WeightNormedPrototypes(nn.Module):
    """y_k = g_k (v_k / |v_k|) . z, without bias; g is trained and decayed, as in the reference."""

    def __init__(self, bottleneck: int, prototypes: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck))

    def weight(self) -> Float[Tensor, "k e"]:
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, z: Float[Tensor, "... e"]) -> Float[Tensor, "... k"]:
        return F.linear(z, self.weight().to(z.dtype))


class DINOHead(nn.Module):
    """tokens [..., D] -> prototype logits [..., K]."""

    def __init__(self, dim: int, config: HeadConfig):
        super().__init__()
        self.config = config
        self.cast = CastCache()
        widths = [dim] + [config.hidden] * (config.layers - 1) + [config.bottleneck]
        parts: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            parts.append(nn.Linear(a, b, bias=config.bias))
            if i < config.layers - 1:
                parts.append(nn.GELU())
        self.mlp = nn.Sequential(*parts) if len(parts) > 1 else parts[0]
        self.last_layer = WeightNormedPrototypes(config.bottleneck, config.prototypes)
        for module in self.mlp.modules() if len(parts) > 1 else [self.mlp]:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5 if config.init == "fan_in" else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # A Linear's own default, which is what the reference's weight norm starts from.
        nn.init.uniform_(self.last_layer.weight_v, -(config.bottleneck**-0.5), config.bottleneck**-0.5)

    def bottleneck(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        """The L2-normalised vector before the prototypes (normalised in float32 also where the MLP runs in less)."""
        z = self.mlp(x)
        return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=-1, eps=1e-12)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... k"]:
        return self.last_layer(self.bottleneck(x))

    @torch.no_grad()
    def logits(self, z: Float[Tensor, "s e"]) -> Float[Tensor, "s k"]:
        """Prototype logits of bottleneck vectors, without gradient, in the number format of the matrix products around.

        In bf16 they move Sinkhorn's targets by about 0.9 % of their mass at a temperature of 0.04 (measured at K = 65,536).
        """
        z = z.to(_product_type(z))
        return z @ self.cast(self.last_layer.weight_v, z.dtype, self.last_layer.weight_g, normed=True).T

    def cross_entropy(
        self, x: Float[Tensor, "s d"], targets: Assignment, weights_S: Float[Tensor, "s"], temperature: float
    ) -> Float[Tensor, ""]:
        """sum_s weights_s CE(targets_s, softmax(head(x_s) / temperature)), without ever holding all logits."""
        z, last = self.bottleneck(x), self.last_layer
        return prototype_cross_entropy(
            z, targets, weights_S, temperature, last.weight_v, last.weight_g, self.cast, _product_type(z)
        )


def _product_type(x: Tensor) -> torch.dtype:
    """The number format that matrix products run in here: autocast's, or the tensor's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def head_parameters(dim: int, config: HeadConfig) -> int:
    """Trainable parameters of a head on features of width `dim`, by formula."""
    widths = [dim] + [config.hidden] * (config.layers - 1) + [config.bottleneck]
    mlp = sum(a * b + b * config.bias for a, b in pairwise(widths))
    return mlp + config.prototypes * (config.bottleneck + 1)
