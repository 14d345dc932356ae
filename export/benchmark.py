"""The stopwatch: latency, throughput, load time, memory and energy of encoders, and of any graph, on the runtimes that serve them.

What makes the numbers comparable: every case is warmed up until its time settles; the cases then take turns in many short
rounds, so that a machine that slows down slows all of them; everything is opened anew several times, as what is opened twice differs
from itself, and intervals are over openings; and the same artifact opened beside itself tells how large a difference means nothing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from distill.config import Config
from distill.data.preprocess import Preprocess
from distill.progress import Progress, Task
from distill.rows import Row
from export.artifact import Unrunnable
from export.fingerprint import usable_threads
from export.stopwatch import timing
from export.stopwatch.bench_case import MEASURES, Case, Timed, pictures
from export.stopwatch.bench_meters import REAL, Instruments, Meters, note_state
from export.stopwatch.bench_rows import (
    PERCENTILE_99_NEEDS,
    Base,
    Twins,
    comparison_rows,
    floor_row,
    load_row,
    memory_row,
    timing_rows,
)
from export.stopwatch.gpu_state import State
from export.stopwatch.timing import Clock, Runnable

__all__ = ["MEASURES", "PERCENTILE_99_NEEDS", "BenchmarkConfig", "Case", "Timed", "benchmark", "pictures", "time_batch"]

LEAST_CALLS = 3  # timed calls that even the slowest case gets


class BenchmarkConfig(Config):
    """How long and at which batches to time.

    Attributes:
        batches: images a call; every case is timed at each.
        seconds: timed seconds a case and batch (never fewer than 3 calls).
        rounds: turns that the cases take; `seconds` is spread over them.
        openings: how often everything is opened anew; the rounds are spread over them, and intervals are over openings.
        warmup_seconds: the most that a case is warmed up, at each batch; it ends earlier when the time has settled.
        max_calls: timed calls a case and batch at most.
        threads: of the CPU runtimes; several are measured one after the other; None: as many as this process may use.
        cuda_graph: whether the network alone on a GPU is replayed from a CUDA graph instead of launched kernel by kernel.
        photo: width and height in pixels of the decoded picture on which preprocessing is timed.
    """

    batches: list[int] = Field(default_factory=lambda: [1, 8])
    seconds: float = 2.0
    rounds: int = 20
    openings: int = 5
    warmup_seconds: float = 2.0
    max_calls: int = 5000
    threads: int | list[int] | None = None
    cuda_graph: bool = False
    photo: list[int] = Field(default_factory=lambda: [640, 480])

    def problems(self) -> list[str]:
        """What contradicts itself in these settings, one sentence each."""
        found = []
        if not self.batches or min(self.batches) < 1:
            found.append(f"batches must name at least one batch size of at least 1, got {self.batches}")
        if len(set(self.batches)) != len(self.batches):
            found.append(f"batches names a size twice: {self.batches}")
        if not 0 < self.seconds < float("inf"):
            found.append(f"seconds must be above 0, got {self.seconds}")
        if not 0 <= self.warmup_seconds < float("inf"):
            found.append(f"warmup_seconds must be at least 0, got {self.warmup_seconds}")
        if self.rounds < timing.INTERVAL_NEEDS:
            found.append(f"rounds must be at least {timing.INTERVAL_NEEDS} for an interval to mean anything, got {self.rounds}")
        if not timing.OPENINGS_NEEDED <= self.openings <= max(self.rounds, timing.OPENINGS_NEEDED):
            found.append(f"openings must be at least {timing.OPENINGS_NEEDED} and at most rounds, got {self.openings}")
        if self.max_calls < self.rounds:
            found.append(f"max_calls {self.max_calls} is below rounds {self.rounds}: some rounds would stay empty")
        counts = self.threads if isinstance(self.threads, list) else [1 if self.threads is None else self.threads]
        if not counts or min(counts) < 1 or len(set(counts)) != len(counts):
            found.append(f"threads must be at least 1, each number once, got {self.threads}")
        if len(self.photo) != 2 or min(self.photo) < 1:
            found.append(f"photo must be a width and a height in pixels, got {self.photo}")
        return found

    def thread_counts(self) -> list[int]:
        """The numbers of threads to measure with."""
        return list(self.threads) if isinstance(self.threads, list) else [self.threads or usable_threads()]


Opened = list[tuple[Case, Runnable]]


@dataclass
class Member:
    """A case, or its twin, while its group is timed: opened or not, what was timed by batch, and seconds of its openings."""

    case: Case
    run: Runnable | None
    timed: dict[int, Timed]
    loads: list[float] = field(default_factory=list)

    def due(self, config: BenchmarkConfig, opening: int) -> bool:
        """Whether it has seconds left for this opening; a slow case has used up those of the later ones."""
        return any(t.spent < budget(config, opening, config.openings) for t in self.timed.values())


@dataclass
class Found:
    """What a benchmark has so far: rows, what was timed by group (one batch, resolution and number of threads), and the twins."""

    rows: list[Row] = field(default_factory=list)
    groups: list[list[Timed]] = field(default_factory=list)
    twins: Twins = field(default_factory=list)


def benchmark(
    config: BenchmarkConfig,
    cases: Sequence[Case],
    progress: Progress,
    clock: Clock = time.perf_counter,
    base: Base | None = None,
    instruments: Instruments = REAL,
) -> list[Row]:
    """Time every case at every batch and number of threads, interleaved with all others of its resolution.

    Rows a case: size_mb, build_s where it is known; load_s. A case and batch: latency_p50_ms with its interval, latency_p90_ms,
    latency_p99_ms (from 1,000 calls on), latency_mean_ms, images_per_s, peak_memory_mb, energy_mj_per_image, gpu_latency_p50_ms on a
    GPU, and latency_ratio to `base` (without one to fp32) with `conditions.verdict`. A subject and resolution: preprocess_p50_ms. A
    run: noise_floor_percent. What cannot run here gives "not measured" rows with the reason. Where `config.threads` is a list,
    `conditions.threads` is in every row of a case but its size.

    Args:
        clock: counts seconds; tests bring their own, and their own `instruments`.
        base: subject and target of what every other case is compared with.
    """
    found, meters = Found(), Meters(instruments, clock)
    total = len(cases) * len(config.batches) * config.openings * len(config.thread_counts())
    for case in cases:
        found.rows += constant_rows(case)
    with progress.task("benchmark", total, "timings") as task:
        for i, threads in enumerate(config.thread_counts()):
            with timing.torch_threads(threads):
                for resolution in sorted({c.resolution for c in cases}, key=lambda r: r or 0):
                    chosen = [c for c in cases if c.resolution == resolution]
                    time_group(config, threads, chosen, found, meters, task, base)
                    found.rows += preprocess_rows(config, chosen, clock) if i == 0 else []
    ratios = [timing.ratio(a.rounds, b.rounds)[0] for a, b in found.twins if a.rounds.keys() & b.rounds.keys()]
    floor = max((max(r, 1 / r) - 1 for r in ratios), default=None)
    rows = found.rows + [row for timed in found.groups for t in timed for row in timing_rows(t)]
    rows += [floor_row(floor, found.twins)] if cases else []
    return rows + [row for timed in found.groups for row in comparison_rows(timed, floor or 0.0, base)]


def constant_rows(case: Case) -> list[Row]:
    """size_mb and build_s, as far as they are known."""
    where = {"resolution": case.resolution}
    rows = [] if case.size_bytes is None else [case.row("size_mb", case.size_bytes / 1e6, where)]
    return rows + ([] if case.build_s is None else [case.row("build_s", case.build_s, where, n=1)])


def time_group(
    config: BenchmarkConfig, threads: int, cases: list[Case], found: Found, meters: Meters, task: Task, base: Base | None
) -> None:
    """All cases of one resolution on so many threads: opened, timed, closed and opened again, `config.openings` times."""
    grid = {"threads": threads} if isinstance(config.threads, list) else {}
    members = []
    for case in cases:
        member, rows = first_opening(case, config, threads, meters.clock, grid)
        found.rows += rows
        members += [member] if member else []
        task.advance(0 if member else len(config.batches) * config.openings)
    twins = [Member(c, c.open(threads), {b: Timed(c, b) for b in config.batches if c.takes(b)}) for c in twin_of(members, base)]
    order = np.random.default_rng(0)
    states: dict[int, State | str | None] = {}
    for opening in range(config.openings):
        if opening:
            open_again([*members, *twins], config, opening, threads, meters.clock, order)
        for batch in sorted(config.batches):
            state = one_opening(config, batch, [*members, *twins], opening, grid, meters)
            states.setdefault(batch, state)
            task.advance(len(members))
    for batch in sorted(config.batches):
        timed = [m.timed[batch] for m in members if batch in m.timed]
        after = None if states[batch] is None else meters.instruments.state()
        for t in (*timed, *(m.timed[batch] for m in twins if batch in m.timed)):
            t.finish()
        note_state(timed, states[batch], after)
        found.groups.append(timed)
        found.twins += [(t, m.timed[batch]) for m in twins for t in timed if t.case is m.case]
    found.rows += [load_row(m.case, m.loads, next(iter(m.timed.values())).conditions) for m in members if m.timed]


def one_opening(
    config: BenchmarkConfig, batch: int, members: list[Member], opening: int, grid: dict[str, Any], meters: Meters
) -> State | str | None:
    """The rounds of one batch and opening; the state that the GPU was in before. Nothing outlives it: the next opening frees them."""
    turn = [m for m in members if m.run is not None and batch in m.timed]
    runs: Opened = [(m.case, m.run) for m in turn if m.run is not None]
    state = meters.gpu_state([run for _, run in runs])
    time_batch(config, batch, runs, meters.clock, [m.timed[batch] for m in turn], opening, config.openings, grid, meters)
    return state


def first_opening(
    case: Case, config: BenchmarkConfig, threads: int, clock: Clock, grid: dict[str, Any]
) -> tuple[Member | None, list[Row]]:
    """Open a case, twice: the first time pays for imports and a cold disk, which are the machine's and not the artifact's.

    Gives its rows of memory, and "not measured" rows for what it cannot do; None where this machine cannot execute it.
    """
    fitting = [batch for batch in sorted(config.batches) if case.takes(batch)]
    rows = []
    for batch in sorted(config.batches):
        if reason := case.why_not(batch):
            rows += [case.missing(m, reason, batch=batch, **grid) for m in ("latency_p50_ms", "images_per_s")]
    try:
        first = case.open(threads)
        fed = {batch: case.feed(batch) for batch in fitting}
        for inputs in fed.values():
            first(inputs)
        del first
        timing.release_memory()
        before = timing.reset_peak()
        start = clock()
        run = case.open(threads)
        load_s = clock() - start
    except (Unrunnable, MemoryError, torch.OutOfMemoryError) as e:
        reason = str(e) if isinstance(e, Unrunnable) else "this machine has not enough memory for it."
        rows += [case.missing(m, reason, batch=b, **grid) for b in fitting for m in ("latency_p50_ms", "images_per_s")]
        return None, [*rows, case.missing("load_s", reason, **grid)]
    for batch, inputs in fed.items():
        run(inputs)
        conditions = {"resolution": case.resolution, **grid, **run.conditions, "batch": batch}
        rows.append(memory_row(case, run, conditions, before))
        timing.release_memory()
        timing.reset_peak()
    return Member(case, run, {batch: Timed(case, batch) for batch in fed}, [load_s]), rows


def open_again(
    members: list[Member], config: BenchmarkConfig, opening: int, threads: int, clock: Clock, order: np.random.Generator
) -> None:
    """Close everything and open it in another order: where in memory something lands depends on what was opened before."""
    for m in members:
        m.run = None
    timing.release_memory()
    for i in order.permutation(len(members)):
        if members[i].due(config, opening):
            start = clock()
            members[i].run = members[i].case.open(threads)
            members[i].loads.append(clock() - start)


def twin_of(members: list[Member], base: Base | None) -> list[Case]:
    """What is opened once more beside itself: what others are compared with (ONNX FP32, else any FP32), else the first case."""
    ranked = sorted(
        (m.case for m in members if m.timed),
        key=lambda c: (c.key != base, c.target != "onnx-fp32", not c.target.endswith("fp32")),
    )
    return ranked[:1]


def time_batch(
    config: BenchmarkConfig,
    batch: int,
    opened: Opened,
    clock: Clock,
    timed: list[Timed] | None = None,
    opening: int = 0,
    openings: int = 1,
    grid: dict[str, Any] | None = None,
    meters: Meters | None = None,
) -> list[Timed]:
    """Warm everything up, then let it take turns in rounds, each round in another order: the rounds of one of `openings` openings.

    Adds to `timed`, one for each of `opened`; makes them where there are none. With `meters` also energy (once) and the GPU's events.
    """
    alone = timed is None
    timed = [Timed(case, batch) for case, _ in opened] if timed is None else timed
    once, calls, gpu = [], [], []
    for t, (case, run) in zip(timed, opened, strict=True):
        inputs = case.feed(batch)
        run(inputs)  # some compile at the first call of a batch
        once.append(partial(timing.call, run, inputs, clock))
        seconds, warm = timing.warm_up(once[-1], config.warmup_seconds / (1 if opening == 0 else openings))
        t.warm.append(warm)
        t.conditions |= {"resolution": case.resolution, "batch": batch, **(grid or {}), **run.conditions}
        calls.append(calls_a_round(config, seconds))
        gpu.append(None if meters is None else meters.gpu_work(run, inputs, config.cuda_graph))
        t.cuda_graph = config.cuda_graph
        if meters is not None and opening == 0:
            t.energy = meters.energy(run, inputs, config.seconds, config.max_calls)
    order = np.random.default_rng(opening)
    load = timing.OtherLoad()
    first, last = (i * config.rounds // openings for i in (opening, opening + 1))
    for r in range(first, last):
        for i in order.permutation(len(opened)):
            taken = one_round(config, timed[i], once[i], calls[i], r, budget(config, opening, openings))
            if taken:
                timed[i].rounds[opening, r] = np.array(taken)
                left = (budget(config, opening, openings) - timed[i].spent) / max(last - r - 1, 1)
                calls[i] = max(1, min(calls[i], int(left / max(np.median(taken), 1e-9))))  # slower than it was: stay in time
    for t in timed:
        t.load.append(load.read())
    if meters is not None:
        time_gpu(timed, gpu, calls, range(first, last), opening, order, meters)
    for t in timed if alone else []:
        t.finish()
    return timed


def one_round(config: BenchmarkConfig, t: Timed, once: Callable[[], float], calls: int, r: int, until: float) -> list[float]:
    """Seconds of the calls of one turn; none when the case has spent its time."""
    limit = min(2 * config.seconds / config.rounds, until - t.spent)  # a round that got slow ends early
    forced = r < LEAST_CALLS
    if limit <= 0 and not forced:
        return []
    if calls > 1:
        once()  # untimed: it finds the caches, and perhaps still the threads, of the case before
    taken: list[float] = []
    while len(taken) < calls and (sum(taken) < limit or (forced and not taken)):
        taken.append(once())
    t.spent += sum(taken)
    return taken


def time_gpu(
    timed: list[Timed],
    works: list[Any],
    calls: list[int],
    rounds: range,
    opening: int,
    order: np.random.Generator,
    meters: Meters,
) -> None:
    """The same rounds by the GPU's own events, for what runs on one."""
    for t, work in zip(timed, works, strict=True):
        if work is not None and not isinstance(t.gpu, str):
            t.gpu = work if isinstance(work, str) else t.gpu or {}
    for r in rounds:
        for i in order.permutation(len(timed)):
            found = timed[i].gpu
            if isinstance(found, dict):
                meters.event_seconds(works[i], 1)
                found[opening, r] = meters.event_seconds(works[i], calls[i])


