"""The surroundings of a training: settings that cannot change results, its log, signals, memory, the number format of the machine."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distill.config import Config
from distill.errors import EnvironmentFailed
from distill.files import write_text

PATIENCE = 5.0  # seconds; launchers repeat a signal within one


class RuntimeConfig(Config):
    """What cannot change results beyond rounding; outside every content key. "Bit for bit" holds at one number of threads: do not
    change it between a kill and the run that continues. (`micro_batch` with stochastic depth is an exception: each piece draws anew.)

    Attributes:
        workers: processes that make crops; null: 1 on up to 4 cores, else half of the cores, at most 8.
        threads: CPU threads of the matrix products; null: all cores.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two lines of train.jsonl.
        micro_batch: images that a process takes through its networks at once; null: its whole share of the batch. Gradients are summed.
        recompute_blocks: keep only the blocks' inputs for the backward pass (activation checkpointing): a third more work, memory that
            hardly grows with depth.
        compile: run blocks through torch.compile. On a CPU it is slower than the blocks written out (tests/benchmarks/README.md).
        shard: spread parameters, gradients and optimiser over the processes (FSDP2) instead of copying them to each.
    """

    workers: int | None = None
    threads: int | None = None
    checkpoint_every: int = 200
    log_every: int = 10
    micro_batch: int | None = None
    recompute_blocks: bool = False
    compile: bool = False
    shard: bool = False

    def problems(self) -> list[str]:
        found = []
        if self.workers is not None and self.workers < 0:
            found.append(f"workers must be at least 0, got {self.workers}")
        if self.threads is not None and self.threads < 1:
            found.append(f"threads must be at least 1, got {self.threads}")
        if self.micro_batch is not None and self.micro_batch < 1:
            found.append(f"micro_batch must be at least 1 image, got {self.micro_batch}")
        if min(self.checkpoint_every, self.log_every) < 1:
            found.append("checkpoint_every and log_every must be at least 1")
        return found


class TrainLog:
    """train.jsonl: one JSON object a logged step; resuming drops the lines of steps that will be done again.

    Attributes:
        seconds, cpu_seconds: what training took before it was resumed; CPU time is this process's, without the loader's workers.
    """

    def __init__(self, path: Path, start: int):
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < start]
        write_text(path, "".join(line + "\n" for line in kept))
        self.path = path
        self.seconds = max((json.loads(line).get("seconds", 0.0) for line in kept), default=0.0)
        self.cpu_seconds = max((json.loads(line).get("cpu_seconds", 0.0) for line in kept), default=0.0)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line; a value that is not finite becomes null."""
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({k: _loggable(k, v) for k, v in values.items()}, allow_nan=False) + "\n")


def _loggable(name: str, value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return value if name == "lr" else round(value, 6)


def _whole_lines(path: Path) -> list[str]:
    """Lines that are complete JSON: a kill may have cut the last one."""
    if not path.exists():
        return []
    whole = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line)
        except json.JSONDecodeError:
            break
        whole.append(line)
    return whole


class StopFlag:
    """True once a signal came."""

    def __init__(self) -> None:
        self.raised = False

    def __bool__(self) -> bool:
        return self.raised


@contextmanager
def stop_requests() -> Iterator[StopFlag]:
    """SIGTERM and SIGINT set the flag, so that the loop ends after a whole step; outside the main thread nothing is installed.

    Asked again after a while, the loop ends at once: its step may be waiting for data that never come.
    """
    flag = StopFlag()
    asked = math.inf

    def handler(signum: int, frame: Any) -> None:
        nonlocal asked
        if time.monotonic() - asked > PATIENCE:
            raise KeyboardInterrupt
        asked = min(asked, time.monotonic())
        flag.raised = True

    try:
        before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield flag
    finally:
        for s, old in before.items():
            signal.signal(s, old)


@contextmanager
def cpu_threads(n: int | None) -> Iterator[None]:
    """torch with n CPU threads, and what it had before afterwards: later stages must not depend on whether this one ran or was skipped."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def out_of_memory_sentence(batch: int, local_crops: int) -> Iterator[None]:
    """Out of memory, on whichever device, becomes a sentence that names what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        text = str(e)
        if isinstance(e, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in text or "out of memory" in text:
            raise EnvironmentFailed(
                f"Out of memory with batch {batch} and 2 + {local_crops} crops an image. "
                "Lower batch, crops.local_count or the number of prototypes, and run the same command again."
            ) from e
        raise


def uses_bf16(precision: str, width: int) -> bool:
    """Resolve `auto`. On a CPU bf16 pays with native instructions and matrices large enough for the casts: 1.33 times the
    images a second at width 192 and 224 px, 0.94 at width 96 and 32 px (tests/benchmarks/README.md).
    """
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return width >= 192 and native_bf16()


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself (AVX512-BF16 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def default_workers(asked: int | None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked if asked is not None else 1 if cores <= 4 else min(8, cores // 2)
