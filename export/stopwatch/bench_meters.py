"""The instruments beside the clock: energy counters, the GPU's state, its events. Each is asked only where there is something to read."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from export.stopwatch import energy, timing
from export.stopwatch.bench_case import Timed
from export.stopwatch.energy import IDLE_S, Energy, Meter
from export.stopwatch.gpu_state import NoNvml, State, gpu_state, state_conditions
from export.stopwatch.gpu_timing import GpuWork, captured, event_seconds, gpu_work
from export.stopwatch.timing import Clock, Runnable


@dataclass(frozen=True)
class Instruments:
    """What a machine has; tests bring their own.

    Attributes:
        meter_for: device -> its energy meter, or why there is none.
        state: of the GPU, or why it cannot be read.
        cuda: torch.cuda.
    """

    meter_for: Callable[[str], Meter | str] = energy.meter_for
    state: Callable[[], State | str] = gpu_state
    cuda: Any = torch.cuda
    sleep: Callable[[float], None] = time.sleep


REAL = Instruments()


class Meters:
    """The instruments of one benchmark: meters and idle powers are looked up once a device."""

    def __init__(self, instruments: Instruments, clock: Clock):
        self.instruments, self.clock = instruments, clock
        self.meters: dict[str, tuple[Meter, float] | str] = {}

    def gpu_state(self, runs: list[Runnable]) -> State | str | None:
        """The GPU's state, where one of these runs on it."""
        return self.instruments.state() if any(timing.on_gpu(r.conditions) for r in runs) else None

    def energy(self, run: Runnable, inputs: Any, seconds: float, most: int) -> Energy | str:
        """Joules of `seconds` of calls, at most `most`; why not, where nothing counts them."""
        device = "gpu" if timing.on_gpu(run.conditions) else "cpu"
        try:
            if device not in self.meters:
                self.meters[device] = self._meter(device)
            found = self.meters[device]
            if isinstance(found, str):
                return found
            meter, idle = found
            return energy.measure(meter, lambda: timing.call(run, inputs, self.clock), seconds, most, idle, self.clock)
        except (OSError, NoNvml) as e:
            return f"the energy could not be read: {e}."

    def _meter(self, device: str) -> tuple[Meter, float] | str:
        meter = self.instruments.meter_for(device)
        if isinstance(meter, str):
            return meter
        return meter, energy.idle_watts(meter, IDLE_S, self.instruments.sleep, self.clock)

    def gpu_work(self, run: Runnable, inputs: Any, graph: bool) -> GpuWork | str | None:
        """What to time with the GPU's events; None for what runs on a CPU."""
        if not timing.on_gpu(run.conditions):
            return None
        work = gpu_work(run, inputs)
        return work if isinstance(work, str) or not graph else captured(work, self.instruments.cuda)

    def event_seconds(self, work: GpuWork, calls: int) -> np.ndarray:
        return event_seconds(work, calls, self.instruments.cuda)


def note_state(timed: list[Timed], before: State | str | None, after: State | str | None) -> None:
    """Put the GPU's state before and after into the conditions of what ran on it."""
    for t in timed:
        if timing.on_gpu(t.conditions) and before is not None and after is not None:
            t.conditions.update(state_conditions(before, after))
