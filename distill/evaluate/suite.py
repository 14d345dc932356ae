"""Every subject judged by every evaluation: the recipe's gallery and test set, and its tasks. Rows with their conditions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.sources import Source, checked
from distill.evaluate.classify import Answer, classify, head_of, split_conditions
from distill.evaluate.config import EvaluateConfig
from distill.evaluate.features import TooLarge
from distill.evaluate.intervals import wilson
from distill.evaluate.judged import Judged, Outcome
from distill.evaluate.kept_heads import head_path
from distill.evaluate.pairs import FEW, Predictions, paired_rows
from distill.evaluate.reader import ImageSets, Subject, SubjectReader
from distill.evaluate.scores import Score, ScoreBook, percent_right
from distill.evaluate.split import Split, align
from distill.evaluate.store import FeatureStore
from distill.evaluate.task import HeadTask, ProbeTask, Task, Unfit, Unscored
from distill.evaluate.tasks import knows_something, takes_part
from distill.files import write_bytes
from distill.progress import Progress
from distill.rows import Row, not_measured

NONE = torch.zeros(0, dtype=torch.int64)
MAIN = "main"  # the name of the recipe's own gallery and test set among the tasks
GALLERIES = ("train", "gallery")  # roles of what is learned from


@dataclass(frozen=True)
class Evaluation:
    """Rows in the order of evaluations and subjects; what each subject said about each test image; the scores of everything else."""

    rows: list[Row]
    predictions: Predictions
    scores: ScoreBook


def evaluate(
    config: EvaluateConfig,
    subjects: Sequence[Subject],
    gallery: Source | None,
    test: Source | None,
    folder: Path,
    progress: Progress,
    unrunnable: tuple[type[Exception], ...] = (),
    tasks: Mapping[str, Mapping[str, Source]] | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    kept: Path | None = None,
) -> Evaluation:
    """Judge every subject on the gallery and test set, then by every task.

    Features and what a subject scored are kept in `kept`, so that neither a killed evaluation nor one with other settings repeats them.
    Predictions per image are written to `folder/predictions.safetensors`, all other scores per item to `folder/scores.safetensors`, heads
    that evaluations train to `folder/tasks` (`kept_heads.head_path`), where there are any.

    Args:
        gallery, test: None where the recipe names no test set.
        unrunnable: exceptions of an encoder that cannot run here. Its rows are "not measured" with the exception's sentence; so
            are all rows where the data have no labels to compare.
        tasks: the sources of `config.tasks` by name and role.
        pairs: `subject/target` pairs whose differences are rows too.
        kept: a folder that outlives `folder`; None: `folder` itself.

    Raises:
        UserError, EnvironmentFailed: from data or encoders, as they are.
    """
    book = ScoreBook()
    judge = _Judge(config, subjects, folder, kept or folder, progress, (*unrunnable, TooLarge, Unfit), book)
    rows, predictions = judge.main(gallery, test)
    differences = list(paired_rows(predictions, pairs, [m for m in config.headlines() if m != "few_shot_top1"]))
    for name, task in config.tasks.items():
        sources = {role: checked(source, progress) for role, source in (tasks or {})[name].items()}
        rows += judge.task(name, task, sources)
    if predictions.said:
        predictions.save(folder / "predictions.safetensors")
    if book.stats:
        book.save(folder / "scores.safetensors")
    return Evaluation(rows + differences + book.differences(pairs), predictions, book)


@dataclass(frozen=True)
class _Judge:
    """One evaluation's settings, its subjects, and what it gathers."""

    config: EvaluateConfig
    subjects: Sequence[Subject]
    folder: Path
    kept: Path
    progress: Progress
    unrunnable: tuple[type[Exception], ...]
    book: ScoreBook

    def main(self, gallery: Source | None, test: Source | None) -> tuple[list[Row], Predictions]:
        empty = Predictions(NONE, NONE)
        if gallery is None or test is None:
            reason = "The recipe names no test set (data.test)."
            return [not_measured(m, s.subject, s.target, reason) for s in self.subjects for m in self.config.headlines()], empty
        gallery, test = checked(gallery, self.progress), checked(test, self.progress)
        split = align(gallery, test, self.config.shots, self.config.seed)
        about = _about({"train": gallery, "test": test})
        if isinstance(split, str):
            self.progress.say(f"evaluate: {split}", warning=True)
            reports = [_Report(s, self._conditions(s) | about, NONE, empty, self.book) for s in self.subjects]
            return [report.none(metric, split) for report in reports for metric in self.config.headlines()], empty
        if split.left_out:
            self.progress.say(
                f"evaluate: {split.left_out} of {len(test)} test images have no class of the gallery: left out.", True
            )
        about |= split_conditions(split, self.config) | ({"few_samples": True} if len(split.test) < FEW else {})
        predictions = Predictions(split.test, split.test_labels)
        data = {"gallery": gallery.fingerprint(), "test": test.fingerprint()}
        settings = self.config.model_dump(exclude={"tasks"})
        found: dict[int, list[Row]] = {}
        for i, subject, images in self._shared(self.subjects):
            report = _Report(subject, self._conditions(subject) | about, split.test_labels, predictions, self.book)
            key = Judged.key(subject, data, settings)
            try:
                found[i] = report.rows(self._answers(key, subject, split, gallery, test, images))
            except self.unrunnable as e:
                found[i] = [report.none(metric, str(e)) for metric in self.config.headlines()]
        return [row for i in sorted(found) for row in found[i]], predictions

    def _answers(
        self, key: dict[str, Any] | None, subject: Subject, split: Split, gallery: Source, test: Source, images: ImageSets
    ) -> Outcome:
        """As records: what an Answer says, with its predictions, or its shares where it has no single prediction."""
        head = self._head_files(MAIN, subject, key)
        outcome = self._judged.get(key)
        if outcome is None or (has_probe(outcome) and head.lacking()):
            with self._reader(subject, images) as reader:
                answers = classify(self.config, reader, split, gallery, test)
            head.save(head_of(answers))
            outcome = Outcome(reader.conditions, [_record(a) for a in answers])
            self._warn(subject, outcome)
            self._judged.put(key, outcome)
        head.copy()
        return outcome

    def task(self, name: str, task: Task, sources: dict[str, Source]) -> list[Row]:
        """The rows of all subjects that take part in a task; one that it is unfit for gets a reason, and the others go on."""
        about = {"task": name, "kind": task.kind, **_about(sources)}
        data = {role: source.fingerprint() for role, source in sources.items()}
        settings = {"task": task.model_dump(), "batch": self.config.batch}
        taking = [s for s in self.subjects if takes_part(task, s.subject)]
        found: dict[int, list[Row]] = {}
        said_why: set[str] = set()
        for i, subject, images in self._shared(taking):
            conditions = self._conditions(subject) | about
            label = subject.subject, subject.target
            key = Judged.key(subject, data, settings)
            try:
                head = self._head_files(name, subject, key)
                outcome = self._judged.get(key)
                if outcome is None or ((isinstance(task, HeadTask) or has_probe(outcome)) and head.lacking()):
                    with self._reader(subject, images) as reader:
                        scores = _scores(task, reader, sources, self.progress, head)
                    outcome = Outcome(reader.conditions, [_task_record(s) for s in scores])
                    self._warn(subject, outcome)
                    self._judged.put(key, outcome)
                head.copy()
            except self.unrunnable as e:
                if str(e) not in said_why:
                    self.progress.say(f"evaluate: {name} of {subject.subject} on {subject.target}: {e}", warning=True)
                said_why.add(str(e))
                found[i] = [not_measured(metric, *label, str(e), **conditions) for metric in task.metrics()]
                continue
            found[i] = []
            for said, stats in outcome.records:
                of_all = conditions | outcome.conditions
                if stats is None:
                    found[i].append(not_measured(said["metric"], *label, said["reason"], **of_all | said["conditions"]))
                else:
                    found[i] += self.book.rows(*label, of_all, [Score(stats=stats, **said)])
        return [row for i in sorted(found) for row in found[i]]

    def _shared(self, subjects: Sequence[Subject]) -> Iterator[tuple[int, Subject, ImageSets]]:
        """Subjects with their numbers, those of one preprocessing together: they share the images that are kept."""
        for preprocess in dict.fromkeys(s.preprocess for s in subjects):
            images = ImageSets()
            yield from ((i, s, images) for i, s in enumerate(subjects) if s.preprocess == preprocess)

    def _warn(self, subject: Subject, outcome: Outcome) -> None:
        if lost := max((said["conditions"].get("not_finite", 0) for said, _ in outcome.records), default=0):
            self.progress.say(
                f"evaluate: {lost} feature vectors of {subject.subject} on {subject.target} hold NaN or infinity.", warning=True
            )

    def _reader(self, subject: Subject, images: ImageSets) -> SubjectReader:
        return SubjectReader(subject, self._store, images, self.config.batch, self.progress)

    def _head_files(self, task: str, subject: Subject, key: dict[str, Any] | None) -> "_HeadFiles":
        result = head_path(self.folder, task, subject) if knows_something(subject.subject) else None
        return _HeadFiles(result, result if key is None or result is None else self._judged.head(key))

    @property
    def _store(self) -> FeatureStore:
        return FeatureStore(self.kept / "features")

    @property
    def _judged(self) -> Judged:
        return Judged(self.kept / "judged")

    def _conditions(self, subject: Subject) -> dict[str, Any]:
        seen = subject.preprocess
        return {"resolution": seen.size, "normalize": seen.normalize, "batch": self.config.batch}


