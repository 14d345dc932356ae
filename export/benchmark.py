"""The stopwatch: latency, throughput, load time and memory of encoders on the runtimes that serve them.

What makes the numbers comparable: every case is warmed up until its time settles; the cases then take turns in many short
rounds, so that a machine that slows down slows all of them; intervals come from resampling whole rounds; and the same artifact
opened twice tells how large a difference means nothing.
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
from torch import Tensor

from distill.config import Config
from distill.data.preprocess import Preprocess
from distill.encoder import Encoder
from distill.progress import Progress
from distill.rows import Row, not_measured
from export import timing
from export.artifact import Unrunnable
from export.fingerprint import usable_threads
from export.timing import Clock, Rounds

MEASURES = "one call: float32 images in host memory to float32 features in host memory, preprocessing apart"
PERCENTILE_99_NEEDS = 1000  # calls; with fewer, the 99th percentile is a handful of accidents
LEAST_CALLS = 3  # timed calls that even the slowest case gets


class BenchmarkConfig(Config):
    """How long and at which batches to time.

    Attributes:
        batches: images a call; every case is timed at each.
        seconds: timed seconds a case and batch (never fewer than 3 calls).
        rounds: turns that the cases take; `seconds` is spread over them.
        warmup_seconds: the most that a case is warmed up, at each batch; it ends earlier when the time has settled.
        max_calls: timed calls a case and batch at most.
        threads: of the CPU runtimes; None: as many as this process may use.
        photo: width and height in pixels of the decoded picture on which preprocessing is timed.
    """

    batches: list[int] = Field(default_factory=lambda: [1, 8])
    seconds: float = 2.0
    rounds: int = 20
    warmup_seconds: float = 2.0
    max_calls: int = 5000
    threads: int | None = None
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
        if self.max_calls < self.rounds:
            found.append(f"max_calls {self.max_calls} is below rounds {self.rounds}: some rounds would stay empty")
        if self.threads is not None and self.threads < 1:
            found.append(f"threads must be at least 1, got {self.threads}")
        if len(self.photo) != 2 or min(self.photo) < 1:
            found.append(f"photo must be a width and a height in pixels, got {self.photo}")
        return found


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        subject, target: as in Row, e.g. `students/small`, `onnx-int8`.
        resolution: side of the square input in pixels.
        open: number of threads -> a fresh Encoder; raises Unrunnable when this machine cannot execute it.
        size_bytes: of the file (or files) that is shipped; None: no size row.
        max_batch: the largest batch it accepts, if there is one.
        preprocess: of its images; None: no preprocessing row.
    """

    subject: str
    target: str
    resolution: int
    open: Callable[[int], Encoder]
    size_bytes: int | None = None
    max_batch: int | None = None
    preprocess: Preprocess | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.subject, self.target

    def takes(self, batch: int) -> bool:
        return self.max_batch is None or batch <= self.max_batch

    def row(self, metric: str, value: float, conditions: dict[str, Any], **rest: Any) -> Row:
        return Row(metric=metric, value=value, subject=self.subject, target=self.target, conditions=conditions, **rest)

    def missing(self, metric: str, reason: str, **conditions: Any) -> Row:
        return not_measured(metric, self.subject, self.target, reason, **{"resolution": self.resolution, **conditions})


@dataclass
class Timed:
    """What was timed of a case at one batch size."""

    case: Case
    batch: int
    conditions: dict[str, Any]
    rounds: Rounds = field(default_factory=dict)

    def n(self) -> int:
        return sum(map(len, self.rounds.values()))

    def p50(self) -> float:
        return timing.quantile(list(self.rounds.values()), 0.5)


Opened = list[tuple[Case, Encoder]]


def benchmark(
    config: BenchmarkConfig, cases: Sequence[Case], progress: Progress, clock: Clock = time.perf_counter
) -> list[Row]:
    """Time every case at every batch, interleaved with all others of its resolution.

    Rows a case: size_mb, load_s. A case and batch: latency_p50_ms with its interval, latency_p90_ms, latency_p99_ms (from 1,000
    calls on), latency_mean_ms, images_per_s, peak_memory_mb, and latency_ratio to fp32 with `conditions.verdict`. A subject and
    resolution: preprocess_p50_ms. A run: noise_floor_percent. What cannot run here gives "not measured" rows with the reason.
    `clock` counts seconds; tests bring their own.
    """
    threads = config.threads or usable_threads()
    rows: list[Row] = []
    groups: list[list[Timed]] = []
    twins: list[tuple[Timed, Timed]] = []
    with timing.torch_threads(threads), progress.task("benchmark", len(cases) * len(config.batches), "timings") as task:
        for resolution in sorted({c.resolution for c in cases}):
            chosen = [c for c in cases if c.resolution == resolution]
            opened: Opened = []
            for case in chosen:
                encoder, found = open_case(case, config, threads, clock)
                rows += found
                if encoder is None:
                    task.advance(len(config.batches))
                else:
                    opened.append((case, encoder))
            twin = open_twin(opened, threads)
            for batch in sorted(config.batches):
                fitting = [(case, encoder) for case, encoder in opened if case.takes(batch)]
                with_twin = [t for t in twin if t[0].takes(batch)]
                timed = time_batch(config, batch, fitting + with_twin, clock)
                if with_twin:
                    second = timed.pop()
                    twins.append((next(t for t in timed if t.case is second.case), second))
                groups.append(timed)
                task.advance(len(opened))
            rows += preprocess_rows(config, chosen, clock)
            del opened, fitting, with_twin, twin, encoder
            timing.release_memory()
    ratios = [timing.ratio(a.rounds, b.rounds)[0] for a, b in twins]
    floor = max((max(r, 1 / r) - 1 for r in ratios), default=None)
    rows += [row for timed in groups for t in timed for row in timing_rows(t)]
    rows += [floor_row(floor, twins)] if cases else []
    rows += [row for timed in groups for row in comparison_rows(timed, floor or 0.0)]
    return rows


