"""How one thing is timed honestly: waiting for GPUs, warm-up until settled, intervals over openings, load of others, peak memory."""

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import psutil
import torch
from scipy.special import stdtrit

INTERVAL_NEEDS = 6  # rounds; a bootstrap over fewer is too narrow
OPENINGS_NEEDED = 3  # an interval over two openings would be 13 standard errors wide
RESAMPLES = 1000
Verdict = Literal["FASTER", "SLOWER", "INCONCLUSIVE"]
Clock = Callable[[], float]
Rounds = dict[tuple[int, int], np.ndarray]  # (opening, round) -> seconds of its calls; a slow case has no part in the last ones


class Runnable(Protocol):
    """What is timed: an Encoder on images, or any graph on whatever it takes. `conditions` as of an Encoder."""

    conditions: dict

    def __call__(self, inputs: Any, /) -> object: ...


def on_gpu(conditions: dict[str, Any]) -> bool:
    """Whether a runtime works on a GPU: `device` is `cuda`, `cuda:0` or a GPU's name."""
    return conditions.get("device", "cpu") != "cpu"


def call(run: Runnable, inputs: Any, clock: Clock) -> float:
    """Seconds of one call. A GPU is waited for on both sides: when a call returns, its work may be queued and not done."""
    cuda = on_gpu(run.conditions) and torch.cuda.is_available()
    device = str(run.conditions["device"]) if cuda and str(run.conditions["device"]).startswith("cuda") else None
    if cuda:
        torch.cuda.synchronize(device)
    start = clock()
    run(inputs)
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - start


