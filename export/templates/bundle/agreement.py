"""How much of what features are used for stays the same: numbers that inform, and fail nothing. numpy alone; Python 3.9 or newer.

A cosine says how far a vector moved, not whether anybody would notice. With a head, what counts is its answer; without one, which
patches are alike.
"""

import numpy as np

MOST = 2048  # patches that are compared with each other; of more, so many evenly spaced
TIE = 1e-5  # neighbours whose cosines differ by less are equally near


def neighbour_agreement(expected, got):
    """Share of patches whose nearest patch is the expected one: [n, N, D] twice -> 0..1.

    Nearest is the largest cosine to any other patch of all images. A patch that was as near as the nearest counts as expected.
    """
    d = expected.shape[-1]
    step = -(-expected.reshape(-1, d).shape[0] // MOST)
    near_mm, now_mm = (cosines(x.reshape(-1, d)[::step]) for x in (expected, got))
    rows = np.arange(len(near_mm))
    return float(np.mean(near_mm[rows, now_mm.argmax(1)] >= near_mm.max(1) - TIE))


def cosines(tokens):
    """[M, D] -> [M, M] between different tokens; -inf of a token with itself."""
    norms = np.linalg.norm(tokens, axis=1, keepdims=True)
    unit = (tokens / np.where(norms > 0, norms, 1)).astype(np.float32)
    found = unit @ unit.T
    np.fill_diagonal(found, -np.inf)
    return found


def top_agreement(expected, got):
    """How the likeliest classes agree: logits [..., K] twice -> shares of the expected first, and of the expected first five among
    its own first five (with more than five classes; with five they would always be the same).
    """
    k = expected.shape[-1]
    want, have = (np.argsort(-x.reshape(-1, k), axis=1, kind="stable") for x in (expected, got))
    found = {"items": len(want), "top1_agreement": float((want[:, 0] == have[:, 0]).mean())}
    if k > 5:
        found["top5_agreement"] = float(np.mean([np.isin(a, b).mean() for a, b in zip(want[:, :5], have[:, :5])]))  # noqa: B905
    return found


def head_agreement(kind, expected, got):
    """A head's answers for features of an artifact, against those for the expected features -> (numbers, a clause)."""
    if kind == "depth":
        off = np.abs(expected["metres"].astype(np.float64) - got["metres"])
        numbers = {"items": int(off.size), "mean_difference_m": float(off.mean()), "max_difference_m": float(off.max())}
        return numbers, f"off by at most {off.max():.2g} m"
    numbers = top_agreement(expected["logits"], got["logits"])
    five = f" top-5 {numbers['top5_agreement']:.1%}" if "top5_agreement" in numbers else ""
    return numbers, f"top-1 {numbers['top1_agreement']:.1%}{five}"
