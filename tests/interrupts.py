"""Child processes that a test interrupts."""

import signal


def heeds_interrupts() -> None:
    """For `preexec_fn`: what a shell starts in the background ignores SIGINT, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
