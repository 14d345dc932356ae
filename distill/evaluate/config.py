"""The settings of a recipe's `evaluate` section."""

from pydantic import Field

from distill.evaluate.classify import ClassifyConfig
from distill.evaluate.tasks import TaskConfig


class EvaluateConfig(ClassifyConfig):
    """How frozen features are judged: on the recipe's gallery and test set, and by further tasks.

    Attributes:
        batch: images an encoder gets at once.
        tasks: further evaluations by name (tasks.KINDS): a section with `kind`, its own data and settings.
    """

    batch: int = 64
    tasks: dict[str, TaskConfig] = Field(default_factory=dict)

    def problems(self) -> list[str]:
        return super().problems() + ([] if self.batch >= 1 else [f"batch must be at least 1, got {self.batch}"])
