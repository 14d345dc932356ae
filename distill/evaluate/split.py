"""Which images of a gallery and a test set are judged, and their labels brought to one numbering."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.sources import Source
from distill.evaluate.knn import few_per_class

ACCIDENTS = 0.01  # of the test items may be among the training items without anything being refused


@dataclass(frozen=True)
class Split:
    """Indices into gallery and test set, int64, and the labels there in the gallery's numbering.

    Attributes:
        left_out: test images without a label, or of a class that the gallery lacks.
        shared: test images that are in the gallery too, a few by accident.
    """

    gallery: Tensor
    gallery_labels: Tensor
    test: Tensor
    test_labels: Tensor
    left_out: int
    shared: int = 0

    def classes(self) -> int:
        return len(self.gallery_labels.unique())

    def conditions(self) -> dict[str, Any]:
        """What every row says about the images that were learned from and asked."""
        left_out = {"test_left_out": self.left_out} if self.left_out else {}
        shared = {"test_in_gallery": self.shared} if self.shared else {}
        return {"gallery_size": len(self.gallery), "classes": self.classes()} | left_out | shared


def shared_items(a: Any, b: Any) -> int:
    """How many items of the source `b` are items of `a` too, as far as that is cheap to know (see the sources' `shared_with`)."""
    key = a.fingerprint(), b.fingerprint()
    if key[0] == key[1]:
        return len(b)
    if (own := getattr(a, "shared_with", None)) is None:
        return 0
    if key not in _SHARED:
        _SHARED[key] = own(b)
    return _SHARED[key]


_SHARED: dict[tuple[str, str], int] = {}  # by fingerprints, for this process: every subject asks again


def overlap(gallery: Any, test: Any) -> str | None:
    """The sentence why two sets cannot be learned from and judged: they share items. None where they do not, or only the odd duplicate that
    real sets have (ACCIDENTS), which moves no accuracy beyond its interval; rows then say how many.
    """
    if gallery.fingerprint() == test.fingerprint():
        return f"Gallery and test set are the same images ({test.name}), each would find itself: name another test set."
    if (shared := shared_items(gallery, test)) <= ACCIDENTS * len(test):
        return None
    return (
        f"{shared:,} of the {len(test):,} items of the test set {test.name} are also in {gallery.name}, from which the answers come: name "
        "sets that share none (of one path, a smaller `limit` is the beginning of a larger one)."
    )


def align(gallery: Source, test: Source, shots: int = 0, seed: int = 0) -> Split | str:
    """Pair two sets, by class name where both have names, else by number; or the sentence why nothing can be judged.

    Args:
        shots: gallery images a class; 0 takes them all.
        seed: of the choice of shots.
    """
    numbers = gallery.labels(), test.labels()
    for role, source, labels in (("gallery", gallery, numbers[0]), ("test set", test, numbers[1])):
        if len(source) == 0:
            return f"The {role} {source.name} holds no image."
        if labels is None or not (labels >= 0).any():
            return f"The {role} {source.name} has no labels, and accuracy needs a labelled gallery and a labelled test set."
    if sentence := overlap(gallery, test):
        return sentence
    known, asked = (torch.from_numpy(np.array(labels, np.int64)) for labels in numbers)
    if gallery.classes and test.classes:
        by_name = {name: i for i, name in enumerate(gallery.classes)}
        asked = torch.tensor([*(by_name.get(name, -1) for name in test.classes), -1])[asked]  # the last entry serves label -1
    chosen = (known >= 0).nonzero().flatten()
    if shots:
        chosen = chosen[few_per_class(known[chosen], shots, seed)]
    present = known[chosen].unique()
    if len(present) < 2:
        return f"The gallery {gallery.name} has images of one class only, and accuracy needs at least two."
    judged = torch.isin(asked, present).nonzero().flatten()
    if len(judged) == 0:
        return f"No image of the test set {test.name} has a class of the gallery {gallery.name}."
    return Split(chosen, known[chosen], judged, asked[judged], len(asked) - len(judged), shared_items(gallery, test))
