"""2:4 sparsity: in every four neighbouring weights along the input axis two are zero, which TensorRT runs at twice the rate on GPUs from
Ampere on (flag SPARSE_WEIGHTS). Masks are chosen once, by magnitude, and held through training (Mishra et al., arXiv 2104.08378).

Shape legend: O outputs, I inputs.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distill.errors import UserError
from distill.models.backbone import Backbone
from distill.models.headed import HeadedBackbone
from distill.models.kinds import AnyBackbone


def mask_2_4(weight: Float[Tensor, "o i"]) -> Bool[Tensor, "o i"]:
    """Which weights stay: the two largest of every four along the input axis; of equals the earlier."""
    fours = weight.detach().abs().unflatten(1, (-1, 4))
    order = fours.argsort(dim=2, descending=True, stable=True)
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(2, order[..., :2], True).flatten(1)


def is_2_4(weight: Float[Tensor, "o i"]) -> bool:
    """Whether at least two of every four neighbouring weights along the input axis are zero, as TensorRT asks."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight == 0).unflatten(1, (-1, 4)).sum(2) >= 2).all())


def block_linears(backbone: AnyBackbone) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name: qkv, proj, fc1 and fc2."""
    return {n: m for n, m in backbone.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)}


class Sparsity24:
    """Masks of a backbone's blocks, by the magnitudes that it has now. A training that is resumed needs the same masks: make them of the
    model as it was before the training, not of a checkpoint.

    A moving average of sparse weights is sparse once its own weights have been through `apply_`; `hold` sees to both.

    Raises:
        UserError: the backbone is not one of ours, or a layer's inputs are no multiple of 4.
    """

    def __init__(self, backbone: AnyBackbone):
        if not isinstance(backbone, Backbone):
            raise UserError("sparsity 2:4 is for backbones of ours (kind: vit).")
        self.backbone = backbone
        odd = [f"{n} has {m.in_features}" for n, m in block_linears(backbone).items() if m.in_features % 4]
        if odd:
            raise UserError(f"sparsity 2:4 needs inputs in multiples of 4, and {odd[0]}; set prune.round_to to 8 or more.")
        self.masks = {n: mask_2_4(m.weight) for n, m in block_linears(backbone).items()}

    @torch.no_grad()
    def apply_(self, backbone: AnyBackbone | None = None) -> None:
        """Set to zero, in place, what the masks leave out: in the backbone itself, or in another of the same shape."""
        for name, layer in block_linears(backbone or self.backbone).items():
            mask = self.masks[name]
            if mask.device != layer.weight.device:
                mask = self.masks[name] = mask.to(layer.weight.device)
            layer.weight.mul_(mask)


def hold(masks: dict[str, Sparsity24]) -> Callable[[dict[str, nn.Module]], None]:
    """`after_step` of a training (distill/train.py) of students that are sparse, by name; others pass as they are."""

    def after_step(models: dict[str, nn.Module]) -> None:
        for name, model in models.items():
            if name in masks:
                assert isinstance(model, HeadedBackbone)
                masks[name].apply_(model.backbone)

    return after_step
