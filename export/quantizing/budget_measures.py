"""What the budget's search asks of an artifact: its cosine to full precision (cheap), points of accuracy lost (dear), latency."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from distill.data.preprocess import Preprocess
from distill.data.sources import Source, checked
from distill.encoder import Encoder, Features
from distill.errors import UserError
from distill.evaluate import knn, linear
from distill.evaluate.config import EvaluateConfig
from distill.evaluate.features import FeatureSet, Images, extract, labels_of
from distill.evaluate.intervals import paired
from distill.evaluate.store import FeatureStore, Wish, identity
from distill.progress import Progress
from export.benchmark import BenchmarkConfig, Case, time_batch
from export.fingerprint import usable_threads
from export.quantizing.budget import BudgetConfig, BudgetResult, Kept, Measured
from export.stopwatch import timing

BATCH = 16
TIMED = 6  # artifacts of a curve whose latency is measured


@dataclass(frozen=True)
class Candidate:
    """An artifact built with some layers kept: opened on its runtime, and the size of its file."""

    encoder: Encoder
    size_bytes: int


Make = Callable[[Kept], Candidate]


class Measures:
    """The `measure` of `budget.search`: builds the artifact and compares it with the full-precision one.

    Args:
        make: kept layers -> Candidate.
        reference: the full-precision artifact, on the same runtime if possible.
        images: training images [n, 3, H, W] float32, preprocessed, that did not calibrate; every other one is left for `confirm`.
        loss: measures points; needed where the budget asks for them.
    """

    def __init__(
        self, config: BudgetConfig, make: Make, reference: Encoder, images: Tensor, loss: "GalleryLoss | None" = None
    ) -> None:
        assert len(images) >= 2
        assert loss is not None or not (config.asked().keys() - {"cosine_min"})
        self.config, self.make, self.loss = config, make, loss
        self.searched, self.held = (_Compared.with_(reference, part) for part in (images[::2], images[1::2]))

    def cosine(self, kept: Kept) -> Measured:
        """The cheap part: what `sensitivity` needs."""
        return self._measured(self.make(kept), self.searched)

    def confirm(self, kept: Kept) -> Measured:
        """The cheap part on the images that the search does not see: the `confirm` of `budget.search`."""
        return self._measured(self.make(kept), self.held)

    def of(self, candidate: Candidate) -> Measured:
        """The cheap part for an artifact that was made otherwise."""
        return self._measured(candidate, self.searched)

    def __call__(self, kept: Kept) -> Measured:
        """All that the budget asks for; accuracy only where the cosine is good enough."""
        candidate = self.make(kept)
        measured = self._measured(candidate, self.searched)
        least = self.config.cosine_min
        enough = measured["cosine_min"] is not None and (least is None or measured["cosine_min"] >= least)
        return measured | (self.loss(candidate.encoder) if self.loss is not None and enough else {})

    def _measured(self, candidate: Candidate, compared: "_Compared") -> Measured:
        """Over every vector of both outputs, CLS and patches; None where one is not finite."""
        values = compared.cosines(candidate.encoder)
        finite = bool(values.isfinite().all())
        return {
            "cosine_min": float(values.min()) if finite else None,
            "cosine_mean": float(values.mean()) if finite else None,
            "size_mb": candidate.size_bytes / 1e6,
        }


@dataclass(frozen=True)
class _Compared:
    """Images, and what the full-precision artifact makes of them, batch by batch."""

    images: Tensor
    wanted: list[Features]

    @staticmethod
    def with_(reference: Encoder, images: Tensor) -> "_Compared":
        return _Compared(images, [reference(x) for x in images.split(BATCH)])

    def cosines(self, encoder: Encoder) -> Tensor:
        """Of all vectors, CLS and patches alike: [n]."""
        found = []
        for x, wanted in zip(self.images.split(BATCH), self.wanted, strict=True):
            got = encoder(x)
            for a, b in ((wanted.cls, got.cls), (wanted.patches, got.patches)):
                found.append(F.cosine_similarity(a.double(), b.double(), dim=-1, eps=1e-12).flatten())
        return torch.cat(found)


class GalleryLoss:
    """Points of top-1 accuracy that an encoder loses against the full-precision one, inside the labelled gallery.

    kNN: every image is asked among all others (leave one out), which is as many questions as the features that were computed
    can answer. The linear probe is trained on four fifths and asked the rest. Both encoders answer the same questions, so the
    interval is the paired one. The test set takes no part.

    Args:
        evaluate: the protocol: ks, temperature, probe, seed. k is the one with which the full-precision features do best.
        reference: called once, over all images.
        weights, folder: hash of the reference and where its features are stored; without them a killed search repeats them.

    Raises:
        UserError: the gallery has no labels, or of one class only.
    """

    def __init__(
        self,
        config: BudgetConfig,
        evaluate: EvaluateConfig,
        gallery: Source,
        preprocess: Preprocess,
        reference: Encoder,
        progress: Progress,
        weights: str | None = None,
        folder: Path | None = None,
    ) -> None:
        source = checked(gallery, progress)
        labels = source.labels()
        known = np.zeros(0, np.int64) if labels is None else np.flatnonzero(np.asarray(labels) >= 0)
        if labels is None or len(np.unique(np.asarray(labels)[known])) < 2:
            raise UserError(
                f"The budget asks for accuracy, and the gallery {source.name} has no labels of two classes: name a labelled "
                "data.gallery, or give the budget cosine_min only."
            )
        spread = known[np.arange(min(config.gallery, len(known))) * len(known) // min(config.gallery, len(known))]
        self.images = Images(_Some(source, spread), preprocess)
        self.labels = torch.from_numpy(np.asarray(labels, np.int64)[spread])
        self.config, self.evaluate, self.progress = config, evaluate, progress
        self.reference, self.weights, self.folder = reference, weights, folder

    def about(self) -> dict[str, Any]:
        """What the points depend on besides the artifacts: a part of the ledger's identity."""
        protocol = self.evaluate.model_dump(include={"ks", "temperature", "seed", "batch"})
        return {"gallery": self.images.fingerprint, "images": len(self.images), **protocol}

    def __call__(self, encoder: Encoder) -> Measured:
        """{"knn_points", "knn_low", "knn_high", "knn_agreement", ...}: points lost, with the paired 95 % interval."""
        features = _finite(extract(encoder, self.images, self.evaluate.batch, self.progress, "budget: features"))
        found: Measured = {"gallery_images": len(self.labels)}
        if self.config.knn_points is not None:
            mine = self._knn_right(features, [self.k])[self.k]
            found |= _lost("knn", mine, self._reference_knn[self.k]) | {"k": self.k}
        if self.config.linear_points is not None:
            found |= _lost("linear", self._linear_right(features), self._reference_linear)
        return found

    @cached_property
    def k(self) -> int:
        """Of the settings' k the one with which the full-precision features do best, the smallest among equals."""
        right = self._reference_knn
        return max(sorted(right), key=lambda k: (int(right[k].sum()), -k))

    @cached_property
    def _reference_features(self) -> FeatureSet:
        batch, title = self.evaluate.batch, "budget: features at full precision"
        if not (self.weights and self.folder):
            return _finite(extract(self.reference, self.images, batch, self.progress, title))
        what = identity(self.weights, "reference", self.images, batch)
        kept = FeatureStore(self.folder).features(what, Wish(), self.images, lambda: self.reference, self.progress, title)
        cls, mean_patch = (torch.from_numpy(np.array(a[-1])) for a in (kept.stored.cls, kept.stored.mean_patch))
        return _finite(FeatureSet(cls, mean_patch, labels_of(self.images), self.images.name, self.images.fingerprint))

    @cached_property
    def _reference_knn(self) -> dict[int, np.ndarray]:
        fitting = [k for k in self.evaluate.ks if k < len(self.labels)] or [min(len(self.labels) - 1, min(self.evaluate.ks))]
        return self._knn_right(self._reference_features, fitting)

    @cached_property
    def _reference_linear(self) -> np.ndarray:
        return self._linear_right(self._reference_features)

    def _knn_right(self, features: FeatureSet, ks: list[int]) -> dict[int, np.ndarray]:
        predicted = leave_one_out(features.cls, self.labels, ks, self.evaluate.temperature)
        return {k: (p == self.labels).numpy() for k, p in predicted.items()}

    def _linear_right(self, features: FeatureSet) -> np.ndarray:
        kept, held = knn.hold_out(self.labels, self.evaluate.seed)
        outcome = linear.probe(features.at(kept), self.labels[kept], features.at(held), self.evaluate.probe())
        if isinstance(outcome, str):
            raise UserError(f"The budget's linear_points cannot be measured: {outcome}")
        return (outcome.predicted == self.labels[held]).numpy()


