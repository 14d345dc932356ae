"""Sums, maxima and rows over all processes; without a process group, over this one alone."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """`x` summed in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def max_over_ranks(x: Tensor) -> Tensor:
    """The largest of each element, in place."""
    if world() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def gather_rows(x_BD: Tensor) -> Tensor:
    """The rows of all ranks in their order, [W B, D]; gradients find their way back. Every rank must have as many."""
    return x_BD if world() == 1 else _Gather.apply(x_BD)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = sum_over_ranks(grad.contiguous().clone())
        first = dist.get_rank() * ctx.rows
        return grad[first : first + ctx.rows]
