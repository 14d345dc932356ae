"""Weights in another number format, made once per change instead of once per use."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

AT_ONCE = 2**18  # numbers of a slice of rows: 1 MiB in float32, which stays in a core's cache


class CastCache:
    """Copies of weights, scaled and cast, without gradient. A copy is made again after the weight changed (an in-place update raises a
    tensor's version).

    Attributes:
        enabled: off where a weight's storage is filled behind autograd's back (sharded parameters), since no version tells of it.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._scratch: dict[str, Tensor] = {}
        self._kept = WeakTensorKeyDictionary()  # weight -> (what the copy was made from, the copy)

    def __call__(self, weight: Tensor, dtype: torch.dtype, scale: Tensor | None = None, normed: bool = False) -> Tensor:
        """`weight` as `dtype`; its rows times `scale` (one number a row), and with `normed` divided by their norms."""
        weight = weight.detach() if not self.enabled else weight
        if scale is None and not normed and weight.dtype == dtype:
            return weight.detach()
        if not self.enabled:
            return _made(weight, dtype, scale, normed)
        stamp = (_stamp(weight), dtype, normed, None if scale is None else _stamp(scale))
        kept = self._kept.get(weight)
        if kept is None or kept[0] != stamp:
            kept = (stamp, _made(weight, dtype, scale, normed))
            self._kept[weight] = kept
        return kept[1]

    def scratch(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """A piece of memory for results that are used up at once, the same again every time: fresh pages would cost as much as the
        product that fills them. What it holds is anybody's.
        """
        size, kept = math.prod(shape), self._scratch.get(name)
        if kept is None or kept.numel() < size or kept.dtype != dtype or kept.device != like.device:
            kept = self._scratch[name] = torch.empty(size, dtype=dtype, device=like.device)
        return kept[:size].view(shape)

    def clear(self) -> None:
        self._kept.clear()
        self._scratch.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CastCache":
        return CastCache()  # a copied model has weights of its own

    def __reduce__(self) -> tuple:
        return CastCache, ()


def _stamp(x: Tensor) -> tuple[int, int]:
    return x._version, x.data_ptr()


@torch.no_grad()
def _made(weight: Tensor, dtype: torch.dtype, scale: Tensor | None, normed: bool) -> Tensor:
    if scale is None and not normed:
        return weight.to(dtype)
    rows = weight.flatten(1)
    scales = rows.new_ones(len(rows), 1) if scale is None else scale.view(-1, 1)
    made = torch.empty_like(rows, dtype=dtype)
    few = max(1, AT_ONCE // rows.shape[1])
    for out, part, s in zip(made.split(few), rows.split(few), scales.split(few), strict=True):
        out.copy_(part * (s / torch.linalg.vector_norm(part, dim=1, keepdim=True) if normed else s))
    return made.view(weight.shape)
