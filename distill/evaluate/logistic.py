"""Logistic regression on frozen CLS features: DINOv2's protocol on all images of a set, MSN's on a few images a class.

scikit-learn fits it (L-BFGS); what is here is which images it sees and how its strength is chosen.

Shape legend: G gallery images, M test images, D width, C classes.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.evaluate.knn import few_per_class, hold_out

STRENGTHS = tuple(
    10.0**power for power in range(-6, 6)
)  # DINOv2 takes 45 values from 1e-6 to 1e5, evenly spaced in the exponent
MAX_STEPS = 1000  # as DINOv2
TOLERANCE = 1e-6  # of the mean gradient's largest part
SMALL = (
    2**28
)  # multiply-adds of one step below which several threads cost more than they do (measured: a hundred times on a busy machine)
FEW_STRENGTH = 4000.0  # MSN's penalty of 0.00025 on half the squared norm, beside the sum of losses


@dataclass(frozen=True)
class Logistic:
    """Predicted labels int64 [M], the inverse penalty that was chosen, its accuracy in percent on the held-out part of the gallery, and
    whether the last fit ended before its limit of steps.
    """

    predicted: Tensor
    strength: float
    held_out_top1: float
    converged: bool


def logistic(
    gallery: Tensor, labels: Tensor, test: Tensor, seed: int, strengths: tuple[float, ...] = STRENGTHS
) -> Logistic | str:
    """As DINOv2's: no standardisation, no normalisation, float64, L2 penalty, C chosen on images of the gallery that are held out (a fifth;
    DINOv2: a tenth), then all of the gallery.

    gallery [G, D], labels int64 [G] (any integers), test [M, D]. The smallest C wins among equals. Returns the sentence why where there
    is no result.
    """
    kept, held = hold_out(labels.unique(return_inverse=True)[1], seed)
    if not len(held) or len(labels[kept].unique()) < 2:
        return f"A gallery of {len(labels)} images is too small to hold a part out for choosing the regression's penalty."
    x, y, asked = (t.numpy() for t in (gallery.double(), labels, test.double()))
    tried = {}
    search = _classifier(min(strengths), warm_start=True)  # each starts where the weaker one before it ended
    for strength in sorted(strengths):
        _fit(search.set_params(C=strength), x[kept], y[kept])
        tried[strength] = int((search.predict(x[held]) == y[held]).sum())
    best = max(tried, key=lambda c: (tried[c], -c))
    final = _fit(_classifier(best), x, y)
    predicted = torch.from_numpy(final.predict(asked).astype(np.int64))
    return Logistic(predicted, best, 100 * tried[best] / len(held), int(final.n_iter_.max()) < MAX_STEPS)


def few_shot(gallery: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, shots: int, draws: int, seed: int) -> Tensor:
    """float64 [M]: of `draws` drawings of `shots` images a class, the share after which a test image is classified right.

    Logistic regression on normalised features without intercept and with a fixed penalty, as MSN (arXiv 2204.07141) measures low-shot
    accuracy: so few images leave none to choose by.
    """
    x, asked = (_normalised(t) for t in (gallery, test))
    right = np.zeros(len(asked))
    for draw in range(draws):
        index = few_per_class(labels, shots, seed + draw)
        fitted = _fit(_classifier(FEW_STRENGTH, fit_intercept=False), x[index.numpy()], labels[index].numpy())
        right += fitted.predict(asked) == test_labels.numpy()
    return torch.from_numpy(right / draws)


def _normalised(x: Tensor) -> np.ndarray:
    """Each row to mean 0 and norm 1, as MSN; float64."""
    x = x.double()
    return F.normalize(x - x.mean(1, keepdim=True), dim=1).numpy()


def _classifier(strength: float, **more: Any) -> Any:
    from sklearn.linear_model import LogisticRegression  # here: `decant check` should not wait for scikit-learn

    return LogisticRegression(C=strength, **{"max_iter": MAX_STEPS, "tol": TOLERANCE} | more)


def _fit(classifier: Any, x: np.ndarray, y: np.ndarray) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # scikit-learn's own means

    small = x.size * len(np.unique(y)) < SMALL
    with warnings.catch_warnings(), threadpool_limits(1 if small else None):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the row says it, for the fit that counts
        return classifier.fit(x, y)