def budget(config: BenchmarkConfig, opening: int, openings: int) -> float:
    """Seconds that a case may have spent when this opening ends."""
    return config.seconds * (opening + 1) / openings


def calls_a_round(config: BenchmarkConfig, seconds: float) -> int:
    """So many calls of `seconds` that all rounds together take `config.seconds` and at most `config.max_calls`; at least 1."""
    return max(1, int(min(config.seconds / max(seconds, 1e-9), config.max_calls) / config.rounds))


def preprocess_rows(config: BenchmarkConfig, cases: Sequence[Case], clock: Clock) -> list[Row]:
    """preprocess_p50_ms a subject: one decoded picture to the network's input, on one thread of this process."""
    width, height = config.photo
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    cost: dict[Preprocess, list[np.ndarray]] = {}
    rows: dict[str, Row] = {}
    for case in cases:
        if case.preprocess is None or case.subject in rows:
            continue
        if case.preprocess not in cost:
            cost[case.preprocess] = time_preprocess(partial(case.preprocess, photo), config, clock)
        rounds = cost[case.preprocess]
        low, high = timing.median_interval(rounds) or (None, None)
        rows[case.subject] = Row(
            metric="preprocess_p50_ms",
            value=timing.quantile(rounds, 0.5) * 1e3,
            low=low and low * 1e3,
            high=high and high * 1e3,
            n=sum(map(len, rounds)),
            subject=case.subject,
            target="preprocess",
            conditions={
                "resolution": case.resolution,
                "photo": f"{width} x {height}",
                "measures": "a decoded RGB picture to the float32 input, one at a time",
            },
        )
    return list(rows.values())


def time_preprocess(once: Callable[[], Any], config: BenchmarkConfig, clock: Clock) -> list[np.ndarray]:
    """Seconds a call, in rounds of equally many calls."""

    def timed() -> float:
        start = clock()
        once()
        return clock() - start

    seconds, _ = timing.warm_up(timed, config.warmup_seconds)
    return [np.array([timed() for _ in range(calls_a_round(config, seconds))]) for _ in range(config.rounds)]
