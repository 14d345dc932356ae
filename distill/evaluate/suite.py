"""kNN and linear accuracy of any number of subjects on one gallery and one test set, as rows with their conditions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from distill.config import Config
from distill.data.preprocess import Preprocess
from distill.data.sources import Source, checked
from distill.encoder import Encoder, Features
from distill.evaluate import knn, linear
from distill.evaluate.features import FeatureSet, Images, TooLarge, extract, identity, load, save
from distill.evaluate.intervals import wilson
from distill.evaluate.pairs import FEW, METRICS, Predictions
from distill.evaluate.split import Split, align
from distill.progress import Progress
from distill.rows import Row, not_measured

NONE = torch.zeros(0, dtype=torch.int64)


class EvaluateConfig(Config):
    """How frozen features are judged.

    Attributes:
        ks: numbers of neighbours; all are reported, the headline's is chosen on a held-out fifth of the gallery.
        temperature: of the neighbours' weights.
        shots: gallery images a class, chosen by the seed; 0 takes them all.
        probe_lrs, probe_steps, probe_batch, probe_standardize: of the linear probe, see `linear.ProbeSettings`.
        batch: images an encoder gets at once.
        seed: of every random choice: shots, held-out fifth, order of the probe's images.
    """

    ks: list[int] = Field(default_factory=lambda: [10, 20, 100, 200])
    temperature: float = 0.07
    shots: int = 0
    probe_lrs: list[float] = Field(default_factory=lambda: [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0])
    probe_steps: int = 500
    probe_batch: int = 128
    probe_standardize: bool = True
    batch: int = 64
    seed: int = 0

    def probe(self) -> linear.ProbeSettings:
        return linear.ProbeSettings(
            tuple(self.probe_lrs), self.probe_steps, self.probe_batch, self.probe_standardize, self.seed
        )

    def problems(self) -> list[str]:
        """What is out of range, one sentence each."""
        found = []
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            found.append(f"ks must be one or more different numbers of at least 1, got {self.ks}")
        if not self.probe_lrs or not all(0 < lr < float("inf") for lr in self.probe_lrs):
            found.append(f"probe_lrs must be one or more numbers above 0, got {self.probe_lrs}")
        if not 0 < self.temperature < float("inf"):
            found.append(f"temperature must be above 0, got {self.temperature}")
        if min(self.probe_steps, self.probe_batch, self.batch) < 1:
            found.append("probe_steps, probe_batch and batch must be at least 1")
        if self.shots < 0:
            found.append(f"shots must be 0 (all images) or more, got {self.shots}")
        return found


@dataclass(frozen=True)
class Subject:
    """Something to evaluate.

    Attributes:
        subject, target: how its rows are labelled, e.g. `students/small`, `onnx-int8`.
        open: makes the encoder; called once, when its turn comes; the encoder is dropped afterwards.
        preprocess: how its images are made; subjects that share one share the preprocessed images.
        weights: hash of what is measured (model weights or artifact file): names its stored features. None stores nothing.
    """

    subject: str
    target: str
    open: Callable[[], Encoder]
    preprocess: Preprocess
    weights: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Rows in the order of the subjects, and what each subject said about each test image."""

    rows: list[Row]
    predictions: Predictions


