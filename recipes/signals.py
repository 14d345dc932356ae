"""What ends a command from outside: SIGTERM and SIGHUP, on the same way out as Ctrl-C, with exit codes of their own."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

TERM = ("SIGTERM",)
TERM_AND_HANGUP = ("SIGTERM", "SIGHUP")  # the second is not on Windows


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C's. exit_code: 128 and its number, as shells count."""

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + number


def exit_code(interrupt: KeyboardInterrupt) -> int:
    return interrupt.exit_code if isinstance(interrupt, Terminated) else 130


@contextmanager
def interrupting(names: Sequence[str] = TERM) -> Iterator[None]:
    """Within, these signals raise Terminated in the main thread; one that is ignored, as by nohup, stays so.

    In another thread nothing is installed.
    """
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = numbers if threading.current_thread() is threading.main_thread() else []
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}

    def stop(number: int, frame: object) -> None:
        raise Terminated(number)

    try:
        for n in before:
            signal.signal(n, stop)
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
