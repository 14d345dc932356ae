"""kNN against brute force in numpy, ties, chunks, and the choice of k without test images."""

import numpy as np
import pytest
import torch

from distill.evaluate import knn


def clusters(n: int, classes: int = 4, dim: int = 12, seed: int = 0, spread: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=g)
    return centres[labels] + spread * torch.randn(n, dim, generator=g), labels


def brute_force(gallery, labels, test, k, all_k, temperature):
    """Predictions by the definition, in float64, one image at a time."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (gallery.double().numpy(), test.double().numpy())]
    said = []
    for x in unit[1]:
        sims = unit[0] @ x
        order = np.lexsort((np.arange(len(sims)), -sims))[:all_k]
        weights = np.exp(sims[order] / temperature)
        weights /= weights.sum()
        scores = np.zeros(int(labels.max()) + 1)
        for i, w in list(zip(order, weights, strict=True))[:k]:
            scores[labels[i]] += w
        said.append(int(scores.argmax()))
    return said


def test_equals_brute_force():
    gallery, labels = clusters(300)
    test, _ = clusters(80, seed=1)
    ours = knn.predict(gallery, labels, test, [1, 5, 20, 100], 0.07)
    for k, predicted in ours.items():
        assert predicted.tolist() == brute_force(gallery, labels, test, k, 100, 0.07)


def test_equals_sklearn():
    from sklearn.neighbors import KNeighborsClassifier

    gallery, labels = clusters(400, spread=1.5)
    test, _ = clusters(150, seed=3, spread=1.5)
    weigh = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731 (cosine distance back to similarity)
    model = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weigh).fit(gallery, labels)
    assert knn.predict(gallery, labels, test, [20], 0.07)[20].tolist() == model.predict(test).tolist()


def test_ties_go_to_the_lower_index_whatever_the_chunks(monkeypatch):
    """Every gallery image four times: the boundary of k = 6 falls inside a group of equals."""
    base, _ = clusters(40)
    gallery, labels = base.repeat(4, 1), torch.arange(160) % 7
    found = knn.neighbours(gallery, labels, base, 6)
    nearest = torch.nn.functional.normalize(base) @ torch.nn.functional.normalize(base).T
    second = nearest.fill_diagonal_(-2).argmax(1)
    expected = torch.stack([torch.arange(40) + 40 * i for i in range(4)] + [second, second + 40], 1)
    assert torch.equal(found.labels, labels[expected])
    monkeypatch.setattr(knn, "CHUNK_ELEMENTS", 160 * 3)
    assert torch.equal(knn.neighbours(gallery, labels, base, 6).labels, found.labels)


def test_equal_votes_go_to_the_lower_label():
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert knn.predict(gallery, torch.tensor([3, 1]), torch.tensor([[2.0, 0.0]]), [2], 0.07)[2].tolist() == [1]


def test_zero_vector_gives_no_nan():
    gallery, labels = clusters(50)
    found = knn.neighbours(gallery, labels, torch.zeros(1, 12), 5)
    assert found.sims.tolist() == [[0.0] * 5]


def test_hold_out_is_a_stratified_fifth():
    labels = torch.tensor([0] * 500 + [1] * 50 + [2] * 5)[torch.randperm(555)]
    kept, held = knn.hold_out(labels, seed=0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(555))
    assert torch.bincount(labels[held], minlength=3).tolist() == pytest.approx([100, 10, 1], abs=1)
    assert torch.equal(held, knn.hold_out(labels, seed=0)[1])
    assert not torch.equal(held, knn.hold_out(labels, seed=1)[1])


def test_k_is_chosen_by_the_gallery():
    """A few mislabelled images make a small k bad; small classes make a large k bad."""
    gallery, labels = clusters(400, classes=4, spread=0.3)
    noisy = labels.clone()
    wrong = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:140]
    noisy[wrong] = (noisy[wrong] + 1) % 4
    kept, held = knn.hold_out(noisy, 0)
    assert knn.choose_k(gallery, noisy, kept, held, [1, 40], 0.07) == 40
    few, few_labels = clusters(400, classes=60, dim=12, spread=0.4)
    kept, held = knn.hold_out(few_labels, 0)
    assert knn.choose_k(few, few_labels, kept, held, [1, 300], 10.0) == 1


def test_k_that_cannot_be_tried_is_not_chosen():
    gallery, labels = clusters(20)
    kept, held = knn.hold_out(labels, 0)
    assert knn.choose_k(gallery, labels, kept, held, [5, 18, 20], 0.07) == 5
    assert knn.choose_k(gallery, labels, kept, held, [18, 20], 0.07) == 18


def test_few_per_class():
    labels = torch.tensor([5, 2, 2, 5, 5, 9])
    chosen = knn.few_per_class(labels, 2, seed=0)
    assert labels[chosen].tolist() == [2, 2, 5, 5, 9]
    assert len(chosen.unique()) == 5
