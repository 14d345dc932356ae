"""The transformer block: timm's for inference and export, memory-saving halves (`fused.py`) for training and for teachers in bf16.

Shape legend: B sequences, T tokens, D width.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import GluMlp, SwiGLUPacked
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distill.cast_cache import CastCache
from distill.models.fused import NormLinear, NormMLP, ScaledLinear, attend, swiglu


class Block(TimmBlock):
    """x [B, T, D] -> [B, T, D]: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))).

    Attributes:
        drop_rate: stochastic depth. In training each residual runs on a random subset of the samples and is scaled up (DINOv2, section 5).
        recompute: keep only the input for the backward pass and run the block again there.
        plain: timm's own arithmetic in training too (what `torch.compile` takes).
    """

    drop_rate: float
    recompute: bool
    plain: bool
    cast: CastCache

    def forward(self, x_BTD: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]
        device = x_BTD.device.type
        low = torch.is_autocast_enabled(device)
        if not (self.training or low) or torch.compiler.is_exporting():
            return super().forward(x_BTD)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._halves, x_BTD, use_reentrant=False)
        return self._halves(x_BTD)

    def _halves(self, x_BTD: Tensor) -> Tensor:
        device = x_BTD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BTD.dtype
        # Residuals stay in float32, as under autocast: sums over many blocks are where bf16 loses most.
        x_BTD = x_BTD.float() if dtype != torch.float64 else x_BTD
        with nullcontext() if self.plain else torch.autocast(device, enabled=False):  # every number format is said below
            for half in (self._attention, self._feed_forward):
                x_BTD = self._on_a_subset(half, x_BTD, dtype)
        return x_BTD

    def _on_a_subset(self, half: Callable[[Tensor, torch.dtype], Tensor], x_BTD: Tensor, dtype: torch.dtype) -> Tensor:
        b = x_BTD.shape[0]
        keep = max(int(b * (1 - self.drop_rate)), 1)
        if not self.training or keep == b:
            return x_BTD + half(x_BTD, dtype)
        chosen = torch.randperm(b, device=x_BTD.device)[:keep]
        residual = half(x_BTD[chosen], dtype).to(x_BTD.dtype)
        return torch.index_add(x_BTD, 0, chosen, residual, alpha=b / keep)

    def _attention(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        norm: Any = self.norm1
        attn: Any = self.attn
        if self.plain or not _ordinary(attn):
            return self.ls1(attn(norm(x)))
        if not _fusable(attn.qkv, attn.proj):
            mixed = attend(self._linear(attn.qkv, norm(x), dtype), attn.num_heads)
            return self.ls1(self._linear(attn.proj, mixed, dtype))
        qkv = NormLinear.apply(x, norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias, norm.eps, dtype, self.cast)
        return ScaledLinear.apply(
            attend(qkv, attn.num_heads), attn.proj.weight, attn.proj.bias, _gamma(self.ls1), dtype, self.cast
        )

    def _feed_forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        norm: Any = self.norm2
        mlp: Any = self.mlp
        if self.plain:
            return self.ls2(mlp(norm(x)))
        if not _fusable(mlp.fc1, mlp.fc2):
            inner = self._linear(mlp.fc1, norm(x), dtype)
            return self.ls2(self._linear(mlp.fc2, swiglu(inner) if isinstance(mlp, GluMlp) else F.gelu(inner), dtype))
        inside = (norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias)
        if isinstance(mlp, GluMlp):
            both = NormLinear.apply(x, *inside, norm.eps, dtype, self.cast)
            return ScaledLinear.apply(swiglu(both), mlp.fc2.weight, mlp.fc2.bias, _gamma(self.ls2), dtype, self.cast)
        assert isinstance(mlp, Mlp)
        outside = (mlp.fc2.weight, mlp.fc2.bias, _gamma(self.ls2))
        return NormMLP.apply(x, *inside, *outside, norm.eps, dtype, self.cast)

    def _linear(self, layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A layer beside one that is not fusable, or that one itself: told the number format by autocast, as anywhere."""
        if isinstance(layer, nn.Linear) and _fusable(layer):
            return ScaledLinear.apply(x, layer.weight, layer.bias, None, dtype, self.cast)
        with torch.autocast(x.device.type, dtype, enabled=dtype not in (torch.float32, torch.float64)):
            return layer(x)


def _fusable(*layers: nn.Module) -> bool:
    """Whether all are plain Linear layers, whose weight is all there is to know; others (fake-quantized ones) are called."""
    return all(type(layer) is nn.Linear for layer in layers)


def _ordinary(attn: Any) -> bool:
    """Attention without the extras that timm offers."""
    return all(isinstance(getattr(attn, n, nn.Identity()), nn.Identity) for n in ("q_norm", "k_norm", "norm"))


def _gamma(scale: nn.Module) -> Tensor | None:
    """LayerScale's gamma; None for a block without it."""
    return getattr(scale, "gamma", None)


def set_widths(block: Any, dim: int, heads: int, head_dim: int, hidden: int, ffn: str) -> None:
    """Give a block of width `dim` new attention and feed-forward of these widths, as pruning leaves them: `heads` x `head_dim` need not be
    `dim`. Every number that timm's attention keeps of its shape is set by its own constructor.
    """
    block.attn = Attention(dim, heads, attn_head_dim=head_dim, qkv_bias=True)
    if ffn == "swiglu":
        block.mlp = SwiGLUPacked(dim, 2 * hidden, act_layer=nn.SiLU)
    else:
        block.mlp = Mlp(dim, hidden)
