"""Child processes that a test interrupts."""

import signal


def heeds_interrupts() -> None:
    """For `preexec_fn`: what a shell starts in the background ignores SIGINT, what nohup starts SIGHUP, and their children inherit that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
