"""The halves of a pre-norm block for training: same numbers as the plain modules up to rounding, less memory and time.

What autograd would keep is made again where that costs next to nothing: LayerNorm's output, GELU's output. LayerScale is folded into the
weight in front of it (gamma (W a + b) = (gamma W) a + gamma b), so its gradient comes from the weight's and no activation is kept for it.
Casts of weights to bf16 are made once per optimiser step, not once per use. Attention in bf16 on a CPU is batched matrix products over
slices whose scores stay in the cache: three times as fast there as the fused kernel's forward and backward (tests/benchmarks/README.md).

Shape legend: B sequences, T tokens, D width, H heads, O width out, I inner width of the feed-forward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.cast_cache import CastCache

SCORES_AT_ONCE = 600_000  # attention scores of one slice: 1.2 MB in bf16, which stays in a core's cache
SHORT = 128  # tokens up to which batched products beat the fused attention kernel in float32 too


class NormLinear(torch.autograd.Function):
    """LayerNorm, then Linear: keeps the input and its statistics, not the normalised values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor,
        w: Tensor,
        b: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        cast: CastCache,
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, gain.shape, gain.to(x.dtype), shift.to(x.dtype), eps)
        wc = cast(w, dtype)
        ctx.save_for_backward(x, gain, shift, mean, rstd, w, b)
        ctx.extra = (eps, dtype, cast)  # not the copy: of a sharded model none may outlive its block
        return F.linear(normed.to(dtype), wc, None if b is None else b.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        x, gain, shift, mean, rstd, w, b = ctx.saved_tensors
        eps, dtype, cast = ctx.extra
        normed = torch.native_layer_norm(x, gain.shape, gain.to(x.dtype), shift.to(x.dtype), eps)[0]
        dn, dw, db = _linear_backward(grad, normed.to(dtype), cast(w, dtype), w, b)
        dx, dgain, dshift = _norm_backward(dn, x, gain, shift, mean, rstd)
        return dx, dgain, dshift, dw, db, None, None, None


class NormMLP(torch.autograd.Function):
    """LayerNorm, Linear, GELU (exact), Linear scaled by LayerScale: keeps the input, its statistics and the inner values before GELU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        gamma: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        cast: CastCache,
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, gain.shape, gain.to(x.dtype), shift.to(x.dtype), eps)
        w1c, w2c = cast(w1, dtype), cast(w2, dtype, gamma)
        inner = F.linear(normed.to(dtype), w1c, None if b1 is None else b1.to(dtype))
        ctx.save_for_backward(x, gain, shift, mean, rstd, w1, b1, w2, b2, gamma, inner)
        ctx.extra = (eps, dtype, cast)
        return F.linear(F.gelu(inner), w2c, _scaled_bias(b2, gamma, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        x, gain, shift, mean, rstd, w1, b1, w2, b2, gamma, inner = ctx.saved_tensors
        eps, dtype, cast = ctx.extra
        d_active, dw2, db2 = _linear_backward(grad, F.gelu(inner), cast(w2, dtype, gamma), w2, b2)
        dw2, db2, dgamma = _unscale(dw2, db2, w2, b2, gamma)
        d_inner = torch.ops.aten.gelu_backward(d_active, inner)
        del d_active
        normed = torch.native_layer_norm(x, gain.shape, gain.to(x.dtype), shift.to(x.dtype), eps)[0]
        dn, dw1, db1 = _linear_backward(d_inner, normed.to(dtype), cast(w1, dtype), w1, b1)
        dx, dgain, dshift = _norm_backward(dn, x, gain, shift, mean, rstd)
        return dx, dgain, dshift, dw1, db1, dw2, db2, dgamma, None, None, None


class ScaledLinear(torch.autograd.Function):
    """Linear with LayerScale folded into its weight."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, w: Tensor, b: Tensor | None, gamma: Tensor | None, dtype: torch.dtype, cast: CastCache
    ) -> Tensor:
        wc = cast(w, dtype, gamma)
        ctx.save_for_backward(a, w, b, gamma)
        ctx.extra = (dtype, cast)
        return F.linear(a.to(dtype), wc, _scaled_bias(b, gamma, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        a, w, b, gamma = ctx.saved_tensors
        dtype, cast = ctx.extra
        da, dw, db = _linear_backward(grad, a.to(dtype), cast(w, dtype, gamma), w, b)
        dw, db, dgamma = _unscale(dw, db, w, b, gamma)
        return da.to(a.dtype), dw, db, dgamma, None, None


class SlicedAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(d)) V from one [B, T, 3 D] matrix, by batched products over slices of the batch; scores are made again in the
    backward pass and never exist for more than a slice. In a pruned block D is heads times head_dim, not the stream's width.
    """

    @staticmethod
    def forward(ctx: Any, qkv_BT3D: Tensor, heads: int) -> Tensor:
        b, t, d3 = qkv_BT3D.shape
        out = qkv_BT3D.new_empty(b, t, d3 // 3)
        for rows in _slices(b, t, heads):
            q, k, v = _heads_first(qkv_BT3D[rows], heads)
            p = torch.softmax(_scores(q, k), -1)
            out[rows].view(-1, t, heads, v.shape[-1]).copy_(torch.bmm(p, v).view(-1, heads, t, v.shape[-1]).transpose(1, 2))
        ctx.save_for_backward(qkv_BT3D)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple:  # type: ignore[override]
        (qkv_BT3D,), heads = ctx.saved_tensors, ctx.heads
        b, t, d3 = qkv_BT3D.shape
        d = d3 // 3 // heads
        result = torch.empty_like(qkv_BT3D)
        for rows in _slices(b, t, heads):
            q, k, v = _heads_first(qkv_BT3D[rows], heads)
            g = grad_BTD[rows].reshape(-1, t, heads, d).transpose(1, 2).reshape(-1, t, d)
            p = torch.softmax(_scores(q, k), -1)
            ds = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
            scale = d**-0.5
            parts = torch.stack(
                [
                    torch.baddbmm(q, ds, k, beta=0, alpha=scale),
                    torch.baddbmm(k, ds.transpose(1, 2), q, beta=0, alpha=scale),
                    torch.bmm(p.transpose(1, 2), g),
                ]
            )  # [3, b H, T, d]
            result[rows].view(-1, t, 3, heads, d).copy_(parts.view(3, -1, heads, t, d).permute(1, 3, 0, 2, 4))
        return result, None


class SwiGLU(torch.autograd.Function):
    """silu(a) b from [a, b] in one matrix [..., 2 I]; keeps only that."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        a, b = both.chunk(2, -1)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        a, b = ctx.saved_tensors[0].chunk(2, -1)
        return torch.cat([torch.ops.aten.silu_backward(grad * b, a), grad * F.silu(a)], -1)


def swiglu(both: Tensor) -> Tensor:
    return SwiGLU.apply(both)


def attend(qkv_BT3D: Tensor, heads: int) -> Tensor:
    """Self-attention [B, T, 3 D] -> [B, T, D], without scores in memory: the fused kernel, or slices where those are faster."""
    b, t, d3 = qkv_BT3D.shape
    if qkv_BT3D.device.type == "cpu" and (qkv_BT3D.dtype == torch.bfloat16 or t <= SHORT):
        return SlicedAttention.apply(qkv_BT3D, heads)
    q, k, v = qkv_BT3D.view(b, t, 3, heads, d3 // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d3 // 3)


def _slices(b: int, t: int, heads: int) -> list[slice]:
    step = max(1, SCORES_AT_ONCE // (heads * t * t))
    return [slice(i, i + step) for i in range(0, b, step)]


def _heads_first(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    b, t, d3 = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, d3 // 3 // heads).permute(2, 0, 3, 1, 4).reshape(3, b * heads, t, -1).unbind(0)
    return q, k, v


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)


def _scaled_bias(b: Tensor | None, gamma: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if b is None else (b if gamma is None else b * gamma).to(dtype)


def _linear_backward(grad: Tensor, x: Tensor, wc: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of F.linear(x, wc, b): (input, weight and bias in the format of `w`)."""
    flat = grad.reshape(-1, grad.shape[-1])
    dx = grad @ wc
    dw = (flat.T @ x.reshape(-1, x.shape[-1])).to(w.dtype)
    return dx, dw, None if b is None else sum_of_rows(flat).to(b.dtype)


def sum_of_rows(x_SO: Tensor) -> Tensor:
    """Sum over the rows; of bf16 as a matrix product, which adds in float32 without a float32 copy."""
    if x_SO.dtype in (torch.float32, torch.float64):
        return x_SO.sum(0)
    return (x_SO.new_ones(1, len(x_SO)) @ x_SO)[0]


def _unscale(
    dw: Tensor, db: Tensor | None, w: Tensor, b: Tensor | None, gamma: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of (W, b, gamma) from those of (gamma W, gamma b)."""
    if gamma is None:
        return dw, db, None
    dgamma = torch.linalg.vecdot(dw, w)
    if db is not None and b is not None:
        dgamma = dgamma + db * b
        db = db * gamma
    return dw.mul_(gamma[:, None]), db, dgamma


def _norm_backward(
    dn: Tensor, x: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgain, dshift = torch.ops.aten.native_layer_norm_backward(
        dn.to(x.dtype), x, gain.shape, mean, rstd, gain.to(x.dtype), shift.to(x.dtype), [True, True, True]
    )
    return dx, dgain.to(gain.dtype), dshift.to(shift.dtype)
