"""The image sources that a recipe names, opened once, when first needed."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from distill.data.preprocess import Preprocess
from distill.errors import UserError
from recipes.schema import DataConfig

if TYPE_CHECKING:
    from distill.data.sources import Source, StreamingSource

CHECKED_AT_MOST = (
    20_000  # images that `pictures` decodes to find the readable ones; larger sets replace a bad one by its neighbour
)


class Data:
    """`train` and `gallery` are the same object when the recipe does not tell them apart; `test` may be absent.

    Args:
        tasks: further evaluations by name, each with sources of its own (distill/evaluate/task.py).
    """

    def __init__(self, config: DataConfig, tasks: Mapping[str, Any] | None = None):
        self.config, self._tasks = config, tasks or {}

    @cached_property
    def train(self) -> "Source | StreamingSource":
        from distill.data.sources import source_from

        return source_from(self.config.train).build()

    @cached_property
    def gallery(self) -> "Source":
        return self._counted("train" if self.config.gallery is None else "gallery")

    @cached_property
    def test(self) -> "Source | None":
        return None if self.config.test is None else self._counted("test")

    @cached_property
    def tasks(self) -> "dict[str, dict[str, Source]]":
        """The sources of each task by role.

        Raises: UserError: naming the setting, where one streams; what building them raises.
        """
        from distill.data.sources import StreamingSource, source_from

        found: dict[str, dict[str, Source]] = {}
        for name, task in self._tasks.items():
            found[name] = {}
            for role, value in task.sources().items():
                source = source_from(value).build()
                if isinstance(source, StreamingSource):
                    raise UserError(
                        f"evaluate.tasks.{name}.{role} streams, and evaluation needs a set of known length. "
                        "Name one that does not stream; a `limit` keeps it small."
                    )
                found[name][role] = source
        return found

    def task_fingerprints(self) -> dict[str, str]:
        return {f"{name}.{role}": s.fingerprint() for name, sources in self.tasks.items() for role, s in sources.items()}

    def _counted(self, role: str) -> "Source":
        """A source that evaluation can count and read again."""
        from distill.data.sources import StreamingSource, source_from

        source = self.train if role == "train" else source_from(getattr(self.config, role)).build()
        if isinstance(source, StreamingSource):
            raise UserError(
                f"data.{role} streams, and evaluation needs a set of known length. "
                "Name one as data.gallery (and data.test) that does not stream; a `limit` keeps it small."
            )
        return source

    def fingerprint(self, role: str) -> str:
        source = getattr(self, role)
        return "none" if source is None else source.fingerprint()

    def fingerprints(self, *roles: str) -> dict[str, str]:
        return {role: self.fingerprint(role) for role in roles}

    def pictures(self, role: str, n: int, avoid: int = 0) -> list[Image.Image]:
        """Up to n readable RGB images, spread over the source: a set sorted by class gives a mixture. Of `train` without a test set.

        Args:
            avoid: give none of those that `pictures(role, avoid)` gives. A source that holds no others gives these again.
        """
        from distill.data.sources import StreamingSource, checked

        source = self.train if getattr(self, role) is None else getattr(self, role)
        if isinstance(source, StreamingSource):
            stream = source.iterate(0)
            return [next(stream) for _ in range(avoid + n)][avoid:]
        good = checked(source) if len(source) <= CHECKED_AT_MOST else source
        taken = set(_spread(len(good), min(avoid, len(good))))
        free = [i for i in range(len(good)) if i not in taken] if taken and len(taken) < len(good) else range(len(good))
        return [good.image(free[i]) for i in _spread(len(free), min(n, len(free)))]

    def tensors(self, role: str, n: int, preprocess: Preprocess, avoid: int = 0) -> Tensor:
        """`pictures`, preprocessed: [n, 3, size, size] float32."""
        return torch.stack([torch.from_numpy(preprocess(p)) for p in self.pictures(role, n, avoid)])


def _spread(total: int, n: int) -> list[int]:
    return [i * total // n for i in range(n)]
