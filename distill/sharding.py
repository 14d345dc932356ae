"""Models whose parameters are spread over the processes (FSDP2), for teachers that no single device holds."""

from typing import Any

import torch
from torch import Tensor, nn


def fully_sharded(model: Any) -> Any:
    """Shard a HeadedBackbone in place, block by block, so that one block at a time is whole: parameters, gradients and Adam's moments
    take 1/W of the memory each (Zhao et al., arXiv 2304.11277; torch's `fully_shard`).
    """
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if hasattr(module, "cast"):  # no version tells when a shard's storage is filled
            module.cast.enabled = False
    for block in getattr(model.backbone, "blocks", ()):
        fully_shard(block)
    return fully_shard(model)


def whole(x: Tensor) -> Tensor:
    """A sharded tensor, gathered; any other one as it is. Every process must call this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@torch.no_grad()
def shard(value: Tensor, like: Tensor | nn.Parameter) -> Tensor:
    """`value` on the device of `like`, and as spread over the processes."""
    if not hasattr(like, "placements"):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
