"""Linear layers that compute as their quantized artifact will, and learn through the rounding: quantization-aware distillation.

The arithmetic is that of the exported graph's QuantizeLinear and DequantizeLinear: round half to even, zero point 0, scales in float32.

    int8   weights -127..127, a scale per output channel; activations -128..127 (where QuantizeLinear saturates), a scale per tensor
    w4     weights -7..7, a scale per output channel and block of BLOCK inputs; activations as they are

Gradients pass straight through the rounding inside the range and stop outside (Bengio et al., arXiv 1308.3432). Scales are fixed or
learned (LSQ, Esser et al., arXiv 1902.08153, section 2): d(s q)/ds = q - v inside, q outside, times 1/sqrt(n Q), for v = x/s,
q = round(v), n numbers of one scale and largest integer Q. What the optimiser moves is a scale's logarithm: a scale stays positive, and
Adam's steps are relative, whatever its size.

Shape legend: K inputs, O outputs, G blocks of inputs (1 for int8), ... any leading dimensions.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.cast_cache import AT_ONCE
from distill.errors import UserError
from distill.models.fused import sum_of_rows

Weights = Literal["int8", "w4"]
LEVELS: dict[str, int] = {"int8": 127, "w4": 7}
LOW, HIGH = -128, 127  # of activations
BLOCK = 32  # inputs that share a scale of 4-bit weights
FORMAT = "decant-quantization-1"
SHRINKS = torch.linspace(1.0, 0.4, 31)  # of a weight's largest magnitude: the clipping points that are tried
M = TypeVar("M", bound=nn.Module)


class FakeQuantLinear(nn.Linear):
    """x [..., K] -> [..., O]: a Linear layer with the quantization error of its artifact. In bf16 autocast, integers are exact and only the
    product is rounded.

    Attributes:
        weight, bias: in floating point, trained through the rounding.
        input_log_scale [1], weight_log_scale [O, G]: what is learned of the scales, log(scale / start).

    Args:
        layer: gives weight and bias (shared, not copied).
        weights: number format of the weights.
        input_scale: of activations, real = integer * scale; None leaves them in floating point.
        weight_scale: [O, G] (`least_squares_scale`).
        learn: whether scales are trained.
    """

    input_start: Tensor | None
    weight_start: Tensor

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, weights: Weights, input_scale: float | None, weight_scale: Tensor, learn: bool
    ):
        nn.Module.__init__(self)
        self._take(layer)
        device = layer.weight.device
        self.weights: Weights = weights
        self.block = block_of(weights, layer.weight[0].numel())
        self.register_buffer("input_start", None if input_scale is None else torch.tensor([input_scale], device=device))
        self.register_buffer("weight_start", weight_scale.detach().clone().to(device, torch.float32))
        # One number as [1]: a sharded model has no place for a scalar.
        self.input_log_scale = None if input_scale is None else nn.Parameter(torch.zeros(1, device=device), learn)
        self.weight_log_scale = nn.Parameter(torch.zeros_like(self.weight_start), learn)

    def _take(self, layer: Any) -> None:
        self.in_features, self.out_features = layer.weight[0].numel(), len(layer.weight)
        self.weight, self.bias = layer.weight, layer.bias

    def scales(self) -> tuple[Tensor | None, Tensor]:
        """(of the input [1] or None, of the weight [O, G]), differentiable."""
        weight = self.weight_start * self.weight_log_scale.exp()
        if self.input_start is None or self.input_log_scale is None:
            return None, weight
        return self.input_start * self.input_log_scale.exp(), weight

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        with torch.autocast(device, enabled=False):
            weight = self.weight.flatten(1)
            return QuantizedProduct.apply(x, weight, self.bias, *self.scales(), LEVELS[self.weights], self.block, dtype)

    def plain(self) -> nn.Module:
        """The layer in floating point, its weights on the grid of integers times scales."""
        return self._give(nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))

    @torch.no_grad()
    def _give(self, layer: Any) -> Any:
        flat = self.weight.flatten(1)
        _, scale = self.scales()
        snapped = _spread(scale, flat.shape[1], self.block) * _integers(flat, scale, LEVELS[self.weights], self.block)
        layer.weight = nn.Parameter(snapped.view_as(self.weight), self.weight.requires_grad)
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.weights}, activations={'float' if self.input_start is None else 'int8'}"


class FakeQuantPatches(FakeQuantLinear):
    """images [B, C, H, W] -> [B, O, h, w]: a convolution whose kernel covers each patch once is a Linear layer on patches."""

    def _take(self, layer: Any) -> None:
        super()._take(layer)
        self.kernel, self.conv = layer.kernel_size, (layer.in_channels, layer.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        (h, w), (rows, columns) = x.shape[-2:], self.kernel
        patches = F.unfold(x, self.kernel, stride=self.kernel).transpose(1, 2)  # [B, N, C rows columns]
        return super().forward(patches).transpose(1, 2).unflatten(2, (h // rows, w // columns))

    def plain(self) -> nn.Module:
        return self._give(nn.Conv2d(*self.conv, self.kernel, stride=self.kernel, bias=self.bias is not None, device="meta"))


class QuantizedProduct(torch.autograd.Function):
    """x [..., K], w [O, K] -> [..., O] in `dtype`, quantized; keeps x as it is and makes its integers again in the backward pass.

    Where one scale serves a whole row of the weight, the product is of integers, which bf16 holds exactly, and is scaled afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        x_scale: Tensor | None,
        w_scale: Tensor,
        levels: int,
        block: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, w, b, x_scale, w_scale)
        ctx.extra = (levels, block, dtype)
        left = x.to(dtype) if x_scale is None else _input_integers(x, x_scale, dtype)
        right, factor = _integers(w, w_scale, levels, block), x_scale
        if w_scale.shape[1] == 1:
            factor = w_scale[:, 0] if x_scale is None else w_scale[:, 0] * x_scale
        else:
            right = right.mul_(_spread(w_scale, w.shape[1], block))
        out = F.linear(left, right.to(dtype))
        if factor is None:
            return out if b is None else out.add_(b.to(dtype))
        factor = factor.expand(len(w))
        for part in _parts(out):
            part.copy_(part * factor if b is None else torch.addcmul(b, part.to(factor.dtype), factor))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        x, w, b, x_scale, w_scale = ctx.saved_tensors
        levels, block, dtype = ctx.extra
        flat, integers, spread = (
            grad.reshape(-1, len(w)),
            _integers(w, w_scale, levels, block),
            _spread(w_scale, w.shape[1], block),
        )
        left = x.to(dtype) if x_scale is None else _input_integers(x, x_scale, dtype)
        dw = (flat.T @ left.reshape(-1, left.shape[-1])).to(w.dtype)
        del left
        dx, d_x_scale = grad @ (integers * spread).to(dtype), None
        if x_scale is not None:
            dw = dw.mul_(x_scale)
            dx, d_x_scale = _through_rounding(dx, x, x_scale)
        v, d_w_scale = w / spread, None
        inside = v.abs() <= levels
        if ctx.needs_input_grad[4]:
            slopes = _blocks(dw * torch.where(inside, integers - v, integers), block).sum(2)
            d_w_scale = (slopes * _lsq(block, levels)).to(w_scale.dtype)
        db = None if b is None else sum_of_rows(flat).to(b.dtype)
        return dx.to(x.dtype), dw.mul_(inside), db, d_x_scale, d_w_scale, None, None, None


