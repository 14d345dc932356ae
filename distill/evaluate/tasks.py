"""The kinds of evaluations that a recipe can ask for beside its own gallery and test set: one line each."""

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from distill.config import Config
from distill.evaluate.classify import ClassificationTask
from distill.evaluate.copies import CopyDetectionTask
from distill.evaluate.dense_matching import MatchingTask
from distill.evaluate.depth import DepthTask
from distill.evaluate.foreground import ForegroundTask
from distill.evaluate.retrieval import RetrievalTask
from distill.evaluate.segmentation import SegmentationTask
from distill.evaluate.task import Task
from distill.evaluate.video import VideoTask

KINDS: dict[str, type[Config]] = {
    "classification": ClassificationTask,
    "segmentation": SegmentationTask,
    "depth": DepthTask,
    "foreground": ForegroundTask,
    "retrieval": RetrievalTask,
    "copy_detection": CopyDetectionTask,
    "video": VideoTask,
    "matching": MatchingTask,
}

if TYPE_CHECKING:
    TaskConfig = Task
else:
    TaskConfig = Annotated[Union[tuple(KINDS.values())], Field(discriminator="kind")]  # noqa: UP007  made from the dict

YARDSTICKS = (
    "raw",
    "random",
)  # subjects that know nothing: they stand beside accuracies, and have no dense features worth the time


def knows_something(subject: str) -> bool:
    """Whether a subject is no yardstick."""
    return subject.split("/")[0] not in YARDSTICKS


def takes_part(task: Any, subject: str) -> bool:
    """Whether a subject is judged by a task: pixels and untrained networks only where classes are told apart."""
    return task.kind == "classification" or knows_something(subject)