def leave_one_out(features: Tensor, labels: Tensor, ks: Sequence[int], temperature: float) -> dict[int, Tensor]:
    """Features [G, D], labels int64 [G] -> for each k the label int64 [G] that the others' votes give every image."""
    assert max(ks) < len(features)
    found = knn.neighbours(features, torch.arange(len(features)), features, max(ks) + 1)  # the "labels" are positions
    others = found.labels != torch.arange(len(features))[:, None]
    others[others.all(1), -1] = False  # equal twins crowded the image itself out: the last one goes instead
    shape = len(features), max(ks)
    without = knn.Neighbours(found.sims[others].view(shape), labels[found.labels[others]].view(shape))
    scores = knn.votes(without, list(ks), temperature, int(labels.max()) + 1)
    return {k: s.argmax(1) for k, s in scores.items()}


def add_latency(
    result: BudgetResult, make: Make, resolution: int, settings: BenchmarkConfig, threads: int | None = None
) -> BudgetResult:
    """Time up to TIMED artifacts of the curve at batch 1, taking turns, so that their times can be compared.

    They are the one that was chosen, the ends, and others spread between; the rest of the curve gets no latency.
    """
    by_count = {len(point["kept"]): i for i, point in reversed(list(enumerate(result.curve)))}
    chosen = next(i for i, point in enumerate(result.curve) if point["kept"] == result.kept)
    by_count[len(result.kept)] = chosen
    indices = list(by_count.values())
    picked = sorted({indices[i * (len(indices) - 1) // max(TIMED - 2, 1)] for i in range(TIMED - 1)} | {chosen})
    cases: list[tuple[Case, timing.Runnable]] = []
    for i in picked:
        candidate = make(frozenset(result.curve[i]["kept"]))
        case = Case("all", str(i), resolution, lambda _: candidate.encoder)  # noqa: B023  it is never opened again
        cases.append((case, candidate.encoder))
    counts = settings.threads if isinstance(settings.threads, list) else [settings.threads]
    with timing.torch_threads(threads or counts[0] or usable_threads()):
        timed = time_batch(settings, 1, cases, time.perf_counter)
    curve = list(result.curve)
    for i, t in zip(picked, timed, strict=True):
        low, high = timing.median_interval(list(t.rounds.values())) or (None, None)
        latency = {"latency_ms": t.p50() * 1e3, "latency_low": low and low * 1e3, "latency_high": high and high * 1e3}
        curve[i] = curve[i] | latency
    latency = {k: v for k, v in curve[chosen].items() if k.startswith("latency_")}
    return replace(result, curve=curve, reached=result.reached | latency)


def _lost(name: str, mine: np.ndarray, reference: np.ndarray) -> Measured:
    """Points lost (negative: gained) by `mine` against the reference, both bool [n], right or wrong per question."""
    found = paired(reference, mine)
    return {f"{name}_points": found.difference, f"{name}_low": found.low, f"{name}_high": found.high}


def _finite(features: FeatureSet) -> FeatureSet:
    """NaN and infinity become 0, so that a broken vector is a bad one and not everybody's neighbour."""
    cls, mean_patch = (torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (features.cls, features.mean_patch))
    return replace(features, cls=cls, mean_patch=mean_patch)


@dataclass(frozen=True)
class _Some:
    """Some images of a source, as a Source."""

    source: Source
    index: np.ndarray

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.index)

    def image(self, index: int) -> Image.Image:
        return self.source.image(int(self.index[index]))

    def labels(self) -> np.ndarray | None:
        labels = self.source.labels()
        return None if labels is None else np.asarray(labels)[self.index]

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()}, {len(self.index)} spread"
