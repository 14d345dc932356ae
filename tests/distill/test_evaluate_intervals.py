"""Intervals against independent computations: scipy, brute-force likelihoods, coverage by simulation."""

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, norm

from distill.evaluate.intervals import agreement, paired, tango, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 7), (1500, 2000), (1, 1)])
def test_wilson_is_scipys(k, n):
    ours = [float(v) / 100 for v in wilson(k, n)]
    theirs = binomtest(k, n).proportion_ci(method="wilson")
    assert ours == pytest.approx([theirs.low, theirs.high], abs=1e-12)


def test_wilson_takes_arrays_and_knows_nothing_without_samples():
    low, high = wilson(np.array([0, 5, 10]), np.array([0, 10, 10]))
    assert low.shape == (3,)
    assert (low[0], high[0]) == (0, 100)
    assert low[2] > low[1]
    assert high[2] == 100


def score(b: int, c: int, n: int, d: float) -> float:
    """Tango's statistic with the likelihood maximised numerically over the share of `lost`."""

    def minus_log_likelihood(q):
        cells = ((b, q + d), (c, q), (n - b - c, 1 - 2 * q - d))
        return -sum(count * np.log(max(p, 1e-300)) for count, p in cells if count)

    bounds = (max(0.0, -d) + 1e-12, (1 - d) / 2 - 1e-12)
    q = minimize_scalar(minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
    return (b - c - n * d) / np.sqrt(n * (2 * q + d - d * d))


@pytest.mark.parametrize(("b", "c", "n"), [(150, 86, 1600), (12, 2, 44), (0, 5, 60), (30, 30, 5000)])
def test_tango_by_numerical_likelihood(b, c, n):
    low, high = (float(v) / 100 for v in tango(b, c, n))
    z, point = norm.ppf(0.975), (b - c) / n
    assert low == pytest.approx(brentq(lambda d: score(b, c, n, d) - z, -0.9, point), abs=1e-5)
    assert high == pytest.approx(brentq(lambda d: score(b, c, n, d) + z, point, 0.9), abs=1e-5)


def test_paired_agrees_with_a_bootstrap_and_with_mcnemar():
    rng = np.random.default_rng(0)
    b = rng.random(3000) < 0.7
    a = np.where(rng.random(3000) < 0.1, rng.random(3000) < 0.9, b)
    found = paired(a, b)
    difference = a.astype(float) - b
    index = rng.integers(0, 3000, (2000, 3000))
    low, high = np.percentile(100 * difference[index].mean(1), [2.5, 97.5])
    assert found.difference == pytest.approx(100 * difference.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.12)
    assert found.p == pytest.approx(binomtest(found.gained, found.gained + found.lost).pvalue, rel=1e-9)
    swapped = paired(b, a)
    assert (swapped.difference, swapped.low, swapped.high) == pytest.approx((-found.difference, -found.high, -found.low))


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(1)
    b = rng.random(2000) < 0.7
    a = b.copy()
    a[:40] = True
    found = paired(a, b)
    halves = [(high - low) / 2 for low, high in (wilson(int(v.sum()), 2000) for v in (a, b))]
    assert found.high - found.low < 0.5 * 2 * np.hypot(*halves)
    assert found.low <= found.difference <= found.high


def test_no_disagreement_is_not_certainty():
    right = np.ones(50, bool)
    found = paired(right, right)
    assert (found.difference, found.p) == (0, 1)
    assert found.low == pytest.approx(-found.high)
    assert 3 < found.high < 10
    assert paired(np.ones(5000, bool), np.ones(5000, bool)).high < 0.1


def test_paired_interval_covers():
    rng = np.random.default_rng(2)
    counts = rng.multinomial(200, [0.12, 0.06, 0.82], 4000)
    low, high = tango(counts[:, 0], counts[:, 1], 200)
    assert 0.935 < ((low <= 6) & (high >= 6)).mean() < 0.965


def test_agreement():
    assert agreement(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4])) == 75