def open_case(case: Case, config: BenchmarkConfig, threads: int, clock: Clock) -> tuple[Encoder | None, list[Row]]:
    """Open a case: its rows of size, load time and memory, and "not measured" rows for what it cannot do.

    It is opened twice: the first time pays for imports and a cold disk, which are the machine's and not the artifact's.
    """
    rows = []
    if case.size_bytes is not None:
        rows.append(case.row("size_mb", case.size_bytes / 1e6, {"resolution": case.resolution}))
    images = {batch: pictures(batch, case.resolution) for batch in sorted(config.batches) if case.takes(batch)}
    for batch in sorted(set(config.batches) - set(images)):
        reason = f"it takes at most {case.max_batch} images a call."
        rows += [case.missing(metric, reason, batch=batch) for metric in ("latency_p50_ms", "images_per_s")]
    try:
        first = case.open(threads)
        for x in images.values():
            first(x)
        del first
        timing.release_memory()
        before = timing.reset_peak()
        start = clock()
        encoder = case.open(threads)
        load_s = clock() - start
    except (Unrunnable, MemoryError, torch.OutOfMemoryError) as e:
        reason = str(e) if isinstance(e, Unrunnable) else "this machine has not enough memory for it."
        rows += [case.missing(metric, reason, batch=b) for b in images for metric in ("latency_p50_ms", "images_per_s")]
        return None, [*rows, case.missing("load_s", reason)]
    conditions = {"resolution": case.resolution, **encoder.conditions}
    how = "opened for the second time: libraries imported, file in the page cache"
    rows.append(case.row("load_s", load_s, {**conditions, "measures": how}, n=1))
    for batch, x in images.items():
        encoder(x)
        rows.append(memory_row(case, encoder, {**conditions, "batch": batch}, before))
        timing.release_memory()
        timing.reset_peak()
    return encoder, rows


def open_twin(opened: Opened, threads: int) -> Opened:
    """The A/A partner, opened once more: what others are compared with (ONNX FP32, else any FP32), else the first case."""
    ranked = sorted((case for case, _ in opened), key=lambda c: (c.target != "onnx-fp32", not c.target.endswith("fp32")))
    return [(case, case.open(threads)) for case in ranked[:1]]


def time_batch(config: BenchmarkConfig, batch: int, opened: Opened, clock: Clock) -> list[Timed]:
    """Warm every encoder up, then let them take turns in rounds, each round in another order."""
    timed, calls, once = [], [], []
    for case, encoder in opened:
        once.append(partial(timing.call, encoder, pictures(batch, case.resolution), clock))
        seconds, warm = timing.warm_up(once[-1], config.warmup_seconds)
        timed.append(Timed(case, batch, {"resolution": case.resolution, "batch": batch, **encoder.conditions, **warm}))
        calls.append(calls_a_round(config, seconds))
    order = np.random.default_rng(0)
    spent = np.zeros(len(opened))
    load = timing.OtherLoad()
    for r in range(config.rounds):
        for i in order.permutation(len(opened)):
            taken: list[float] = []
            if calls[i] > 1:
                once[i]()  # untimed: it finds the caches, and perhaps still the threads, of the case before
            limit = min(2 * config.seconds / config.rounds, config.seconds - spent[i])  # a round that got slow ends early
            while len(taken) < calls[i] and (sum(taken) < limit or (r < LEAST_CALLS and not taken)):
                taken.append(once[i]())
            spent[i] += sum(taken)
            if taken:
                timed[i].rounds[r] = np.array(taken)
                left = (config.seconds - spent[i]) / max(config.rounds - r - 1, 1)
                calls[i] = max(1, min(calls[i], int(left / max(np.median(taken), 1e-9))))  # slower than it was: stay in time
    beside = load.read()
    for t in timed:
        t.conditions.update(beside, rounds=len(t.rounds), measures=MEASURES)
    return timed