def _input_integers(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers of activations [..., K] as numbers of `dtype`."""
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    for part, values in zip(_parts(out), _parts(x), strict=True):
        part.copy_(_rounded(values, scale).clamp_(LOW, HIGH))
    return out


def _through_rounding(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [..., K] and of its scale [1] from that of the quantized x, which becomes the first."""
    total = scale.new_zeros(1)
    for g, values in zip(_parts(grad), _parts(x), strict=True):
        v = values / scale
        nearest, inside = v.round().clamp_(LOW, HIGH), (v >= LOW) & (v <= HIGH)
        slope = torch.where(inside, nearest - v, nearest)
        total += torch.dot(g.flatten().to(slope.dtype), slope.flatten())
        g.mul_(inside)
    return grad, total.mul_(_lsq(x[0].numel(), HIGH))


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Views of x [..., K] as rows [n, K]; on a CPU few at a time, so that one pass after the other finds them in the cache."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.split(max(1, AT_ONCE // rows.shape[1])) if x.device.type == "cpu" else (rows,)


def with_fake_quant(
    backbone: M,
    layers: Mapping[str, float | None],
    weights: Weights = "int8",
    learn_scales: bool = True,
    weight_scales: Mapping[str, Tensor] | None = None,
) -> M:
    """A copy of a backbone whose named layers are quantized as their artifact will be; `backbone` is left as it is.

    Args:
        layers: by module name (`blocks.0.attn.qkv`) the scale of its input, real = integer * scale; None for w4, which leaves
            activations in floating point.
        weight_scales: by name [O] or [O, G], where they are known; by default those of the least squared error.

    Raises:
        UserError: no layer, an unknown one, one that is no Linear layer or patch convolution, or a scale that is missing or not
            positive.
    """
    if not layers:
        raise UserError("Quantization-aware training got no layer to quantize; shorten quantize.keep.")
    other = copy.deepcopy(backbone)
    modules = dict(other.named_modules())
    possible = [name for name, module in modules.items() if _kind(module) is not None]
    for name, input_scale in layers.items():
        kind = _kind(modules[name]) if name in modules else None
        if kind is None:
            near = get_close_matches(name, possible, 1) or possible[:1]
            what = "is neither a Linear layer nor a patch convolution" if name in modules else "is no layer of this network"
            hint = f"; layers are called like {near[0]}" if near else ""
            raise UserError(f"Cannot quantize {name!r}: it {what}{hint}.")
        if weights == "w4" and input_scale is not None:
            raise UserError(f"{name}: w4 quantizes weights only, leave out the input's scale ({input_scale}).")
        if weights == "int8" and input_scale is None:
            raise UserError(f"{name}: int8 needs the scale of the layer's input; calibrate first.")
        if input_scale is not None and not (math.isfinite(input_scale) and input_scale > 0):
            raise UserError(f"{name}: the input's scale must be above 0 and finite, got {input_scale}; calibrate again.")
        layer: Any = modules[name]
        given = (weight_scales or {}).get(name)
        scale = least_squares_scale(layer.weight, weights) if given is None else _checked(name, given, layer.weight, weights)
        other.set_submodule(name, kind(layer, weights, input_scale, scale, learn_scales))
    return other


def strip(backbone: M) -> tuple[M, dict[str, Any]]:
    """(a copy in floating point with ordinary layers, the content of its `quantization.json`).

    Its weights are those that the trained student computed with, integers times scales, so that quantizing them with these scales gives
    the same integers in every number format, and what is exported is exactly what was trained.
    """
    other = copy.deepcopy(backbone)
    found: dict[str, Any] = {}
    weights: set[str] = set()
    for name, module in list(other.named_modules()):
        if isinstance(module, FakeQuantLinear):
            input_scale, weight_scale = module.scales()
            found[name] = {
                "input_scale": None if input_scale is None else input_scale.item(),
                "weight_scale": (weight_scale if module.weights == "w4" else weight_scale[:, 0]).tolist(),
            }
            weights.add(module.weights)
            other.set_submodule(name, module.plain())
    assert len(weights) == 1, f"a fake-quantized backbone has one format of weights, not {sorted(weights)}"
    return other, {"format": FORMAT, "weights": weights.pop(), "layers": found}


def fake_quant_layers(backbone: nn.Module) -> dict[str, FakeQuantLinear]:
    """The layers that compute as if quantized, by name."""
    return {name: module for name, module in backbone.named_modules() if isinstance(module, FakeQuantLinear)}


def block_of(weights: Weights, inputs: int) -> int:
    """How many inputs share a weight's scale; of w4 the last block may be shorter."""
    return min(BLOCK, inputs) if weights == "w4" else inputs


@torch.no_grad()
def least_squares_scale(weight: Tensor, weights: Weights) -> Tensor:
    """Scales [O, G] of weights [O, ...] with the least squared error among 31 clipping points between 0.4 and 1 times a block's largest
    magnitude. A block of zeros has scale 1.
    """
    flat = weight.detach().flatten(1).float()
    levels, block = LEVELS[weights], block_of(weights, flat.shape[1])
    blocks = _blocks(flat, block)
    peak = blocks.abs().amax(2)
    largest = torch.where(peak > 0, peak / levels, 1.0)
    best, least = largest, torch.full_like(largest, torch.inf)
    for shrink in SHRINKS.tolist():
        scale = largest * shrink
        wide = scale[:, :, None]
        error = ((blocks / wide).round_().clamp_(-levels, levels) * wide - blocks).square().sum(2)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _kind(module: nn.Module) -> type[FakeQuantLinear] | None:
    """What takes this layer's place; None for one that has no quantized form."""
    if type(module) is nn.Linear:
        return FakeQuantLinear
    if type(module) is nn.Conv2d and module.kernel_size == module.stride and module.groups == 1 and module.dilation == (1, 1):
        return FakeQuantPatches if module.padding in ((0, 0), "valid") else None
    return None


def _checked(name: str, scale: Tensor, weight: Tensor, weights: Weights) -> Tensor:
    inputs = weight[0].numel()
    shape = (len(weight), -(-inputs // block_of(weights, inputs)))
    scale = scale.detach().float()
    scale = scale[:, None] if scale.ndim == 1 else scale
    if scale.shape != shape:
        raise UserError(f"{name}: the weight's scales must be {list(shape)}, got {list(scale.shape)}; calibrate again.")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise UserError(f"{name}: the weight's scales must be above 0 and finite; calibrate again.")
    return scale


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round_()  # half to even; bf16 divides in the wider type of the scale


def _integers(w: Tensor, scale: Tensor, levels: int, block: int) -> Tensor:
    return _rounded(w, _spread(scale, w.shape[1], block)).clamp_(-levels, levels)


def _spread(scale: Tensor, inputs: int, block: int) -> Tensor:
    """Scales [O, G] at every weight [O, K]; with one block, [O, 1]."""
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(block, 1)[:, :inputs]


def _blocks(w: Tensor, block: int) -> Tensor:
    """[O, K] -> [O, G, block], zeros behind a shorter last block."""
    return F.pad(w, (0, -w.shape[1] % block)).unflatten(1, (-1, block))


def _lsq(n: int, levels: int) -> float:
    """LSQ's factor of a scale's gradient: with it, scales and weights move in proportion (section 2.2)."""
    return 1 / math.sqrt(n * levels)
