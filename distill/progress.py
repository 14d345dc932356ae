"""What a user sees of long work: a bar with rate and remaining time on a terminal, plain lines elsewhere, nothing when quiet.

Everything goes to stderr: stdout belongs to results.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

PLAIN_EVERY_S = 10.0  # at most one plain line of a task in this time, besides its last one
INNER_LINE_S = 1.0  # a task inside another leaves a last line if it took this long
REDRAW_EVERY_S = 0.1
WINDOW_S = 60.0  # the rate is that of the last minute: it follows a phase that is slower than the one before


class Task:
    """One piece of work that is counted. Made by `Progress.task`; may be advanced from any thread.

    Attributes:
        title, total, unit: as given; `total` is None where the amount is not known.
        done: how much is done, `start` included.
        shown: the latest numbers to show beside the count, e.g. {"loss": 3.21}.
    """

    def __init__(self, progress: "Progress", title: str, total: int | None, unit: str, start: int):
        self.title, self.total, self.unit, self.done = title, total, unit, start
        self.shown: dict[str, Any] = {}
        self.depth = 0
        self._progress = progress
        self._start, self._began = start, progress.clock()
        self._samples = deque([(self._began, start)])
        self._drawn = self._began

    def advance(self, n: int = 1, **shown: Any) -> None:
        """Count `n` more as done; `shown` replaces the numbers of the same names."""
        with self._progress.lock:
            self.done += n
            self.shown.update(shown)
            now = self._progress.clock()
            if now - self._samples[-1][0] >= 0.5:
                self._samples.append((now, self.done))
                while now - self._samples[1][0] > WINDOW_S:
                    self._samples.popleft()
            self._progress._advanced(self, now)

    def rate(self) -> float | None:
        """Units a second over the last minute; None before anything was done."""
        then, before = self._samples[0]
        seconds = self._progress.clock() - then
        return (self.done - before) / seconds if seconds > 0 and self.done > before else None

    def seconds_left(self) -> float | None:
        rate = self.rate()
        return None if rate is None or self.total is None else max(0, self.total - self.done) / rate

    def seconds(self) -> float:
        return self._progress.clock() - self._began

    def line(self) -> str:
        """`pretrain: 120/1000 steps, 3.4 steps/s, 4:18 left, loss 3.21`."""
        return f"{self.title}: " + ", ".join(self.texts())

    def last_line(self) -> str:
        """`pretrain: 1000/1000 steps in 4:51, 3.4 steps/s, loss 3.02`; the rate is the mean of the whole task."""
        seconds, done = self.seconds(), self.done - self._start
        mean = [rate_text(done / seconds, self.unit)] if seconds > 0 and done > 0 else []
        return f"{self.title}: " + ", ".join([f"{self._count()} in {duration(seconds)}", *mean, *shown_texts(self.shown)])

    def texts(self) -> list[str]:
        """Count, rate, remaining time and shown numbers, as far as they are known."""
        rate, left = self.rate(), self.seconds_left()
        parts = [self._count()]
        parts += [rate_text(rate, self.unit)] if rate is not None else []
        parts += [f"{duration(left)} left"] if left is not None else []
        return parts + shown_texts(self.shown)

    def _count(self) -> str:
        return f"{self.done} {self.unit}" if self.total is None else f"{self.done}/{self.total} {self.unit}"


class Progress:
    """How a program tells what it is doing. Thread safe; tasks may be nested and may overlap.

    Args:
        mode: `auto` draws bars on a terminal, plain lines elsewhere; of several processes any but the first is quiet;
            `plain` prints lines: at most one per task every 10 s, and a last one; `quiet` prints warnings only.
        stream: where to write; stderr unless given.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        mode: Literal["auto", "plain", "quiet"] = "auto",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stream = stream if stream is not None else sys.stderr
        self.clock = clock
        self.lock = threading.RLock()
        self._tasks: list[Task] = []
        self._bars: Any = None  # rich's Live display while there are tasks
        self._ids: dict[Task, Any] = {}
        self.mode = mode if mode != "auto" else _mode_of(self.stream)

    def say(self, text: str, warning: bool = False) -> None:
        """Print a line that stays, above any bars. Quiet mode lets warnings through only."""
        if self.mode == "quiet" and not warning:
            return
        with self.lock:
            if self._bars is not None:
                self._bars.console.print(text, markup=False, highlight=False, style="yellow" if warning else None)
            else:
                try:
                    print(text, file=self.stream, flush=True)
                except (
                    BrokenPipeError,
                    ValueError,
                ):  # nobody reads any more (a closed pipe or stream): no reason to lose the work
                    self.mode = "quiet"

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "it", start: int = 0) -> Iterator[Task]:
        """Count a piece of work.

        Args:
            title: what is done, e.g. "pretrain".
            total: how many units there are, or None where that is not known.
            unit: name of a unit, e.g. "steps"; stands in rates too.
            start: how many were done before (a resumed run): neither rate nor remaining time count them as work of now.
        """
        task = Task(self, title, total, unit, start)
        with self.lock:
            task.depth = len(self._tasks)
            self._tasks.append(task)
            self._show(task)
        finished = False
        try:
            yield task
            finished = True
        finally:
            with self.lock:
                self._tasks.remove(task)
                self._hide(task)
                # Bars vanish, one line of the outermost task stays. In a log short inner tasks would be noise.
                if task.depth == 0 or (self.mode == "plain" and task.seconds() >= INNER_LINE_S):
                    how = task.last_line() if finished else f"{task.title}: stopped at {task._count()}"
                    self.say("  " * task.depth + how)

    def _advanced(self, task: Task, now: float) -> None:
        every = REDRAW_EVERY_S if self.mode == "bars" else PLAIN_EVERY_S
        if self.mode == "quiet" or now - task._drawn < every:
            return
        task._drawn = now
        if self.mode == "bars" and task in self._ids:
            self._bars.update(self._ids[task], completed=task.done, text="  ".join(task.texts()))
        elif self.mode == "plain":
            self.say("  " * task.depth + task.line())

    def _show(self, task: Task) -> None:
        if self.mode != "bars":
            return
        if self._bars is None:
            self._bars = _bars(self.stream)
            self._bars.start()
        title = "  " * task.depth + task.title
        self._ids[task] = self._bars.add_task(title, total=task.total, completed=task.done, text="  ".join(task.texts()))

    def _hide(self, task: Task) -> None:
        if task in self._ids:
            self._bars.remove_task(self._ids.pop(task))
            if not self._ids:
                self._bars.stop()
                self._bars = None


def duration(seconds: float) -> str:
    """0:07, 4:18, 3:02:11."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def rate_text(rate: float, unit: str) -> str:
    """`3.4 steps/s`, or `12 s/step` for what takes longer than a second."""
    per = rate if rate >= 1 else 1 / rate
    number = f"{per:,.0f}" if per >= 10 else f"{per:.1f}"
    return f"{number} {unit}/s" if rate >= 1 else f"{number} s/{unit.removesuffix('s')}"


def shown_texts(shown: dict[str, Any]) -> list[str]:
    return [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()]


def _mode_of(stream: TextIO) -> str:
    if os.environ.get("RANK", "0") != "0":
        return "quiet"
    return "bars" if stream.isatty() and os.environ.get("TERM") != "dumb" else "plain"


def _bars(stream: TextIO) -> Any:
    """rich is imported here: a program that never draws a bar does not wait for it."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(file=stream, force_terminal=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(30), TextColumn("{task.fields[text]}", markup=False)
    return Bars(*columns, console=console, transient=True)
