"""Teacher targets: prototype logits become assignments, by Sinkhorn-Knopp or by softmax with a moving centre.

Both are one formula, softmax((X - c) / t) with a centre c [K]: Sinkhorn-Knopp finds the c for which the prototypes share the batch equally.
So targets are kept as logits and a centre, and rows of them are made when a loss needs them: [S, K] float32 numbers never exist at once.

All of it is float32 and without gradient, and works with or without a process group.

Shape legend: S samples (all views of all images of the global batch), K prototypes.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.cast_cache import AT_ONCE
from distill.losses.assignments import TopK, dense
from distill.losses.ranks import max_over_ranks, sum_over_ranks


@runtime_checkable
class Assignment(Protocol):
    """Targets of S samples over K prototypes, whose rows sum to 1."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 as [stop - start, K] float32. The caller may write into them."""
        ...


class Dense:
    """Assignments in full; with `repeat`, the same rows again and again (each local crop has the targets of its image)."""

    def __init__(self, values_SK: Float[Tensor, "s k"], repeat: int = 1):
        self.values, self.repeat = values_SK, repeat

    def __len__(self) -> int:
        return len(self.values) * self.repeat

    def rows(self, start: int, stop: int) -> Tensor:
        return self.values[torch.arange(start, stop, device=self.values.device) % len(self.values)]


class Soft:
    """softmax((X - c) / t), made row by row from logits X [S, K] of any number format and a centre c [K]."""

    def __init__(self, logits_SK: Float[Tensor, "s k"], centre_K: Float[Tensor, "k"], temperature: float):
        self.logits, self.centre, self.temperature = logits_SK.detach(), centre_K, temperature

    def __len__(self) -> int:
        return len(self.logits)

    def rows(self, start: int, stop: int) -> Tensor:
        x = self.logits[start:stop] - self.centre  # float32, as the centre is
        return torch.softmax(x.div_(self.temperature), -1)

    def whole(self) -> Float[Tensor, "s k"]:
        return self.rows(0, len(self))


class Sparse:
    """Assignments of which only the largest entries were kept (from a cache)."""

    def __init__(self, kept: TopK, prototypes: int):
        self.kept, self.prototypes = kept, prototypes

    def __len__(self) -> int:
        return len(self.kept.values)

    def rows(self, start: int, stop: int) -> Tensor:
        return dense(TopK(self.kept.values[start:stop], self.kept.indices[start:stop]), self.prototypes)


@torch.no_grad()
def sinkhorn_centre(parts: Sequence[Tensor], temperature: float, iterations: int = 3) -> Float[Tensor, "k"]:
    """The centre c with which softmax((X - c)/t) is Sinkhorn-Knopp's assignment (SwAV, arXiv 2006.09882, section 3.1).

    Q = exp(X/t); `iterations` times: each prototype's total becomes equal, then each sample's. Scaling rows is what softmax does, so only
    the logarithms of the column factors are state: -c/t. Kept as logarithms they neither overflow (the reference does, beyond X/t = 88) nor
    lose samples or prototypes that lie far below the largest logit.

    Args:
        parts: logits [S_i, K] of this rank's micro-batches; the samples of all parts and all ranks are centred jointly.
    """
    device, k = parts[0].device, parts[0].shape[1]
    # The first totals are sums of exp(X/t), each column's relative to its largest so that none overflows or is lost.
    tops = [x.amax(0).float() for x in parts if len(x)]
    largest_K = max_over_ranks(torch.stack(tops).amax(0) if tops else torch.full((k,), -torch.inf, device=device))
    largest_K = torch.where(largest_K.isneginf(), 0.0, largest_K)  # no sample at all
    total_K = torch.zeros(k, device=device)
    for x_SK in _slices(parts):
        total_K += (x_SK - largest_K).div_(temperature).exp_().sum(0)
    nothing = sum_over_ranks(total_K) == 0
    centre_K = _levelled(torch.where(nothing, 0.0, torch.log(total_K) + largest_K / temperature), temperature)
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(iterations - 1):
        mass_K = torch.zeros(k, device=device)
        for x_SK in _slices(parts):
            mass_K += torch.softmax((x_SK - centre_K).div_(temperature), -1).sum(0)
        change_K = torch.log(sum_over_ranks(mass_K).clamp_min(tiny))
        centre_K = _levelled(centre_K / temperature + change_K, temperature)
    return centre_K


def _levelled(logarithms_K: Tensor, temperature: float) -> Tensor:
    """A constant in the centre changes nothing: without it the numbers stay small, and float32 exact."""
    return (logarithms_K - logarithms_K.mean()) * temperature


def _slices(parts: Sequence[Tensor]) -> list[Tensor]:
    """Views of a few rows each."""
    return [piece for part in parts for piece in part.split(max(1, AT_ONCE // part.shape[1])) if piece.numel()]


@torch.no_grad()
def sinkhorn_knopp(logits_SK: Float[Tensor, "s k"], temperature: float, iterations: int = 3) -> Float[Tensor, "s k"]:
    """Assignments whose rows sum to 1 and whose columns share the batch equally, in full."""
    if not logits_SK.numel():
        sinkhorn_centre([logits_SK], temperature, iterations)  # the other ranks wait for this one's share
        return logits_SK.float()
    return Soft(logits_SK, sinkhorn_centre([logits_SK], temperature, iterations), temperature).whole()


class Centring(nn.Module):
    """softmax((X - c)/t), c moving towards each batch's mean (DINO, arXiv 2104.14294, eq. 4).

    A batch is centred with the centre of the batches before it; the buffer `centre` [1, K] travels with checkpoints.
    """

    centre: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(1, prototypes))

    @torch.no_grad()
    def forward(self, parts: Sequence[Tensor], temperature: float) -> list[Soft]:
        """Logits [S_i, K] of this rank's micro-batches -> their targets."""
        used_K = self.centre[0].clone()
        total_K = sum_over_ranks(torch.stack([x.sum(0, dtype=torch.float32) for x in parts]).sum(0))
        count = sum_over_ranks(torch.tensor(float(sum(len(x) for x in parts)), device=used_K.device))
        if count > 0 and bool(total_K.isfinite().all()):  # one bad batch must not stay in the centre for ever
            self.centre.mul_(self.momentum).add_(total_K[None] / count, alpha=1 - self.momentum)
        return [Soft(x, used_K, temperature) for x in parts]


class SinkhornKnopp(nn.Module):
    """The same face as Centring, without state."""

    def __init__(self, iterations: int = 3):
        super().__init__()
        self.iterations = iterations

    def forward(self, parts: Sequence[Tensor], temperature: float) -> list[Soft]:
        centre_K = sinkhorn_centre(parts, temperature, self.iterations)
        return [Soft(x, centre_K, temperature) for x in parts]
