"""What the stopwatch times, and what it has timed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.data.preprocess import Preprocess
from distill.rows import Row, not_measured
from export.stopwatch import timing
from export.stopwatch.energy import Energy
from export.stopwatch.timing import Rounds, Runnable

MEASURES = "one call: float32 images in host memory to float32 features in host memory, preprocessing apart"
MEASURES_ANY = "one call: inputs in host memory to outputs in host memory"


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        subject, target: as in Row, e.g. `students/small`, `onnx-int8`.
        resolution: side of the square input in pixels; None where the input is no picture.
        open: number of threads -> a fresh Runnable (an Encoder, or any graph that takes `inputs`); raises Unrunnable when this
            machine cannot execute it.
        size_bytes: of the file (or files) that is shipped; None: no size row.
        max_batch: the largest batch it accepts, if there is one.
        preprocess: of its images; None: no preprocessing row.
        only_batch: the one batch that it accepts, where that is fixed.
        inputs: batch -> what a call takes; None: `pictures`.
        build_s: seconds that building it took, where it is known here.
    """

    subject: str
    target: str
    resolution: int | None
    open: Callable[[int], Runnable]
    size_bytes: int | None = None
    max_batch: int | None = None
    preprocess: Preprocess | None = None
    only_batch: int | None = None
    inputs: Callable[[int], Any] | None = None
    build_s: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.subject, self.target

    @property
    def measures(self) -> str:
        return MEASURES if self.inputs is None else MEASURES_ANY

    def why_not(self, batch: int) -> str | None:
        """Why it does not take a batch; None when it does."""
        if self.only_batch not in (None, batch):
            return f"its batch is fixed at {self.only_batch}."
        if self.max_batch is not None and batch > self.max_batch:
            return f"it takes at most {self.max_batch} images a call."
        return None

    def takes(self, batch: int) -> bool:
        return self.why_not(batch) is None

    def feed(self, batch: int) -> Any:
        """What a call of that batch is given."""
        if self.inputs is not None:
            return self.inputs(batch)
        assert self.resolution is not None
        return pictures(batch, self.resolution)

    def row(self, metric: str, value: float, conditions: dict[str, Any], **rest: Any) -> Row:
        return Row(metric=metric, value=value, subject=self.subject, target=self.target, conditions=conditions, **rest)

    def missing(self, metric: str, reason: str, **conditions: Any) -> Row:
        return not_measured(metric, self.subject, self.target, reason, **{"resolution": self.resolution, **conditions})


@dataclass
class Timed:
    """What was timed of a case at one batch size and number of threads.

    Attributes:
        spent: seconds of timed calls so far.
        gpu: seconds by the GPU's own events; a sentence where they could not be taken; None on a CPU. cuda_graph: so replayed.
        energy: of calls apart from the timed ones, or why it could not be measured; None: not tried.
        warm: conditions of each warm-up. load: of each opening, what others did meanwhile.
    """

    case: Case
    batch: int
    conditions: dict[str, Any] = field(default_factory=dict)
    rounds: Rounds = field(default_factory=dict)
    spent: float = 0.0
    gpu: Rounds | str | None = None
    cuda_graph: bool = False
    energy: Energy | str | None = None
    warm: list[dict[str, Any]] = field(default_factory=list)
    load: list[dict[str, Any]] = field(default_factory=list)

    def finish(self) -> None:
        """Sum up warm-ups and load into the conditions."""
        self.conditions |= {
            "warmup_calls": sum(w["warmup_calls"] for w in self.warm),
            "settled": self.warm[0]["settled"],  # later ones are short: the machine is warm
            "load_average": self.load[0]["load_average"],  # later ones hold our own load
            "other_cores_busy": round(sum(x["other_cores_busy"] for x in self.load) / len(self.load), 2),
            "rounds": len(self.rounds),
            "openings": len({opening for opening, _ in self.rounds}),
            "measures": self.case.measures,
        }

    def n(self) -> int:
        return sum(map(len, self.rounds.values()))

    def p50(self) -> float:
        return timing.quantile(list(self.rounds.values()), 0.5)


def pictures(batch: int, resolution: int) -> Tensor:
    """[batch, 3, resolution, resolution] of seeded normal noise: a ViT's time does not depend on what is in the picture."""
    return torch.randn(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
