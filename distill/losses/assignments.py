"""Assignments of samples to prototypes that keep only the largest ones: what a cache stores in place of K numbers a sample.

Shape legend: S samples, K prototypes, k kept ones.

What is lost is known exactly. Let t be a target, l the mass outside its k largest entries, and t' those entries divided by 1 - l. Then

    |t - t'|_1 = 2 l            l outside, and l more by which the kept ones grow.

Both sum to 1, so for student logits z at temperature T, with q = softmax(z/T) and R = max z - min z (of unit vectors: R <= 2),

    |CE(t, q) - CE(t', q)| = |<t - t', z/T>| <= (|t - t'|_1 / 2) R / T = l R / T
    |dCE(t)/dz - dCE(t')/dz|_1 = |(q - t) - (q - t')|_1 / T = 2 l / T

How much is lost is another matter: `sinkhorn_loses`.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

AT_ONCE = 2**22  # numbers of a slice of rows: 16 MiB in float32


@runtime_checkable
class InRows(Protocol):
    """Assignments that are made a few rows at a time, [stop - start, K] float32."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Tensor: ...


class TopK(NamedTuple):
    """Sparse assignments: `values` [S, k] float32, falling along a row and summing to 1; `indices` [S, k] int64 of their prototypes."""

    values: Tensor
    indices: Tensor

    def to(self, device: torch.device) -> "TopK":
        return TopK(self.values.to(device), self.indices.to(device))


@torch.no_grad()
def top_k(assignments: Float[Tensor, "s k"] | InRows, k: int) -> tuple[TopK, Float[Tensor, "s"]]:
    """The k largest entries of each row, renormalised to sum 1, and the mass [S] that the others held (all of them kept when k >= K).

    A row that is not finite stays so: what the live target would do to the loss, the cached one does too.
    """
    many = max(1, AT_ONCE // max(1, prototypes_of(assignments)))
    pieces = []
    for start in range(0, max(1, len(assignments)), many):  # also once for no rows at all
        rows_SK = rows_of(assignments, start, min(start + many, len(assignments)))
        pieces.append(rows_SK.float().topk(min(k, rows_SK.shape[1]), dim=1))
    values_Sk, indices_Sk = (torch.cat(x) for x in zip(*pieces, strict=True))
    return normalised(values_Sk, indices_Sk), (1 - values_Sk.sum(1)).clamp_min(0)


def rows_of(assignments: Tensor | InRows, start: int, stop: int) -> Tensor:
    return assignments[start:stop] if isinstance(assignments, Tensor) else assignments.rows(start, stop)


def prototypes_of(assignments: Tensor | InRows) -> int:
    return rows_of(assignments, 0, 0).shape[1]


def normalised(values_Sk: Float[Tensor, "s k"], indices_Sk: Tensor) -> TopK:
    """Rows divided by their sums; a row of zeros stays zero."""
    return TopK(values_Sk / values_Sk.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny), indices_Sk)


def dense(topk: TopK, prototypes: int) -> Float[Tensor, "s k"]:
    """The same assignments with their zeros."""
    out_SK = topk.values.new_zeros(topk.values.shape[0], prototypes)
    return out_SK.scatter_(1, topk.indices, topk.values)


def sinkhorn_loses(k: int, samples: int, prototypes: int) -> float:
    """The least mass that k of K prototypes can lose of a Sinkhorn target: 1 - k S / K.

    Every prototype is shared out equally over the batch, so that no sample gets more than S/K of its mass from one prototype, however sharp
    the teacher. (Exactly so once the iterations have converged; three come close.)
    """
    return max(0.0, 1 - k * samples / prototypes)
