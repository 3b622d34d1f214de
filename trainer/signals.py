"""Stop requests: handlers only set a bit; the loop lets all ranks agree on it once per step and saves
together.

A rank that left alone would leave the others in a collective for ever. SIGTERM and SIGINT ask for a stop,
SIGUSR1 is Slurm's warning ahead of the time limit; a second SIGINT stops at once, without saving.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP = 1  # a person or the system asked
WALLTIME = 2  # the time limit is near: the job wants to be requeued
BITS = {signal.SIGTERM: STOP, signal.SIGINT: STOP, signal.SIGUSR1: WALLTIME}
NAMES = {STOP: "a stop signal", WALLTIME: "the time limit's signal", STOP | WALLTIME: "stop signals"}


class StopRequest:
    """`word` is what this rank has been asked; OR it over all ranks before acting on it."""

    def __init__(self) -> None:
        self.word = 0

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.word & STOP:
            raise KeyboardInterrupt
        self.word |= BITS[signal.Signals(number)]


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handlers installed inside the `with`, the old ones back after it. Main thread only."""
    request = StopRequest()
    old = {number: signal.signal(number, request._handle) for number in BITS}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
