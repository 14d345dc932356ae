"""Cross-entropy over prototypes without [S, K] matrices: logits, softmax and gradients are made for some rows at a time.

The loss is a number, so its gradient with respect to the logits is known as soon as they are: softmax minus target. Each slice's
gradient is multiplied out at once and the slice forgotten; nothing is computed twice.

Shape legend: S samples, K prototypes, E width of the bottleneck.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.cast_cache import AT_ONCE, CastCache
from distill.losses.targets import Assignment

LOGITS_AT_ONCE = 2**24  # one slice's logits: 32 MiB in bf16
DIRECTIONS_AT_ONCE = 2**22  # numbers of the prototypes' gradient that are made at once: 8 MiB in bf16


def prototype_cross_entropy(
    z_SE: Float[Tensor, "s e"],
    targets: Assignment,
    weights_S: Float[Tensor, "s"],
    temperature: float,
    directions_KE: Float[Tensor, "k e"] | None = None,
    gains_K1: Float[Tensor, "k 1"] | None = None,
    cast: CastCache | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, ""]:
    """sum_s weights_s CE(targets_s, softmax(y_s / temperature)), y = (g v/|v|) . z; float32.

    Args:
        z_SE: bottleneck vectors, or the logits themselves where no prototypes are given.
        targets: rows that sum to 1.
        directions_KE, gains_K1: v and g of the weight-normed prototypes.
        cast: where copies of the prototypes in the format of the products are kept.
        dtype: of the products; None: that of `z_SE`.
    """
    with torch.autocast(z_SE.device.type, enabled=False):  # sums stay in float32
        return _PrototypeCrossEntropy.apply(
            z_SE, directions_KE, gains_K1, targets, weights_S, temperature, cast or CastCache(), dtype or z_SE.dtype
        )


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        v: Tensor | None,
        g: Tensor | None,
        targets: Assignment,
        weights: Tensor,
        t: float,
        cast: CastCache,
        dtype: torch.dtype,
    ) -> Tensor:
        assert len(targets) == len(z) == len(weights)
        prototypes = None if v is None else cast(v, dtype, g, normed=True)
        wanted = any(ctx.needs_input_grad)
        loss = torch.zeros((), device=z.device)
        dz = torch.zeros_like(z) if wanted else None
        dw = None
        many = max(1, LOGITS_AT_ONCE // (z.shape[1] if v is None else len(v)))
        for start in range(0, len(z), many):
            # Divided by t here, where it is one number a coordinate of z, and not one a logit; rounded once.
            part = (z[start : start + many].detach() / t).to(dtype)
            logits = part
            if prototypes is not None:
                logits = cast.scratch("logits", (len(part), len(prototypes)), z, dtype)
                torch.mm(part, prototypes.T, out=logits)
            loss += _rows(logits, targets, weights, start)  # from here on `logits` holds their gradient
            if dz is not None and prototypes is not None and v is not None:
                dz[start : start + many] = logits @ prototypes
                dw = _directions(logits, part, v, dw, cast)
            elif dz is not None:
                dz[start : start + many] = logits
        if dz is not None:
            dz /= t
        if wanted and v is not None and g is not None:
            ctx.gradients = (dz, *_through_the_norm(torch.zeros_like(v) if dw is None else dw, v, g))
        else:
            ctx.gradients = (dz, None, None)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple:
        factor, found = above[0], ctx.gradients
        del ctx.gradients
        if factor.device.type != "cpu" or factor != 1:  # asking a GPU would wait for it
            found = tuple(None if x is None else x.mul_(factor) for x in found)
        return *found, None, None, None, None, None


def _directions(gradient_SK: Tensor, z_SE: Tensor, v_KE: Tensor, dw_KE: Tensor | None, cast: CastCache) -> Tensor:
    """The gradient of the prototypes, added to what there is of it, some prototypes at a time."""
    found = torch.empty_like(v_KE) if dw_KE is None else dw_KE
    many = max(1, DIRECTIONS_AT_ONCE // v_KE.shape[1])
    for a in range(0, len(v_KE), many):
        columns = gradient_SK[:, a : a + many]
        part = torch.mm(columns.T, z_SE, out=cast.scratch("directions", (columns.shape[1], z_SE.shape[1]), z_SE, z_SE.dtype))
        if dw_KE is None:
            found[a : a + many].copy_(part)
        else:
            found[a : a + many].add_(part)
    return found


def _rows(logits_SK: Tensor, targets: Assignment, weights_S: Tensor, start: int) -> Tensor:
    """The loss of these rows of logits, already divided by t; they are replaced by its gradient, weight (q - p)."""
    total = torch.zeros((), device=logits_SK.device)
    few = max(1, AT_ONCE // logits_SK.shape[1])
    for i in range(0, len(logits_SK), few):
        x = logits_SK[i : i + few]
        weight = weights_S[start + i : start + i + len(x)]
        p = targets.rows(start + i, start + i + len(x))
        log_q = torch.log_softmax(x.float() if x.dtype != torch.float64 else x, 1)
        total -= torch.linalg.vecdot((p * log_q).sum(1).to(weight.dtype), weight)
        x.copy_(log_q.exp_().sub_(p).mul_(weight[:, None]))
    return total


def _through_the_norm(dw_KE: Tensor, v_KE: Tensor, g_K1: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (v, g) from that of w = g v/|v|: dg = u.dw, dv = g/|v| (dw - u (u.dw)), u = v/|v|. Overwrites `dw_KE`."""
    dg_K1 = torch.empty_like(g_K1)
    few = max(1, AT_ONCE // v_KE.shape[1])
    for dw, v, g, dg in zip(*(x.split(few) for x in (dw_KE, v_KE, g_K1, dg_K1)), strict=True):
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        torch.div((dw * v).sum(1, keepdim=True), norm, out=dg)
        dw.addcmul_(v, dg / -norm).mul_(g / norm)
    return dw_KE, dg_K1
