"""From a weight matrix [K, N] to codes on a grid: scales per output channel or per block of inputs, and how to round.

Shape legend: K input channels, N output channels, n rows (tokens) of calibration inputs.
"""

import numpy as np
import torch

from export.quantizing.quantize_config import Grid

CLIPS = np.linspace(0.4, 1.0, 31)  # of the largest magnitude, tried by `mse`
DAMPING = 0.01  # of the mean diagonal, added to the second moments (GPTQ's choice)
BLOCK = 64  # input channels whose errors are made good at once


def weight_scales(weight: np.ndarray, grid: Grid, method: str, block: int | None = None) -> np.ndarray:
    """Scales of a weight [K, N]: [N], or with `block` [K / block, N]. `method` is `minmax` or `mse`."""
    groups = weight[None] if block is None else weight.reshape(-1, block, weight.shape[1])
    peak = np.abs(groups).max(1)
    full = np.where(peak > 0, peak, 1.0) / grid.high
    if method == "minmax":
        return full[0] if block is None else full
    best, least = full.copy(), np.full(full.shape, np.inf)
    for clip in CLIPS:
        scale = full * clip
        error = ((grid.fake(groups, scale[:, None]) - groups) ** 2).sum(1)
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best[0] if block is None else best


def spread(scale: np.ndarray, rows: int) -> np.ndarray:
    """Scales [N] or [K / block, N] as [K, N]-broadcastable."""
    return scale[None] if scale.ndim == 1 else np.repeat(scale, rows // len(scale), 0)


def round_nearest(weight: np.ndarray, scale: np.ndarray, grid: Grid) -> np.ndarray:
    """Codes [K, N] (as floats) nearest to weight / scale."""
    return grid.round(weight / spread(scale, len(weight)))


def round_compensated(
    weight: np.ndarray, scale: np.ndarray, grid: Grid, second: np.ndarray, damping: float = DAMPING
) -> np.ndarray:
    """Codes [K, N] rounded one input channel at a time, largest variance first; each channel's error is spread over those to
    come so that the outputs on inputs with these second moments [K, K] change least (GPTQ, arXiv 2210.17323, algorithm 1)."""
    order = np.argsort(-np.diag(second), kind="stable")
    full = np.broadcast_to(spread(scale, len(weight)), weight.shape)[order]
    left = weight[order].astype(np.float64)
    upper = _inverse_factor(_damped(second, damping)[np.ix_(order, order)])
    codes = np.empty_like(left)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = np.empty((stop - start, left.shape[1]))
        for k in range(start, stop):
            codes[k] = grid.round(left[k] / full[k])
            errors[k - start] = (left[k] - codes[k] * full[k]) / upper[k, k]
            left[k + 1 : stop] -= upper[k, k + 1 : stop, None] * errors[k - start]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    out = np.empty_like(codes)
    out[order] = codes
    return out


def _inverse_factor(matrix: np.ndarray) -> np.ndarray:
    """Upper U with U^T U = matrix^-1; its row k holds how channel k's error is shared by the channels after it.

    Read backwards, matrix = L L^T is R R^T with an upper R, and U = R^-1: no inverse of the whole matrix is taken.
    """
    factor = torch.linalg.cholesky(torch.from_numpy(np.ascontiguousarray(matrix[::-1, ::-1])))
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
    return np.ascontiguousarray(inverse.numpy()[::-1, ::-1])


def _damped(second: np.ndarray, damping: float) -> np.ndarray:
    diagonal = np.diag(second)
    return second + np.eye(len(second)) * max(damping * float(diagonal.mean()), 1e-12)
