"""Histograms of magnitudes in one pass, and the clipping points that calibrators choose from them."""

import numpy as np

from distill.errors import UserError
from export.quantizing.quantize_config import INT8, Grid, QuantizeConfig

BINS = 4096
EXPONENTS = {"mse": 2, "l3": 3}
KL_LEVELS = 128  # TensorRT's calibrator merges the kept bins into as many as int8 has magnitudes
KL_CANDIDATES = 128


class Histogram:
    """Counts of |x| in BINS equal bins over [0, range]; the range doubles by merging pairs of bins, so one pass is enough."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.range, self.peak = 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """Count more values, of any shape.

        Raises:
            UserError: one is not finite.
        """
        magnitudes = np.abs(values, dtype=np.float32).ravel()
        peak = float(magnitudes.max(initial=0.0))
        if not np.isfinite(peak):
            raise UserError(
                "An activation is not finite on the calibration images; train the model again or lower the learning rate."
            )
        self.peak = max(self.peak, peak)
        if self.range == 0.0 < peak:  # a power of two: the bins do not depend on the order of the images
            self.range = 2.0 ** np.ceil(np.log2(peak))
            self.counts[0] = self.counts.sum()
        while self.range < peak:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.range *= 2
        index = (magnitudes * np.float32(BINS / (self.range or 1.0))).astype(np.int32)  # exact: the range is a power of two
        self.counts += np.bincount(np.minimum(index, BINS - 1), minlength=BINS)

    def clip_point(self, config: QuantizeConfig, grid: Grid = INT8) -> float:
        """The magnitude that becomes the grid's largest value."""
        if self.peak == 0.0:
            return 1.0  # a dead input: any scale represents it
        if config.calibration == "minmax":
            return self.peak
        edges = np.arange(1, BINS + 1) * (self.range / BINS)
        if config.calibration == "percentile":
            index = np.searchsorted(np.cumsum(self.counts), self.counts.sum() * (config.percentile / 100))
            return min(float(edges[min(index, BINS - 1)]), self.peak)
        if config.calibration == "entropy":
            return min(self._entropy_point(), self.peak)
        centres = edges - self.range / BINS / 2
        candidates = self.peak * np.geomspace(1 / 64, 1, 193)
        rounded = grid.fake(np.broadcast_to(centres, (len(candidates), BINS)), candidates[:, None] / grid.high)
        errors = np.abs(rounded - centres) ** EXPONENTS[config.calibration]
        return float(candidates[np.argmin(errors @ self.counts)])

    def _entropy_point(self) -> float:
        """TensorRT's calibrator: of every kept range, P = its bins with what is cut off added to the last one, Q = P's bins
        merged into 128 levels, each spread evenly over its bins that are not empty; the range with the least KL(P || Q)."""
        counts = self.counts.astype(np.float64)
        last = int(np.flatnonzero(counts)[-1]) + 1
        if last <= KL_LEVELS:
            return last * self.range / BINS
        stops = np.unique(np.linspace(KL_LEVELS, last, KL_CANDIDATES).astype(int))
        divergences = [_divergence(counts[:stop], counts[stop:].sum()) for stop in stops]
        return float(stops[int(np.argmin(divergences))] * self.range / BINS)


def _divergence(kept: np.ndarray, cut: float) -> float:
    p = kept.copy()
    p[-1] += cut
    level = np.arange(len(kept)) * KL_LEVELS // len(kept)
    full = p > 0
    sums, sizes = np.bincount(level, kept, KL_LEVELS), np.bincount(level, full, KL_LEVELS)
    q = np.where(full, (sums / np.maximum(sizes, 1))[level], 0.0)
    if not q.sum():
        return np.inf
    p, q = p[full] / p.sum(), q[full] / q.sum()
    return float(np.sum(p * np.log(p / np.maximum(q, 1e-12))))
