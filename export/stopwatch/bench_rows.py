"""What the stopwatch found, as rows: latencies and throughput, GPU time alone, comparisons with their verdicts, noise floor, memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distill.rows import Row, not_measured
from export.stopwatch import timing
from export.stopwatch.bench_case import Case, Timed
from export.stopwatch.timing import Runnable

PERCENTILE_99_NEEDS = 1000  # calls; with fewer, the 99th percentile is a handful of accidents
Twins = list[tuple[Timed, Timed]]  # an artifact, and the same opened beside it
Base = tuple[str, str]  # subject and target


def timing_rows(t: Timed) -> list[Row]:
    """Latency and throughput of one case at one batch, what its GPU takes alone, and energy."""
    rounds, n = list(t.rounds.values()), t.n()
    mean = timing.mean(rounds)

    def row(metric: str, value: float, interval: tuple[float, float] | None = None) -> Row:
        low, high = interval or (None, None)
        return t.case.row(metric, value, t.conditions, low=low, high=high, n=n)

    around = timing.opening_interval(t.rounds, timing.mean, mean)
    rows = [
        row("latency_p50_ms", t.p50() * 1e3, milliseconds(timing.opening_interval(t.rounds, median, t.p50()))),
        row("latency_p90_ms", timing.quantile(rounds, 0.9) * 1e3),
        row("latency_mean_ms", mean * 1e3, milliseconds(around)),
        row("images_per_s", t.batch / mean, around and (t.batch / around[1], t.batch / around[0])),
    ]
    if n >= PERCENTILE_99_NEEDS:
        rows.append(row("latency_p99_ms", timing.quantile(rounds, 0.99) * 1e3))
    return [*rows, *gpu_rows(t), *energy_rows(t)]


def gpu_rows(t: Timed) -> list[Row]:
    """gpu_latency_p50_ms; nothing for a CPU."""
    if t.gpu is None:
        return []
    conditions = {
        **t.conditions,
        "cuda_graph": t.cuda_graph,
        "measures": "the network alone, by CUDA events: inputs and outputs stay on the GPU",
    }
    if isinstance(t.gpu, str):
        return [not_measured("gpu_latency_p50_ms", *t.case.key, t.gpu, **conditions)]
    value = median(list(t.gpu.values()))
    low, high = milliseconds(timing.opening_interval(t.gpu, median, value)) or (None, None)
    n = sum(map(len, t.gpu.values()))
    return [t.case.row("gpu_latency_p50_ms", value * 1e3, conditions, low=low, high=high, n=n)]


def energy_rows(t: Timed) -> list[Row]:
    """energy_mj_per_image: all that the meter counted while calls ran one after another, idle power included; that is stated apart."""
    if t.energy is None:
        return []
    if isinstance(t.energy, str):
        return [not_measured("energy_mj_per_image", *t.case.key, t.energy, **t.conditions)]
    e = t.energy
    how = "energy of calls one after another, idle power and whatever else runs included"
    conditions = {
        **t.conditions,
        "idle_w": e.idle_w,
        "mean_w": e.joules / e.seconds,
        "energy_source": e.source,
        "measures": how,
    }
    return [t.case.row("energy_mj_per_image", e.joules * 1e3 / (e.calls * t.batch), conditions, n=e.calls)]


def median(rounds: Sequence[np.ndarray]) -> float:
    return timing.quantile(rounds, 0.5)


def milliseconds(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return interval and (interval[0] * 1e3, interval[1] * 1e3)


def comparison_rows(timed: list[Timed], floor: float, base: Base | None = None) -> list[Row]:
    """latency_ratio of each case to `base`, else to fp32 (0.5: half the time); the interval is widened by the noise floor, then judged.

    timed: of one batch, resolution and number of threads.
    """
    by_key = {t.case.key: t for t in timed}
    rows = []
    for t in timed:
        chosen = references(t.case, by_key) if base is None else [by_key[k] for k in (base,) if k in by_key and k != t.case.key]
        for reference in chosen:
            ratio, interval = timing.ratio(t.rounds, reference.rounds)
            low, high = interval or (None, None)
            low, high = low and low / (1 + floor), high and high * (1 + floor)
            conditions = {
                **t.conditions,
                "versus": f"{reference.case.subject}/{reference.case.target}",
                "versus_runtime": reference.conditions.get("runtime"),
                "versus_device": reference.conditions.get("device"),
                "noise_floor_percent": round(floor * 100, 3),
                "verdict": timing.verdict(low, high),
                "measures": "mean over openings of the median over rounds of the ratio of median times a call",
            }
            n = min(t.n(), reference.n())
            rows.append(t.case.row("latency_ratio", ratio, conditions, low=low, high=high, n=n))
    return rows


def references(case: Case, timed: dict[tuple[str, str], Timed]) -> list[Timed]:
    """What a case is compared with: its own fp32 (ONNX's if there, else PyTorch's), and for a student the teacher likewise."""
    own = [timed[k] for k in ((case.subject, "onnx-fp32"), (case.subject, "torch-fp32")) if k in timed][:1]
    teacher = [timed[k] for k in [("teacher", case.target)] if k in timed and case.subject.startswith("students/")]
    return [t for t in own + teacher if t.case.key != case.key]


def floor_row(floor: float | None, twins: Twins) -> Row:
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


def load_row(case: Case, seconds: list[float], conditions: dict[str, Any]) -> Row:
    """load_s: the median opening but the very first, which pays for imports and a cold disk: the machine's, not the artifact's."""
    how = "opened again: libraries imported, file in the page cache"
    return case.row("load_s", float(np.median(seconds)), {**conditions, "measures": how}, n=len(seconds))


def memory_row(case: Case, encoder: Runnable, conditions: dict[str, Any], before: int | None) -> Row:
    """peak_memory_mb of an encoder that was just opened and called; `before`: resident bytes before it was opened."""
    reason = None
    if timing.on_gpu(encoder.conditions):
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