def evaluate(
    config: EvaluateConfig,
    subjects: Sequence[Subject],
    gallery: Source,
    test: Source,
    folder: Path,
    progress: Progress,
    unrunnable: tuple[type[Exception], ...] = (),
) -> Evaluation:
    """Judge every subject by kNN and a linear probe.

    Features are stored in `folder/features`, so that a killed evaluation repeats no finished extraction; predictions per image
    are written to `folder/predictions.safetensors`, where there are any.

    Args:
        unrunnable: exceptions of an encoder that cannot run here. Its rows are "not measured" with the exception's sentence; so
            are all rows where the data have no labels to compare.

    Raises:
        UserError, EnvironmentFailed: from data or encoders, as they are.
    """
    gallery, test = checked(gallery, progress), checked(test, progress)
    split = align(gallery, test, config.shots, config.seed)
    if isinstance(split, str):
        progress.say(f"evaluate: {split}", warning=True)
        reports = [_Report(s, _conditions(config, s, gallery, test), NONE, Predictions(NONE, NONE)) for s in subjects]
        return Evaluation([report.none(metric, split) for report in reports for metric in METRICS], Predictions(NONE, NONE))
    if split.left_out:
        progress.say(f"evaluate: {split.left_out} of {len(test)} test images have no class of the gallery: left out.", True)
    judge = _Judge(config, split, Predictions(split.test, split.test_labels), folder, progress, (*unrunnable, TooLarge))
    found: dict[int, list[Row]] = {}
    for preprocess in dict.fromkeys(s.preprocess for s in subjects):
        sets = Images(gallery, preprocess), Images(test, preprocess)
        for i, subject in enumerate(subjects):
            if subject.preprocess == preprocess:
                found[i] = judge.rows(subject, *sets)
    judge.predictions.save(folder / "predictions.safetensors")
    return Evaluation([row for i in sorted(found) for row in found[i]], judge.predictions)


@dataclass(frozen=True)
class _Judge:
    """One evaluation's settings and what it gathers."""

    config: EvaluateConfig
    split: Split
    predictions: Predictions
    folder: Path
    progress: Progress
    unrunnable: tuple[type[Exception], ...]

    def rows(self, subject: Subject, gallery: Images, test: Images) -> list[Row]:
        conditions = _conditions(self.config, subject, gallery.source, test.source, self.split)
        report = _Report(subject, conditions, self.split.test_labels, self.predictions)
        try:
            encoder = subject.open()
            features = self._features(encoder, subject, gallery), self._features(encoder, subject, test)
        except self.unrunnable as e:
            return [report.none(metric, str(e)) for metric in METRICS]
        assert encoder.target == subject.target, f"{encoder.target} measured as {subject.target}"
        report.conditions.update(encoder.conditions)
        finite = _Finite.of(*features, self.split)
        if finite.lost:
            report.conditions["not_finite"] = finite.lost
            self.progress.say(
                f"evaluate: {finite.lost} feature vectors of {subject.subject} on {subject.target} hold NaN or infinity.",
                warning=True,
            )
        if len(finite.labels.unique()) < 2:
            reason = "The features hold NaN or infinity: fewer than two classes of the gallery are left."
            return [report.none(metric, reason) for metric in METRICS]
        return [*_knn_rows(self.config, finite, report), _linear_row(self.config, finite, report)]

    def _features(self, encoder: Encoder, subject: Subject, images: Images) -> FeatureSet:
        store, batch = self.folder / "features", self.config.batch
        what = identity(subject.weights, images, batch) if subject.weights else None
        if what and (stored := load(store, what, images)):
            return stored
        title = f"{subject.subject} on {subject.target}, {images.name}"
        features = extract(encoder, images, batch, self.progress, title)
        if what:
            save(store, what, features)
        return features


def _conditions(
    config: EvaluateConfig, subject: Subject, gallery: Source, test: Source, split: Split | None = None
) -> dict[str, Any]:
    """What every row says about data and resolution."""
    conditions: dict[str, Any] = {
        "data": test.name,
        "data_fingerprint": test.fingerprint(),
        "gallery": gallery.name,
        "gallery_fingerprint": gallery.fingerprint(),
        "resolution": subject.preprocess.size,
        "normalize": subject.preprocess.normalize,
        "batch": config.batch,
    }
    if split:
        conditions |= {"gallery_size": len(split.gallery), "classes": split.classes(), "seed": config.seed}
        conditions |= {"shots": config.shots} if config.shots else {}
        conditions |= {"test_left_out": split.left_out} if split.left_out else {}
        conditions |= {"few_samples": True} if len(split.test) < FEW else {}
    return conditions


