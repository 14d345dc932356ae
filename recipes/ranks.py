"""Several processes, as `accelerate launch` starts them, on one file system. The first leads: it alone decides and writes.

The others wait, and join in the stages that ask for all of them (training).
"""

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from distill.progress import Progress
from recipes.marks import Stage

PATIENCE = timedelta(days=30)  # the others wait through all that the first one does alone


def following() -> bool:
    """Whether this process is one of several and not the first."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def follow(run_folder: Path, stages: Sequence[Stage]) -> None:
    """Do what the first process calls for, until it has finished."""
    by_name = {s.name: s for s in stages}
    while (name := _told(None)) is not None:
        by_name[name].work(run_folder / by_name[name].folder, Progress("quiet"))


class Crew:
    """The other processes, as the first one sees them; none in an ordinary run."""

    def __init__(self) -> None:
        self.others = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.at_work = False

    @contextmanager
    def joining(self, stage: Stage) -> Iterator[None]:
        """Call the others to a stage's work, if it is for all."""
        if self.others and stage.together:
            self.at_work = True
            _told(stage.name)
        yield
        self.at_work = False


@contextmanager
def leading() -> Iterator[Crew]:
    """Lead the others, and dismiss them at the end.

    Not after an error in common work: they are inside that work, and the launcher ends them as soon as this process is gone.
    """
    crew = Crew()
    try:
        yield crew
    finally:
        if crew.others and not crew.at_work:
            _told(None)


def _part() -> None:
    """Close the connection: threads of it that still run when Python exits abort the process."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _told(name: str | None) -> str | None:
    """The first process's word, in every process."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # Without a GPU accelerate takes each process for a lone one unless it is told that the CPU is meant.
    cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1") or not torch.cuda.is_available()
    PartialState(cpu=cpu, timeout=PATIENCE)
    atexit.unregister(_part)
    atexit.register(_part)
    return broadcast_object_list([name])[0]
