"""Where the time of a step goes: a stopwatch whose parts sum to the wall time, by construction.

    timer = StepTimer()
    with timer.part("wait_data"):
        batch = next(batches)
    with timer.part("forward_backward"):
        ...
    metrics |= timer.finish()          # speed/step_s, speed/wait_data_s, ...; the next step starts here

At each instant exactly one part is running: the innermost `part` that is open, or "other". Time is counted
in whole nanoseconds, so nothing is lost to rounding. Hazard: a GPU works behind the host's back, so its
time is booked on the part that first waits for it (usually where the loss is read), not on the one that
launched the kernels."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.observe.metrics import PARTS


class StepTimer:
    """Books each nanosecond on one part of `metrics.PARTS`. `clock` returns integer nanoseconds."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns):
        self._clock = clock
        self._open = ["other"]  # innermost part last
        self._since = clock()
        self._spent = dict.fromkeys(PARTS, 0)

    def _book(self) -> None:
        now = self._clock()
        self._spent[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Books the time inside the `with` on `name`; a part opened inside another one is not counted
        twice."""
        if name not in PARTS:
            raise ValueError(f"unknown part of a step {name!r}: one of {', '.join(PARTS)}")
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def move(self, source: str, target: str, seconds: float) -> None:
        """Rebooks up to `seconds` of this step from one part to another: for what a callee timed itself,
        such as the optimizer's share of `engine.train_step`. The sum does not change."""
        self._book()
        moved = min(round(seconds * 1e9), self._spent[source])
        self._spent[source] -= moved
        self._spent[target] += moved

    def seconds(self) -> dict[str, float]:
        """Seconds per part since the step began, up to this instant; the step goes on."""
        self._book()
        return {part: spent * 1e-9 for part, spent in self._spent.items()}

    def finish(self) -> dict[str, float]:
        """Ends the step: {"speed/step_s": wall seconds, "speed/PART_s": ...} for every part. Their sum is
        the wall time since the step began; the next step begins at this very instant."""
        if len(self._open) != 1:
            raise RuntimeError(f"finish() inside part {self._open[-1]!r}: the step is not over")
        self._book()
        spent, self._spent = self._spent, dict.fromkeys(PARTS, 0)
        step = {"speed/step_s": sum(spent.values()) * 1e-9}
        return step | {f"speed/{part}_s": nanoseconds * 1e-9 for part, nanoseconds in spent.items()}