@dataclass(frozen=True)
class _HeadFiles:
    """Where the head that is trained on a subject lies; both None for one that knows nothing.

    Attributes:
        result: in the evaluation's folder (`kept_heads.head_path`).
        cached: beside its outcome, where it outlives that folder; `result` itself where outcomes are not kept.
    """

    result: Path | None
    cached: Path | None

    def lacking(self) -> bool:
        return self.cached is not None and not self.cached.exists()

    def save(self, head: Any | None) -> None:
        if head is not None and self.cached is not None:
            head.save(self.cached)

    def copy(self) -> None:
        if self.result is not None and self.cached is not None and self.cached != self.result and self.cached.exists():
            write_bytes(self.result, self.cached.read_bytes())


def has_probe(outcome: Outcome) -> bool:
    """Whether a linear probe gave a result, and so a classifier."""
    return any(said["metric"] == "linear_top1" and result is not None for said, result in outcome.records)


def _scores(
    task: Task, reader: SubjectReader, sources: dict[str, Source], progress: Progress, head: _HeadFiles
) -> Sequence[Score | Unscored]:
    """Judged, and the head that this trains kept."""
    if isinstance(task, HeadTask):
        trained = task.fit(reader, sources, progress)
        head.save(trained)
        return task.scores(trained, reader, sources, progress)
    if isinstance(task, ProbeTask):
        scores, classifier = task.judge_and_head(reader, sources, progress)
        head.save(classifier)
        return scores
    return task.judge(reader, sources, progress)


