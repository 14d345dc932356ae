"""Teacher targets: prototype logits become assignments, by Sinkhorn-Knopp or by softmax with a moving centre.

All of it is float32 and without gradient, and works with or without a process group.

Shape legend: S samples (all views of all images of the global batch), K prototypes.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


def _sum_over_ranks(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


def _max_over_ranks(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


FAINTEST = -60.0  # exp(-60) is 1e-26: far below float32's resolution of a sum, far above its smallest number


@torch.no_grad()
def sinkhorn_knopp(logits_SK: Float[Tensor, "s k"], temperature: float, iterations: int = 3) -> Float[Tensor, "s k"]:
    """Assignments whose rows sum to 1 and whose columns share the batch equally (SwAV, arXiv 2006.09882, section 3.1).

    Q = exp(X/t) / total; `iterations` times: each prototype's total becomes 1/K, then each sample's total 1/S; times S.
    Unlike the reference, the largest logit is subtracted first: exp overflows float32 beyond X/t = 88. The constant cancels.
    A prototype that no sample reaches at all (its column underflows to zero) keeps zero mass instead of becoming NaN.
    """
    q_SK = logits_SK.float() / temperature
    q_SK = q_SK - _max_over_ranks(q_SK.max() if q_SK.numel() else q_SK.new_tensor(-torch.inf))
    # Samples whose best logit lies so far below that exp would be 0 are lifted to where it is not, so that their target stays defined.
    # Exact to float32 while X/t spans less than about 80; beyond, where the reference overflows, such a row's target is approximate:
    # a prototype that only faint samples reach sees their lifted weights.
    q_SK = torch.exp(q_SK + (FAINTEST - q_SK.amax(1, keepdim=True)).clamp_min(0)) if q_SK.numel() else q_SK
    samples = _sum_over_ranks(torch.tensor(float(q_SK.shape[0]), device=q_SK.device))
    k = q_SK.shape[1]
    q_SK /= _sum_over_ranks(q_SK.sum())
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(iterations):
        q_SK /= _sum_over_ranks(q_SK.sum(0, keepdim=True)).clamp_min(tiny) * k
        q_SK /= q_SK.sum(1, keepdim=True).clamp_min(tiny) * samples
    return q_SK * samples


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
    def forward(self, logits_SK: Float[Tensor, "s k"], temperature: float) -> Float[Tensor, "s k"]:
        targets = torch.softmax((logits_SK.float() - self.centre) / temperature, -1)
        total = _sum_over_ranks(logits_SK.float().sum(0, keepdim=True))
        count = _sum_over_ranks(torch.tensor(float(logits_SK.shape[0]), device=logits_SK.device))
        if count > 0 and bool(total.isfinite().all()):  # one bad batch must not stay in the centre for ever
            self.centre.mul_(self.momentum).add_(total / count, alpha=1 - self.momentum)
        return targets


class SinkhornKnopp(nn.Module):
    """The same face as Centring, without state."""

    def __init__(self, iterations: int = 3):
        super().__init__()
        self.iterations = iterations

    def forward(self, logits_SK: Float[Tensor, "s k"], temperature: float) -> Float[Tensor, "s k"]:
        return sinkhorn_knopp(logits_SK, temperature, self.iterations)
