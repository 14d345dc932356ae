"""What an evaluation beside kNN and linear probe is: a config class that reads frozen features and gives scores.

A kind is such a class and one line in `tasks.KINDS`. It sees one subject at a time through a Reader, which keeps features on disk: whatever
several evaluations ask of the same subject, data and resolution is computed once.

Shape legend: L layers, n images, N patch tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from distill.data.sources import Source
from distill.evaluate.scores import Score
from distill.progress import Progress

Fit = Literal["crop", "squash"]


@dataclass(frozen=True)
class Stored:
    """Frozen features of a set in order, memory-mapped and read-only.

    Attributes:
        cls: [L, n, D] float32, the last L layers, earliest first.
        mean_patch: [L, n, D'] float32.
        patches: [L, n, N, D'] float16, tokens row by row of a square grid; None where they were not asked for.
    """

    cls: np.ndarray
    mean_patch: np.ndarray
    patches: np.ndarray | None = None

    def grid(self) -> int:
        """Side of the patch grid. Raises: Unfit: the tokens fill no square."""
        assert self.patches is not None
        tokens = self.patches.shape[2]
        side = round(tokens**0.5)
        if side * side != tokens:
            raise Unfit(f"{tokens} patch tokens fill no square grid.")
        return side


class Unfit(Exception):
    """Why a task cannot be done with this subject or these data: one sentence, which becomes the reason of "not measured" rows."""


@dataclass(frozen=True)
class Unscored:
    """A headline that a task cannot give for this subject while it gives others: a "not measured" row with its reason."""

    metric: str
    reason: str
    conditions: dict[str, Any] = field(default_factory=dict)


class Reader(Protocol):
    """One subject's features.

    Attributes:
        resolution: side of its square input in pixels.
        depth: how many layers from the end can be read; 1 for exported files.
    """

    resolution: int

    @property
    def depth(self) -> int: ...

    def read(self, source: Source, *, patches: bool = False, layers: int = 1, fit: Fit = "crop") -> Stored:
        """Features of every image of a source, from disk where they are there already.

        Raises:
            Unfit: more layers than there are. The subject's own errors where it cannot run here.
        """


class Task(Protocol):
    """A config class (distill.config.Config) of one kind.

    Attributes:
        kind: its name in a recipe.
    """

    kind: str

    def model_dump(self) -> dict[str, Any]:
        """All its settings, as of every config."""

    def sources(self) -> dict[str, Any]:
        """Role -> the source config (or shorthand) that the recipe names, e.g. train and test."""

    def metrics(self) -> tuple[str, ...]:
        """The headlines, for "not measured" rows."""

    def judge(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> Sequence[Score | Unscored]:
        """Scores of one subject; headlines have an item for each test item, in order and equal in number for every subject.

        Args:
            sources: the built sources by role, already without unreadable items where that is possible.

        Raises:
            Unfit: with the sentence why.
        """


@runtime_checkable
class ProbeTask(Task, Protocol):
    """A task that may train a classifier worth keeping among what else it judges by."""

    def judge_and_head(
        self, reader: Reader, sources: dict[str, Any], progress: Progress
    ) -> tuple[Sequence[Score | Unscored], Any | None]:
        """As `judge`, and the trained head with `save(path)`, or None where there is none."""


@runtime_checkable
class HeadTask(Task, Protocol):
    """A task whose judging trains a head worth keeping: pictures, demos and bundles use it. `judge` is `fit`, then `scores`."""

    def fit(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> Any:
        """The trained head, with `save(path)`."""

    def scores(self, head: Any, reader: Reader, sources: dict[str, Any], progress: Progress) -> Sequence[Score | Unscored]:
        """A head judged."""
