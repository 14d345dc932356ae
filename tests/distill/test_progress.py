"""What a user sees of long work: lines in a log, bars on a terminal, warnings only when quiet."""

import io
import threading

import pytest

from distill.progress import Progress, duration, rate_text


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plain(clock: Clock) -> Progress:
    return Progress("plain", io.StringIO(), clock)


def said(progress: Progress) -> list[str]:
    return progress.stream.getvalue().splitlines()  # type: ignore[attr-defined]


def test_plain_lines_come_every_ten_seconds_with_rate_time_left_and_numbers(plain: Progress, clock: Clock):
    with plain.task("pretrain", 100, "steps") as task:
        for step in range(100):
            clock.now += 0.5
            task.advance(loss=3.25 if step < 50 else 2.0)
    assert said(plain) == [
        "pretrain: 20/100 steps, 2.0 steps/s, 0:40 left, loss 3.25",
        "pretrain: 40/100 steps, 2.0 steps/s, 0:30 left, loss 3.25",
        "pretrain: 60/100 steps, 2.0 steps/s, 0:20 left, loss 2",
        "pretrain: 80/100 steps, 2.0 steps/s, 0:10 left, loss 2",
        "pretrain: 100/100 steps, 2.0 steps/s, 0:00 left, loss 2",
        "pretrain: 100/100 steps in 0:50, 2.0 steps/s, loss 2",
    ]


def test_a_resumed_task_does_not_count_earlier_work_in_its_rate(plain: Progress, clock: Clock):
    with plain.task("pretrain", 1000, "steps", start=900) as task:
        clock.now += 10
        task.advance(10)
    assert said(plain) == [
        "pretrain: 910/1000 steps, 1.0 steps/s, 1:30 left",
        "pretrain: 910/1000 steps in 0:10, 1.0 steps/s",
    ]


def test_the_rate_follows_a_slower_phase(plain: Progress, clock: Clock):
    with plain.task("x", 100_000) as task:
        for _ in range(100):
            clock.now += 1
            task.advance(100)
        for _ in range(100):
            clock.now += 1
            task.advance(1)
        assert task.rate() == pytest.approx(1, rel=0.1)


def test_an_unknown_total_has_no_time_left(plain: Progress, clock: Clock):
    with plain.task("count", None, "images") as task:
        clock.now += 20
        task.advance(40)
    assert said(plain)[0] == "count: 40 images, 2.0 images/s"


def test_an_error_leaves_a_line_and_passes_through(plain: Progress):
    def fail() -> None:
        with plain.task("count", 3) as task:
            task.advance()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert said(plain) == ["count: stopped at 1/3 it"]
    with plain.task("again", 1) as task:
        task.advance()
    assert task.depth == 0


def test_nested_tasks_are_indented_and_short_ones_leave_no_line(plain: Progress, clock: Clock):
    with plain.task("outer", 2) as outer:
        for seconds in (0.1, 3):
            with plain.task("inner", 1) as inner:
                clock.now += seconds
                inner.advance()
            outer.advance()
    assert said(plain) == ["  inner: 1/1 it in 0:03, 3.0 s/it", "outer: 2/2 it in 0:03, 1.5 s/it"]


def test_threads_may_count_together(plain: Progress):
    with plain.task("count", 8000) as task:

        def work() -> None:
            for _ in range(1000):
                task.advance()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert task.done == 8000


def test_quiet_lets_only_warnings_through(clock: Clock):
    progress = Progress("quiet", io.StringIO(), clock)
    progress.say("hello")
    with progress.task("x", 1) as task:
        clock.now += 60
        task.advance()
    progress.say("disk nearly full", warning=True)
    assert said(progress) == ["disk nearly full"]


def test_auto_is_plain_in_a_log_and_quiet_in_later_processes(monkeypatch: pytest.MonkeyPatch):
    assert Progress("auto", io.StringIO()).mode == "plain"
    assert Progress("auto", Terminal()).mode == "bars"
    monkeypatch.setenv("TERM", "dumb")
    assert Progress("auto", Terminal()).mode == "plain"
    monkeypatch.setenv("RANK", "1")
    assert Progress("auto", Terminal()).mode == "quiet"


def test_a_closed_stream_does_not_end_the_work(plain: Progress):
    plain.stream.close()
    with plain.task("x", 1) as task:
        task.advance()
    assert task.done == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_on_a_terminal_show_all_and_leave_one_line(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    progress = Progress("auto", Terminal(), clock)
    with progress.task("pretrain", 10, "steps", start=2) as task:
        clock.now += 4
        task.advance(2, loss=1.5)
        with progress.task("inner", 5) as inner:
            inner.advance()
            progress.say("a [line] between")
        progress._bars.refresh()
    drawn = progress.stream.getvalue()  # type: ignore[attr-defined]
    assert "4/10 steps  2.0 s/step  0:12 left  loss 1.5" in drawn
    assert "a [line] between" in drawn
    assert "  inner" in drawn
    assert drawn.splitlines()[-1].endswith("pretrain: 4/10 steps in 0:04, 2.0 s/step, loss 1.5")
    assert progress._bars is None


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (258, "4:18"), (10931, "3:02:11")])
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(3.44, "3.4 steps/s"), (99.7, "100 steps/s"), (12345, "12,345 steps/s"), (0.01, "100 s/step")]
)
def test_rates(rate: float, text: str):
    assert rate_text(rate, "steps") == text