def calls_a_round(config: BenchmarkConfig, seconds: float) -> int:
    """So many calls of `seconds` that all rounds together take `config.seconds` and at most `config.max_calls`; at least 1."""
    return max(1, int(min(config.seconds / max(seconds, 1e-9), config.max_calls) / config.rounds))


def timing_rows(t: Timed) -> list[Row]:
    """Latency and throughput of one case at one batch."""
    rounds, n = list(t.rounds.values()), t.n()

    def row(metric: str, value: float, low: float | None = None, high: float | None = None) -> Row:
        return t.case.row(metric, value, t.conditions, low=low, high=high, n=n)

    p50 = [s * 1e3 for s in timing.median_interval(rounds) or ()]
    rate = [t.batch / s for s in reversed(timing.mean_interval(rounds) or ())]
    rows = [
        row("latency_p50_ms", t.p50() * 1e3, *p50),
        row("latency_p90_ms", timing.quantile(rounds, 0.9) * 1e3),
        row("latency_mean_ms", timing.mean(rounds) * 1e3),
        row("images_per_s", t.batch / timing.mean(rounds), *rate),
    ]
    return rows + ([row("latency_p99_ms", timing.quantile(rounds, 0.99) * 1e3)] if n >= PERCENTILE_99_NEEDS else [])


def comparison_rows(timed: list[Timed], floor: float) -> list[Row]:
    """latency_ratio of each case to fp32 (0.5: half the time); the interval is widened by the noise floor, then judged."""
    by_key = {t.case.key: t for t in timed}
    rows = []
    for t in timed:
        for base in references(t.case, by_key):
            ratio, interval = timing.ratio(t.rounds, base.rounds)
            low, high = interval or (None, None)
            low, high = low and low / (1 + floor), high and high * (1 + floor)
            conditions = {
                **t.conditions,
                "versus": f"{base.case.subject}/{base.case.target}",
                "versus_runtime": base.conditions.get("runtime"),
                "versus_device": base.conditions.get("device"),
                "noise_floor_percent": round(floor * 100, 3),
                "verdict": timing.verdict(low, high),
                "measures": "median over rounds of the ratio of median times a call",
            }
            n = min(t.n(), base.n())
            rows.append(t.case.row("latency_ratio", ratio, conditions, low=low, high=high, n=n))
    return rows


def references(case: Case, timed: dict[tuple[str, str], Timed]) -> list[Timed]:
    """What a case is compared with: its own fp32 (ONNX's if there, else PyTorch's), and for a student the teacher likewise."""
    own = [timed[k] for k in ((case.subject, "onnx-fp32"), (case.subject, "torch-fp32")) if k in timed][:1]
    teacher = [timed[k] for k in [("teacher", case.target)] if k in timed and case.subject.startswith("students/")]
    return [t for t in own + teacher if t.case.key != case.key]


def floor_row(floor: float | None, twins: list[tuple[Timed, Timed]]) -> Row:
    """The largest difference that an artifact, opened twice, showed against itself; n is the number of such pairs."""
    if floor is None:
        return not_measured("noise_floor_percent", "all", "all", "nothing could be timed on this machine.")
    conditions = {
        "artifacts": ", ".join(sorted({f"{t.case.subject} {t.case.target}" for t, _ in twins})),
        "measures": "largest difference in time of one artifact opened twice, over resolutions and batches",
    }
    return Row(
        metric="noise_floor_percent", value=floor * 100, n=len(twins), subject="all", target="all", conditions=conditions
    )


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


def pictures(batch: int, resolution: int) -> Tensor:
    """[batch, 3, resolution, resolution] of seeded normal noise: a ViT's time does not depend on what is in the picture."""
    return torch.randn(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))


def memory_row(case: Case, encoder: Encoder, conditions: dict[str, Any], before: int | None) -> Row:
    """peak_memory_mb of an encoder that was just opened and called; `before`: resident bytes before it was opened."""
    reason = None
    if str(encoder.conditions.get("device", "cpu")).startswith("cuda"):
        if str(encoder.conditions.get("runtime", "")).startswith("torch") and torch.cuda.is_available():
            value, how = torch.cuda.max_memory_allocated(encoder.conditions["device"]), "allocated by PyTorch on the GPU"
        else:
            reason = "this runtime does not tell how much GPU memory it holds."
    elif before is None:
        reason = "only Linux lets a process restart its memory high-water mark."
    else:
        value, how = timing.peak_bytes() - before, "growth of the process's peak resident memory by opening and calling it"
        reason = "it fitted into memory that the process held already." if value <= 0 else None
    if reason:
        return not_measured("peak_memory_mb", case.subject, case.target, reason, **conditions)
    return case.row("peak_memory_mb", value / 1e6, {**conditions, "measures": how}, n=1)
