"""A quick look at features while training goes on: kNN on a small part of the sets. For logs and curves, never for a choice or a claim."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distill.data.preprocess import Preprocess
from distill.encoder import Encoder
from distill.evaluate import knn
from distill.evaluate.config import EvaluateConfig
from distill.evaluate.split import align

if TYPE_CHECKING:
    from distill.data.sources import Source

GALLERY, TEST, BATCH = 4000, 2000, 64
HELD_BYTES = 2**29  # of preprocessed float32 images kept during training; fewer images at high resolutions


class QuickKnn:
    """kNN top-1 in percent of at most 2,000 test images on at most 4,000 gallery images, evenly spread over both sets.

    The preprocessed images are kept, so every further call costs only the encoder's passes.
    """

    def __init__(self, gallery: "Source", test: "Source", preprocess: Preprocess, config: EvaluateConfig):
        split = align(gallery, test)
        self.reason = split if isinstance(split, str) else None
        self.k = min(20, GALLERY)
        self.temperature = config.temperature
        if isinstance(split, str):
            return
        fitting = max(self.k, HELD_BYTES // (3 * preprocess.size**2 * 4) // 2)
        g, t = (_spread(len(x), min(n, fitting)) for x, n in ((split.gallery, GALLERY), (split.test, TEST)))
        self.gallery_labels, self.test_labels = split.gallery_labels[g], split.test_labels[t]
        self.k = min(self.k, len(g))
        self.gallery = _images(gallery, split.gallery[g], preprocess)
        self.test = _images(test, split.test[t], preprocess)

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """{"knn_top1": percent}, or nothing where there are no labels to compare."""
        if self.reason:
            return {}
        gallery, test = (torch.cat([encoder(x).cls for x in images.split(BATCH)]) for images in (self.gallery, self.test))
        predicted = knn.predict(gallery, self.gallery_labels, test, [self.k], self.temperature)[self.k]
        return {"knn_top1": 100 * (predicted == self.test_labels).double().mean().item()}


def _spread(n: int, most: int) -> Tensor:
    return torch.arange(n) if n <= most else torch.arange(most) * n // most


def _images(source: "Source", index: Tensor, preprocess: Preprocess) -> Tensor:
    return torch.from_numpy(np.stack([preprocess(source.image(int(i))) for i in index]))