@dataclass(frozen=True)
class _Report:
    """Makes the rows of one subject. `truth`: int64 [n], labels of the test images."""

    subject: Subject
    conditions: dict[str, Any]
    truth: Tensor
    predictions: Predictions

    def accuracy(self, metric: str, predicted: Tensor, **more: Any) -> Row:
        right, n = int((predicted == self.truth).sum()), len(self.truth)
        low, high = (float(limit) for limit in wilson(right, n))
        return Row(
            metric=metric,
            value=100 * right / n,
            low=low,
            high=high,
            n=n,
            subject=self.subject.subject,
            target=self.subject.target,
            conditions={**self.conditions, **more},
        )

    def headline(self, metric: str, predicted: Tensor, **more: Any) -> Row:
        """As `accuracy`; the predictions are kept for paired differences."""
        self.predictions.add(self.subject.subject, self.subject.target, metric, predicted, self.conditions)
        return self.accuracy(metric, predicted, **more)

    def none(self, metric: str, reason: str, **more: Any) -> Row:
        return not_measured(metric, self.subject.subject, self.subject.target, reason, **{**self.conditions, **more})


@dataclass(frozen=True)
class _Finite:
    """The split's features without those that hold NaN or infinity.

    Attributes:
        gallery, labels: what is learned from. test: what is asked.
        asked: bool [n], which of the split's test images are in `test`; the others count as wrong.
        lost: feature vectors of gallery and test that were taken out.
    """

    gallery: Features
    labels: Tensor
    test: Features
    asked: Tensor
    lost: int

    @staticmethod
    def of(gallery: FeatureSet, test: FeatureSet, split: Split) -> "_Finite":
        known, asked = gallery.finite()[split.gallery], test.finite()[split.test]
        lost = int((~known).sum() + (~asked).sum())
        return _Finite(gallery.at(split.gallery[known]), split.gallery_labels[known], test.at(split.test[asked]), asked, lost)

    def whole(self, predicted: Tensor) -> Tensor:
        """Predictions for all n test images of the split: -1 where the features were not finite."""
        return torch.full(self.asked.shape, -1).masked_scatter(self.asked, predicted)


def _knn_rows(config: EvaluateConfig, task: _Finite, report: _Report) -> list[Row]:
    """The headline, then one row for each k of the grid."""
    gallery, labels, size = task.gallery.cls, task.labels, len(task.labels)
    fit, unfit = (sorted(k for k in config.ks if (k <= size) is wanted) for wanted in (True, False))
    too_large = [
        report.none("knn_top1_at_k", f"k = {k} needs a gallery of {k} images, this one has {size}.", k=k) for k in unfit
    ]
    if not fit:
        reason = f"The gallery has {size} images, fewer than the smallest k ({min(unfit)}): name a smaller k or more images."
        return [report.none("knn_top1", reason), *too_large]
    kept, held = knn.hold_out(labels, config.seed)
    best = knn.choose_k(gallery, labels, kept, held, fit, config.temperature)
    predicted = knn.predict(gallery, labels, task.test.cls, fit, config.temperature)
    said = {k: task.whole(p) for k, p in predicted.items()}
    protocol = {"temperature": config.temperature}
    chosen = "held-out gallery" if len(fit) > 1 else "the only one given"
    return [
        report.headline("knn_top1", said[best], k=best, k_chosen=chosen, **protocol),
        *(report.accuracy("knn_top1_at_k", said[k], k=k, **protocol) for k in fit),
        *too_large,
    ]


def _linear_row(config: EvaluateConfig, task: _Finite, report: _Report) -> Row:
    settings = config.probe()
    protocol = {"probe_steps": settings.steps, "probe_batch": settings.batch, "standardize": settings.standardize}
    outcome = linear.probe(task.gallery, task.labels, task.test, settings)
    if isinstance(outcome, str):
        return report.none("linear_top1", outcome, **protocol)
    chosen = {
        "lr": outcome.lr,
        "features": outcome.features,
        "held_out_top1": outcome.held_out_top1,
        "chosen": "held-out gallery",
    }
    return report.headline("linear_top1", task.whole(outcome.predicted), **protocol, **chosen)