def _about(sources: Mapping[str, Source]) -> dict[str, Any]:
    """What rows say about data: what is asked is `data`, what is learned from `gallery`, anything else has its own name."""
    first = "test" if "test" in sources else next(iter(sources))
    found: dict[str, Any] = {}
    for role, source in sources.items():
        name = "data" if role == first else "gallery" if role in GALLERIES else role
        found |= {name: source.name, f"{name}_fingerprint": source.fingerprint()}
    return found


def _record(a: Answer) -> tuple[dict[str, Any], Any]:
    said = {"metric": a.metric, "conditions": a.conditions, "headline": a.headline, "reason": a.reason}
    return said, next((t.numpy() for t in (a.predicted, a.right) if t is not None), None)


def _task_record(score: Score | Unscored) -> tuple[dict[str, Any], Any]:
    if isinstance(score, Unscored):
        return {"metric": score.metric, "reason": score.reason, "conditions": score.conditions}, None
    said = {"metric": score.metric, "reduction": score.reduction, "conditions": score.conditions, "headline": score.headline}
    return said, score.stats


@dataclass(frozen=True)
class _Report:
    """Makes the rows of one subject on the recipe's own sets. `truth`: int64 [n], labels of the test images."""

    subject: Subject
    conditions: dict[str, Any]
    truth: Tensor
    predictions: Predictions
    book: ScoreBook

    def rows(self, outcome: Outcome) -> list[Row]:
        self.conditions.update(outcome.conditions)
        return [row for said, array in outcome.records for row in self._rows(said, array)]

    def _rows(self, said: dict[str, Any], array: Any) -> list[Row]:
        metric, more = said["metric"], said["conditions"]
        if array is None:
            return [self.none(metric, said["reason"], **more)]
        if array.dtype.kind == "f":  # shares of right answers
            # What was drawn matters as much with few shots; the interval knows of the test images alone, and says so.
            score = percent_right(metric, array, interval="bootstrap over test images; the drawings of shots are fixed", **more)
            return self.book.rows(
                self.subject.subject, self.subject.target, self.conditions | {"task": MAIN, "kind": "classification"}, [score]
            )
        predicted = torch.from_numpy(array)
        if said["headline"]:
            self.predictions.add(self.subject.subject, self.subject.target, metric, predicted, self.conditions)
        return [self.accuracy(metric, predicted, **more)]

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

    def none(self, metric: str, reason: str, **more: Any) -> Row:
        return not_measured(metric, self.subject.subject, self.subject.target, reason, **{**self.conditions, **more})
