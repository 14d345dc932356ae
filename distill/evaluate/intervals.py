"""How sure an accuracy is, or the difference of two on the same images. Closed forms and a bisection, nothing random.

Inputs are counts or booleans per image, results percent (accuracies) or percent points (differences), at 95 % unless told.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95


def wilson(successes: np.ndarray | int, n: np.ndarray | int, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval (1927) of a binomial share, in percent; broadcasts. (0, 100) for n = 0: nothing is known."""
    k, total = np.asarray(successes, np.float64), np.asarray(n, np.float64)
    assert np.all((k >= 0) & (k <= total))
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    safe = np.maximum(total, 1)
    share = k / safe
    centre = share + z2 / (2 * safe)
    half = np.sqrt(z2 * (share * (1 - share) / safe + z2 / (4 * safe**2)))
    low, high = (centre - half) / (1 + z2 / safe), (centre + half) / (1 + z2 / safe)
    # At the ends rounding would leave 1e-18 where the formula gives 0 (or 1).
    low, high = np.where(k == 0, 0.0, low), np.where(k == total, 1.0, high)
    return 100 * low, 100 * high


@dataclass(frozen=True)
class Paired:
    """a minus b on the same n images.

    Attributes:
        difference, low, high: percent points, with Tango's interval.
        gained: images right in a and wrong in b. lost: the other way round.
        p: exact two-sided McNemar p-value of "no difference".
    """

    difference: float
    low: float
    high: float
    n: int
    gained: int
    lost: int
    p: float


def paired(a: np.ndarray, b: np.ndarray, level: float = LEVEL) -> Paired:
    """Difference of two accuracies measured on the same images: `a`, `b` bool [n], right or wrong per image, same order.

    Images on which both agree carry no information about the sign but all about the size: pairing makes the interval as narrow
    as the disagreement is rare, and (unlike a bootstrap) it does not shrink to zero width where no image differs.
    """
    from scipy.special import bdtr  # here: `decant check` reads these modules and should not wait for scipy

    assert a.shape == b.shape == (len(a),)
    assert len(a) > 0
    gained, lost, n = int((a & ~b).sum()), int((b & ~a).sum()), len(a)
    low, high = tango(gained, lost, n, level)
    p = min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))
    return Paired(100 * (gained - lost) / n, float(low), float(high), n, gained, lost, p)


def tango(
    gained: np.ndarray | int, lost: np.ndarray | int, n: np.ndarray | int, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """Score interval of a paired difference of shares (Tango, Statistics in Medicine 17, 1998), in percent points; broadcasts.

    The limits are the differences d at which the score statistic
        (gained - lost - n d) / sqrt(n (2 q + d (1 - d)))
    equals +z and -z; q is the likeliest share of `lost` images given d, the root of a quadratic. The statistic falls with d, so
    bisection finds both limits.
    """
    b, c, total = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (gained, lost, n)))
    z = NormalDist().inv_cdf(0.5 + level / 2)

    def statistic(d: np.ndarray) -> np.ndarray:
        linear = -b - c + (2 * total - b + c) * d
        q = (np.sqrt(np.maximum(linear**2 + 8 * total * c * d * (1 - d), 0)) - linear) / (4 * total)
        return (b - c - total * d) / np.sqrt(np.maximum(total * (2 * q + d * (1 - d)), 1e-300))

    limits = []
    for wanted in (z, -z):
        below, above = np.full(b.shape, -1.0), np.full(b.shape, 1.0)
        for _ in range(60):
            middle = (below + above) / 2
            high_enough = statistic(middle) >= wanted
            below, above = np.where(high_enough, middle, below), np.where(high_enough, above, middle)
        limits.append(100 * (below + above) / 2)
    return limits[0], limits[1]


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share in percent of entries that are equal: two models' predictions, or two correctness vectors."""
    assert a.shape == b.shape
    assert a.size > 0
    return 100 * float(np.mean(a == b))
