"""Nearest neighbours in feature space, by DINO's protocol: cosine, weights softmax(similarity / 0.07), several k at once.

Shape legend: G gallery images, M test images, K neighbours, C classes, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 2**25  # similarities held at once: 128 MiB


@dataclass(frozen=True)
class Neighbours:
    """The max(k) nearest gallery images of each test image, nearest first: similarities and labels, both [M, K]."""

    sims: Tensor
    labels: Tensor


def neighbours(gallery: Tensor, labels: Tensor, test: Tensor, k: int) -> Neighbours:
    """[G, D], int64 [G], [M, D] -> the k nearest by cosine; among equal similarities the lower gallery index comes first."""
    assert k <= len(gallery)
    gallery, test = (F.normalize(x.float(), dim=1, eps=1e-12) for x in (gallery, test))
    rows = max(1, CHUNK_ELEMENTS // len(gallery))
    found = [_top(chunk @ gallery.T, k) for chunk in test.split(rows)]
    sims = torch.cat([s for s, _ in found]) if found else test.new_zeros(0, k)
    index = torch.cat([i for _, i in found]) if found else torch.zeros(0, k, dtype=torch.int64)
    return Neighbours(sims, labels[index])


def _top(sims: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row with their columns, largest first, the lower column first among equals."""
    values, index = sims.topk(k, dim=1)
    # topk may choose any of those that tie with the k-th: such rows are sorted in full.
    ambiguous = ((sims >= values[:, -1:]).sum(1) > k).nonzero().flatten()
    if len(ambiguous):
        index[ambiguous] = sims[ambiguous].sort(dim=1, descending=True, stable=True).indices[:, :k]
    index = index.sort(dim=1).values
    order = sims.gather(1, index).sort(dim=1, descending=True, stable=True)
    return order.values, index.gather(1, order.indices)


def votes(found: Neighbours, ks: list[int], temperature: float, classes: int) -> dict[int, Tensor]:
    """Scores [M, C] for each k: the sum over the first k neighbours of their weight.

    The weights are a softmax over ALL neighbours found, as in the reference: scores of a smaller k do not sum to 1.
    """
    assert max(ks) <= found.sims.shape[1]
    weights = (found.sims / temperature).softmax(1)
    empty = weights.new_zeros(len(weights), classes)
    return {k: empty.scatter_add(1, found.labels[:, :k], weights[:, :k]) for k in ks}


def predict(gallery: Tensor, labels: Tensor, test: Tensor, ks: list[int], temperature: float) -> dict[int, Tensor]:
    """Predicted labels int64 [M] for each k; among equal scores the lowest label wins."""
    found = neighbours(gallery, labels, test, max(ks))
    scores = votes(found, ks, temperature, int(labels.max()) + 1)
    return {k: s.argmax(1) for k, s in scores.items()}


def choose_k(gallery: Tensor, labels: Tensor, kept: Tensor, held: Tensor, ks: list[int], temperature: float) -> int:
    """The k that classifies the gallery's held-out part best from the kept part; the smallest among equals.

    Test images take no part. A k above the kept part's size cannot be tried and is not chosen; if none can, the smallest is.
    """
    possible = sorted(k for k in ks if k <= len(kept))
    if not possible or not len(held):
        return min(ks)
    predicted = predict(gallery[kept], labels[kept], gallery[held], possible, temperature)
    right = {k: int((p == labels[held]).sum()) for k, p in predicted.items()}
    return max(possible, key=lambda k: (right[k], -k))


def hold_out(labels: Tensor, seed: int, every: int = 5) -> tuple[Tensor, Tensor]:
    """Indices (kept, held) of a seeded split of the gallery, one image of `every` held out, spread evenly over the classes."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].sort(stable=True).indices]
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    is_held[by_class[every // 2 :: every]] = True
    return (~is_held).nonzero().flatten(), is_held.nonzero().flatten()


def few_per_class(labels: Tensor, n_per_class: int, seed: int) -> Tensor:
    """Indices of `n_per_class` images of each class (all of a smaller one), classes ascending: the reference's few shots."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:n_per_class]])
    return torch.cat(chosen)