def warm_up(once: Callable[[], float], limit: float) -> tuple[float, dict[str, Any]]:
    """Call until the medians of two windows in a row agree within 3 %, for a quarter of `limit` seconds to all of it.

    Returns seconds a call at the end, and the conditions warmup_calls and settled.
    """
    taken, settled, look = [once()], False, 10
    spent = taken[0]
    while spent < limit and not settled:
        taken.append(once())
        spent += taken[-1]
        window = max(5, len(taken) // 4)
        if len(taken) >= look and spent > limit / 4:  # clocks stay low for a while at an even pace
            look = len(taken) + max(1, len(taken) // 20)  # rarely: looking takes longer than a call of microseconds
            before, now = np.median(taken[-2 * window : -window]), np.median(taken[-window:])
            settled = bool(abs(now - before) <= 0.03 * before)
    return float(np.median(taken[-5:])), {"warmup_calls": len(taken), "settled": settled}


# Every round counts the same, however many calls it had: a round that is slow holds fewer of them, and would otherwise
# vanish. Intervals inside one opening draw whole rounds, never single calls: the calls of one round share what else the machine
# did, and counting them as independent would promise more than is known. A draw is held as how often each round was drawn,
# [draws, rounds].


def quantile(rounds: Sequence[np.ndarray], q: float) -> float:
    """The q-quantile (0..1) of the seconds a call."""
    return float(_quantiles(rounds, np.ones((1, len(rounds)), np.int64), q)[0])


def mean(rounds: Sequence[np.ndarray]) -> float:
    return float(np.mean([r.mean() for r in rounds]))


def median_interval(rounds: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """95 % bootstrap interval of the median; None with fewer than 6 rounds."""
    return _interval(_quantiles(rounds, _draws(len(rounds)), 0.5)) if len(rounds) >= INTERVAL_NEEDS else None


# What is opened twice differs from itself: weights lie elsewhere in memory, threads on other cores, and that stays until it is
# closed. On a 2-core virtual machine with both cores taken one ONNX file differed from its twin by 6.5 % (median over 96 pairs, in
# CPU time), and an interval over the 20 rounds of one opening called 57 to 64 % of the pairs different, widened by what one more
# twin showed still 25 %. So everything is opened anew several times, and the openings are the sample: intervals are Student's, over
# one value an opening, whatever the rounds inside have in common. That the highest level that varies must be repeated: T. Kalibera
# and R. Jones, "Rigorous benchmarking in reasonable time", ISMM 2013, sections 3 and 6. `tests/benchmarks/aa.py` counts how often
# equals are called different; tests/benchmarks/README.md has the figures.


def ratio(a: Rounds, b: Rounds) -> tuple[float, tuple[float, float] | None]:
    """How many times as long a takes as b, and its 95 % interval (None with fewer than 3 openings in common).

    Inside each round the ratio of the two medians: what slows the machine for a while slows both, and cancels. Then the median over
    the rounds of an opening, then the geometric mean over openings. Without a common round: (NaN, None).
    """
    logs: dict[int, list[float]] = {}
    for key in sorted(a.keys() & b.keys()):
        logs.setdefault(key[0], []).append(float(np.log(np.median(a[key]) / np.median(b[key]))))
    if not logs:
        return float("nan"), None
    values = [float(np.median(v)) for v in logs.values()]
    return float(np.exp(np.mean(values))), _students(float(np.mean(values)), values)


def opening_interval(
    rounds: Rounds, statistic: Callable[[Sequence[np.ndarray]], float], value: float
) -> tuple[float, float] | None:
    """95 % interval of a positive statistic of the rounds around its `value`, by what it is in each opening; None below 3 openings."""
    groups: dict[int, list[np.ndarray]] = {}
    for (opening, _), seconds in sorted(rounds.items()):
        groups.setdefault(opening, []).append(seconds)
    return _students(float(np.log(value)), [float(np.log(statistic(g))) for g in groups.values()])


def _students(centre: float, logs: list[float]) -> tuple[float, float] | None:
    """exp of Student's 95 % interval of the mean of `logs`, laid around `centre`."""
    n = len(logs)
    if n < OPENINGS_NEEDED:
        return None
    half = float(stdtrit(n - 1, 0.975)) * float(np.std(logs, ddof=1)) / n**0.5
    return float(np.exp(centre - half)), float(np.exp(centre + half))


def _draws(rounds: int) -> np.ndarray:
    return np.random.default_rng(0).multinomial(rounds, np.full(rounds, 1 / rounds), size=RESAMPLES)


def _quantiles(rounds: Sequence[np.ndarray], draws: np.ndarray, q: float) -> np.ndarray:
    """[draws] q-quantiles of the calls, each weighing as often as its round was drawn by the number of calls of the round."""
    sizes = np.array([len(r) for r in rounds])
    calls, owner = np.concatenate(rounds), np.repeat(np.arange(len(rounds)), sizes)
    order = np.argsort(calls)
    below = np.cumsum((draws / sizes)[:, owner[order]], axis=1)
    return calls[order][np.argmax(below >= q * below[:, -1:] * (1 - 1e-12), axis=1)]


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def verdict(low: float | None, high: float | None) -> Verdict:
    """FASTER or SLOWER only when the whole interval of the ratio of times is on that side of 1."""
    if low is None or high is None:
        return "INCONCLUSIVE"
    return "FASTER" if high < 1 else "SLOWER" if low > 1 else "INCONCLUSIVE"


@contextlib.contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """PyTorch on n threads inside, on as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class OtherLoad:
    """How busy the rest of the machine was between making this and `read`: a benchmark beside other work is a worse one."""

    def __init__(self) -> None:
        self.average = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """(wall seconds, busy CPU seconds of the machine, CPU seconds of this process)."""
        times = psutil.cpu_times()._asdict()
        busy = sum(times.get(k, 0.0) for k in ("user", "nice", "system", "irq", "softirq", "steal"))
        own = psutil.Process().cpu_times()
        return time.monotonic(), busy, own.user + own.system

    def read(self) -> dict[str, Any]:
        """Conditions load_average (of the minute before this began) and other_cores_busy (mean, in processors)."""
        wall, busy, own = (b - a for a, b in zip(self.start, self._now(), strict=True))
        return {"load_average": self.average, "other_cores_busy": round(max(0.0, busy - own) / max(wall, 1e-9), 2)}


def release_memory() -> None:
    """Give freed memory back to the system, so that the next opening has to ask for it again and is counted."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> int | None:
    """Restart the process's memory high-water mark; its resident bytes now, or None where that cannot be done (not Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The high-water mark of resident memory since `reset_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
