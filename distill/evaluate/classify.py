"""Frozen features asked to tell classes apart: kNN, a linear probe, logistic regression, a few images a class.

One implementation for the recipe's own gallery and test set (suite.py makes its rows) and for further labelled sets, which are tasks of
the kind `classification`.

Shape legend: n test images of a split, L layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distill.config import Config
from distill.data.sources import Source, SourceConfig
from distill.encoder import Features
from distill.evaluate import knn, linear
from distill.evaluate.linear_head import Head
from distill.evaluate.logistic import few_shot, logistic
from distill.evaluate.scores import Score, percent_right
from distill.evaluate.split import Split, align
from distill.evaluate.task import Reader, Stored, Unfit, Unscored
from distill.progress import Progress

WIDEST = 4096  # numbers of an image that logistic regression is done for


class ClassifyConfig(Config):
    """How frozen features are asked for classes.

    Attributes:
        ks: numbers of neighbours; all are reported, the headline's is chosen on a held-out fifth of the gallery.
        temperature: of the neighbours' weights.
        shots: gallery images a class, chosen by the seed; 0 takes them all.
        probe_lrs, probe_steps, probe_batch, probe_standardize: of the linear probe, see `linear.ProbeSettings`.
        probe_layers: numbers of last layers whose CLS the probe's grid tries; DINOv2: [1, 4]. Only the last one by default: an exported
            file holds no other, so it alone compares a file with its network on equal terms, and four cost several times the training.
        logistic: logistic regression too (DINOv2), off by default: on a large set it takes longer than all the rest.
        few_shot: numbers of images a class (MSN: 1, 2, 5, 10) for logistic regression on so few; none by default, for the same reason.
        few_shot_draws: drawings of each number, whose accuracies are averaged.
        seed: of every random choice: shots, held-out fifth, order of the probe's images.
    """

    ks: list[int] = Field(default_factory=lambda: [10, 20, 100, 200])
    temperature: float = 0.07
    shots: int = 0
    probe_lrs: list[float] = Field(default_factory=lambda: [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0])
    probe_steps: int = 500
    probe_batch: int = 128
    probe_standardize: bool = True
    probe_layers: list[int] = Field(default_factory=lambda: [1])
    logistic: bool = False
    few_shot: list[int] = Field(default_factory=list)
    few_shot_draws: int = 5
    seed: int = 0

    def probe(self) -> linear.ProbeSettings:
        return linear.ProbeSettings(
            tuple(self.probe_lrs),
            self.probe_steps,
            self.probe_batch,
            self.probe_standardize,
            self.seed,
            tuple(self.probe_layers),
        )

    def headlines(self) -> tuple[str, ...]:
        """The metrics that are asked for."""
        asked = {"knn_top1": True, "linear_top1": True, "logistic_top1": self.logistic, "few_shot_top1": bool(self.few_shot)}
        return tuple(name for name, wanted in asked.items() if wanted)

    def problems(self) -> list[str]:
        """What is out of range, one sentence each."""
        found = []
        for name in ("ks", "probe_layers"):
            if not (numbers := getattr(self, name)) or min(numbers) < 1 or len(set(numbers)) < len(numbers):
                found.append(f"{name} must be one or more different numbers of at least 1, got {numbers}")
        if self.few_shot and (min(self.few_shot) < 1 or len(set(self.few_shot)) < len(self.few_shot)):
            found.append(f"few_shot must be different numbers of at least 1, got {self.few_shot}")
        if not self.probe_lrs or not all(0 < lr < float("inf") for lr in self.probe_lrs):
            found.append(f"probe_lrs must be one or more numbers above 0, got {self.probe_lrs}")
        if not 0 < self.temperature < float("inf"):
            found.append(f"temperature must be above 0, got {self.temperature}")
        if min(self.probe_steps, self.probe_batch, self.few_shot_draws) < 1:
            found.append("probe_steps, probe_batch and few_shot_draws must be at least 1")
        if self.shots < 0:
            found.append(f"shots must be 0 (all images) or more, got {self.shots}")
        return found


@dataclass(frozen=True)
class Answer:
    """What one classifier said of the n test images.

    Attributes:
        predicted: int64 [n], labels; -1 where the features were not finite. None for several drawings, or without a result.
        right: float64 [n], the share of right answers for each image. None without a result.
        conditions: how it was asked. headline: a metric's one result; others are of a grid.
        reason: why there is no result.
        head: the trained classifier, of the linear probe.
    """

    metric: str
    predicted: Tensor | None = None
    right: Tensor | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    headline: bool = True
    reason: str | None = None
    head: Head | None = None


def classify(config: ClassifyConfig, reader: Reader, split: Split, gallery: Source, test: Source) -> list[Answer]:
    """Every answer that the settings ask for: headlines, kNN's with one more for each k.

    Raises: what `reader.read` raises.
    """
    layers = 1
    if config.probe_layers != [1] and "linear_top1" in config.headlines():
        layers = max((n for n in config.probe_layers if n <= reader.depth), default=1)
    finite = Finite.of(reader.read(gallery, layers=layers), reader.read(test, layers=layers), split)
    lost = {"not_finite": finite.lost} if finite.lost else {}
    if len(finite.labels.unique()) < 2:
        reason = "The features hold NaN or infinity: fewer than two classes of the gallery are left."
        return [Answer(metric, reason=reason, conditions=lost) for metric in config.headlines()]
    asked = {"knn_top1": _knn, "linear_top1": _linear, "logistic_top1": _logistic, "few_shot_top1": _few_shot}
    answers = []
    for name in config.headlines():
        # Raw pixels of large images: L-BFGS would take hours.
        if name in ("logistic_top1", "few_shot_top1") and (width := finite.gallery[-1].cls.shape[1]) > WIDEST:
            reason = f"Each image has {width:,} numbers, and logistic regression is done for at most {WIDEST:,}."
            answers.append(Answer(name, reason=reason))
        else:
            answers += asked[name](config, finite, split)
    return [replace(a, conditions=lost | a.conditions, head=a.head and with_names(a.head, gallery)) for a in answers]


def with_names(head: Head, gallery: Source) -> Head:
    """A classifier that knows what its classes are called; none are where one of them has no name."""
    names = gallery.classes or []
    values = [int(v) for v in head.values]
    return replace(head, names=[names[v] for v in values] if max(values) < len(names) else [])


@dataclass(frozen=True)
class Finite:
    """The split's features without those that hold NaN or infinity.

    Attributes:
        gallery, labels: what is learned from, by layer, earliest first. test: what is asked.
        asked: bool [n], which of the split's test images are in `test`; the others count as wrong.
        lost: feature vectors of gallery and test that were taken out.
    """

    gallery: list[Features]
    labels: Tensor
    test: list[Features]
    asked: Tensor
    lost: int

    @staticmethod
    def of(gallery: Stored, test: Stored, split: Split) -> "Finite":
        known, asked = _finite(gallery)[split.gallery], _finite(test)[split.test]
        lost = int((~known).sum() + (~asked).sum())
        learned, labels = _at(gallery, split.gallery[known]), split.gallery_labels[known]
        return Finite(learned, labels, _at(test, split.test[asked]), asked, lost)

    def whole(self, predicted: Tensor) -> Tensor:
        """Predictions for all n test images of the split: -1 where the features were not finite."""
        return torch.full(self.asked.shape, -1).masked_scatter(self.asked, predicted)


def _finite(stored: Stored) -> Tensor:
    """bool [images]: whose features are all finite, in every layer."""
    arrays = [layer for array in (stored.cls, stored.mean_patch) for layer in array]
    return torch.from_numpy(np.logical_and.reduce([np.isfinite(layer).all(1) for layer in arrays]))


def _at(stored: Stored, index: Tensor) -> list[Features]:
    """Some of the images in memory, by layer; the mean patch is the only patch: what `feature_sets` expects."""
    i = index.numpy()
    layers = zip(stored.cls, stored.mean_patch, strict=True)
    return [Features(torch.from_numpy(cls[i]), torch.from_numpy(patch[i])[:, None]) for cls, patch in layers]


def _answer(metric: str, split: Split, predicted: Tensor, conditions: dict[str, Any], headline: bool = True) -> Answer:
    return Answer(metric, predicted, (predicted == split.test_labels).double(), conditions, headline)


def _knn(config: ClassifyConfig, task: Finite, split: Split) -> Iterator[Answer]:
    """The headline, then one for each k of the grid."""
    gallery, labels, size = task.gallery[-1].cls, task.labels, len(task.labels)
    fit, unfit = (sorted(k for k in config.ks if (k <= size) is wanted) for wanted in (True, False))
    too_large = [
        Answer("knn_top1_at_k", None, None, {"k": k}, False, f"k = {k} needs a gallery of {k} images, this one has {size}.")
        for k in unfit
    ]
    if not fit:
        reason = f"The gallery has {size} images, fewer than the smallest k ({min(unfit)}): name a smaller k or more images."
        yield Answer("knn_top1", reason=reason)
    else:
        kept, held = knn.hold_out(labels, config.seed)
        best = knn.choose_k(gallery, labels, kept, held, fit, config.temperature)
        predicted = knn.predict(gallery, labels, task.test[-1].cls, fit, config.temperature)
        said = {k: task.whole(p) for k, p in predicted.items()}
        protocol = {"temperature": config.temperature}
        chosen = "held-out gallery" if len(fit) > 1 else "the only one given"
        yield _answer("knn_top1", split, said[best], {"k": best, "k_chosen": chosen} | protocol)
        for k in fit:
            yield _answer("knn_top1_at_k", split, said[k], {"k": k} | protocol, headline=False)
    yield from too_large


def _linear(config: ClassifyConfig, task: Finite, split: Split) -> Iterator[Answer]:
    settings = config.probe()
    protocol: dict[str, Any] = {
        "probe_steps": settings.steps,
        "probe_batch": settings.batch,
        "standardize": settings.standardize,
    }
    if config.probe_layers != [1]:
        tried = [n for n in settings.layers if n <= len(task.gallery)] or [1]
        settings = replace(settings, layers=tuple(tried))
        protocol["probe_layers"] = ", ".join(map(str, tried))
        if lacking := sorted(set(config.probe_layers) - set(tried)):
            protocol["probe_layers_lacking"] = ", ".join(map(str, lacking))
    outcome = linear.probe(task.gallery, task.labels, task.test, settings)
    if isinstance(outcome, str):
        yield Answer("linear_top1", reason=outcome, conditions=protocol)
        return
    chosen = {
        "lr": outcome.lr,
        "features": outcome.features,
        "held_out_top1": outcome.held_out_top1,
        "chosen": "held-out gallery",
    }
    answer = _answer("linear_top1", split, task.whole(outcome.predicted), protocol | chosen)
    yield replace(answer, head=_head(outcome, {**protocol, "lr": outcome.lr, "held_out_top1": outcome.held_out_top1}))


def _head(found: linear.Probe, training: dict[str, Any]) -> Head:
    """The probe that gave the predictions, as a record."""
    weight_DC, bias_C = found.heads.weight[:, 0], found.heads.bias[0]
    sets, _, mean_patch = found.features.partition("+")
    layers = 1 if sets == "cls" else int(sets.removeprefix("last").removesuffix("_cls"))
    return Head(
        kind="classification",
        weight=weight_DC.T.contiguous().numpy(),
        bias=bias_C.numpy(),
        shift=found.heads.shift.numpy(),
        scale=found.heads.scale.numpy(),
        values=found.classes.numpy().astype(np.float32),
        layers=layers,
        cls=True,
        names=[],
        training=training,
        mean_patch=bool(mean_patch),
    )


def _logistic(config: ClassifyConfig, task: Finite, split: Split) -> Iterator[Answer]:
    outcome = logistic(task.gallery[-1].cls, task.labels, task.test[-1].cls, config.seed)
    if isinstance(outcome, str):
        yield Answer("logistic_top1", reason=outcome)
        return
    chosen = {"strength": outcome.strength, "held_out_top1": outcome.held_out_top1, "chosen": "held-out gallery"}
    yield _answer("logistic_top1", split, task.whole(outcome.predicted), chosen | {"converged": outcome.converged})


def _few_shot(config: ClassifyConfig, task: Finite, split: Split) -> Iterator[Answer]:
    counts = task.labels.unique(return_counts=True)[1]
    for shots in config.few_shot:
        conditions = {"shots": shots, "draws": config.few_shot_draws, "classifier": "logistic regression"}
        if shots > counts.min():
            conditions["smallest_class"] = int(counts.min())
        share = few_shot(
            task.gallery[-1].cls,
            task.labels,
            task.test[-1].cls,
            split.test_labels[task.asked],
            shots,
            config.few_shot_draws,
            config.seed,
        )
        right = torch.zeros(len(task.asked), dtype=torch.float64).masked_scatter(task.asked, share)
        yield Answer("few_shot_top1", None, right, conditions)


class ClassificationTask(ClassifyConfig):
    """A further labelled set with its own images to learn from.

    Attributes:
        train, test: labelled sets, apart from each other.
        knn, linear: whether each is asked; `logistic` and `few_shot` as always.
    """

    kind: Literal["classification"] = "classification"
    train: str | SourceConfig
    test: str | SourceConfig
    knn: bool = True
    linear: bool = True

    def headlines(self) -> tuple[str, ...]:
        off = {"knn_top1": not self.knn, "linear_top1": not self.linear}
        return tuple(name for name in super().headlines() if not off.get(name))

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.headlines():
            found.append("knn, linear and logistic are off and few_shot is empty: nothing is measured")
        if self.seed < 0:
            found.append(f"seed must be at least 0, got {self.seed}")
        return found

    def sources(self) -> dict[str, Any]:
        return {"train": self.train, "test": self.test}

    def metrics(self) -> tuple[str, ...]:
        return self.headlines()

    def judge(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> list[Score | Unscored]:
        """Raises: Unfit: labels are missing, or not of one numbering."""
        return self.judge_and_head(reader, sources, progress)[0]

    def judge_and_head(
        self, reader: Reader, sources: dict[str, Any], progress: Progress
    ) -> tuple[list[Score | Unscored], Head | None]:
        """Scores as `judge`, and the linear probe's classifier, if it was asked for and gave a result."""
        train, test = sources["train"], sources["test"]
        split = align(train, test, self.shots, self.seed)
        if isinstance(split, str):
            raise Unfit(split)
        about = split_conditions(split, self)
        found: list[Score | Unscored] = []
        answers = classify(self, reader, split, train, test)
        for a in answers:
            conditions = about | a.conditions
            if a.headline and "k" in conditions:
                conditions["chosen_k"] = conditions.pop("k")  # two subjects' headlines are compared whatever k each chose
            if a.right is None:
                assert a.reason is not None
                found.append(Unscored(a.metric, a.reason, conditions))
            else:
                found.append(replace(percent_right(a.metric, a.right.numpy(), **conditions), headline=a.headline))
        return found, head_of(answers)


def head_of(answers: Sequence[Answer]) -> Head | None:
    """The classifier that one of the answers was given by."""
    return next((a.head for a in answers if a.head is not None), None)


def split_conditions(split: Split, config: ClassifyConfig) -> dict[str, Any]:
    """What every row says about the images that were learned from and asked."""
    return split.conditions() | {"seed": config.seed} | ({"shots": config.shots} if config.shots else {})
