"""Ctrl-C between steps: the first one waits until the step in progress is whole, the second one does not."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_HEARD = b"\nstopping after this step; Ctrl-C again stops at once and loses the steps since the last checkpoint\n"


class Interrupt:
    """Whether somebody has pressed Ctrl-C."""

    def __init__(self) -> None:
        self.wanted = False


@contextlib.contextmanager
def held_back() -> Iterator[Interrupt]:
    """Hold the first Ctrl-C (SIGINT) back inside the block; the caller looks at `wanted` and stops where it can.

    Outside the main thread, and where something else already decides what SIGINT does, nothing is changed.
    """
    interrupt = Interrupt()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupt
        return

    def hear(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt.wanted = True
        # Not through Python's streams: the signal may have come in the middle of a line being printed.
        with contextlib.suppress(OSError):
            os.write(2, _HEARD)

    signal.signal(signal.SIGINT, hear)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
