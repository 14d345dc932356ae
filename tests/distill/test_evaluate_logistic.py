"""Logistic regression is scikit-learn's on the same images, its strength chosen without the test set; few shots are averaged."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from distill.evaluate.knn import few_per_class, hold_out
from distill.evaluate.logistic import few_shot, logistic


def data(n: int, seed: int, dim: int = 8, classes: int = 4, separation: float = 1.0):
    centres = separation * torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    return centres[labels] + torch.randn(n, dim, generator=g), labels


def theirs(strength: float, x, y, asked, **more) -> np.ndarray:
    return LogisticRegression(C=strength, max_iter=5000, tol=1e-8, **more).fit(x, y).predict(asked)


def test_it_is_scikit_learns_with_the_strength_of_the_held_out_part():
    (x, y), (tx, _) = data(400, 0), data(300, 1)
    strengths = (1e-4, 1e-2, 1.0, 100.0)
    found = logistic(x, y, tx, 0, strengths)
    kept, held = hold_out(y, 0)
    a, b, c = (t.double().numpy() for t in (x[kept], x[held], x))
    tried = {s: (theirs(s, a, y[kept], b) == y[held].numpy()).mean() for s in strengths}
    assert found.strength == max(strengths, key=lambda s: (tried[s], -s))
    assert found.held_out_top1 == pytest.approx(100 * tried[found.strength])
    assert np.array_equal(found.predicted.numpy(), theirs(found.strength, c, y, tx.double().numpy()))
    assert found.converged


def test_labels_may_be_any_numbers():
    x, y = data(300, 0, separation=4.0)
    names = torch.tensor([900, 5, 17, -3])
    found = logistic(x, names[y], x, 0)
    assert found.predicted.dtype == torch.int64
    assert (found.predicted == names[y]).float().mean() > 0.95


def test_the_global_scale_matters_as_nothing_is_standardised():
    """Features a thousand times smaller want a strength a million times greater."""
    (x, y), (tx, _) = data(300, 0), data(100, 1)
    large = logistic(x, y, tx, 0, (1e-2,))
    small = logistic(x / 1000, y, tx / 1000, 0, (1e4,))
    assert torch.equal(large.predicted, small.predicted)


def test_a_tiny_gallery_is_a_sentence():
    x, _ = data(3, 0)
    assert "too small" in str(logistic(x[:2], torch.tensor([0, 1]), x, 0))
    assert "too small" in str(logistic(x, torch.tensor([0, 0, 1]), x, 0))


def test_few_shots_are_means_over_draws():
    (x, y), (tx, ty) = data(200, 0), data(60, 1)
    found = few_shot(x, y, tx, ty, 2, 3, seed=5)

    def prepared(t):
        t = (t - t.mean(1, keepdim=True)).double()
        return (t / t.norm(dim=1, keepdim=True)).numpy()

    right = np.zeros(60)
    for seed in (5, 6, 7):
        index = few_per_class(y, 2, seed)
        assert len(index) == 8
        said = theirs(4000.0, prepared(x)[index], y[index], prepared(tx), fit_intercept=False)
        right += said == ty.numpy()
    # The fits stop a little apart: an image on the border may fall to the other side.
    assert np.abs(found.numpy() - right / 3).mean() < 0.02
    assert set(np.round(found.numpy() * 3, 6)) <= {0.0, 1.0, 2.0, 3.0}
    assert found.mean() > 0.4
    assert torch.equal(found, few_shot(x, y, tx, ty, 2, 3, seed=5))
    assert few_shot(x, y, tx, ty, 20, 3, seed=5).mean() > found.mean()
