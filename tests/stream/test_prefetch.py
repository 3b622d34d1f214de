"""Reading ahead: always the value of the step that was asked for, errors where they belong, and an end."""

import subprocess
import sys
import threading
import time

import pytest

from trainer.errors import UserError
from trainer.stream.loader import Prefetcher


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_values_come_in_order_whatever_the_threads_do(workers: int) -> None:
    def slow_when_even(step: int) -> int:
        time.sleep(0.004 * (step % 2 == 0))
        return step * step

    with Prefetcher(slow_when_even, workers) as reader:
        assert [reader.get(step) for step in range(20)] == [step * step for step in range(20)]
        assert [reader.get(step) for step in (7, 8, 3, 3, 4, 100, 5)] == [49, 64, 9, 9, 16, 10_000, 25]


def test_steps_are_computed_before_they_are_asked_for() -> None:
    ready = threading.Event()

    def fn(step: int) -> int:
        if step == 2:
            ready.set()
        return step

    with Prefetcher(fn, workers=1) as reader:
        assert reader.get(0) == 0
        assert ready.wait(10)


def test_no_step_is_computed_twice_and_not_too_many_ahead() -> None:
    calls: list[int] = []
    with Prefetcher(lambda step: calls.append(step), workers=2, ahead=3) as reader:
        for step in range(10):
            reader.get(step)
            assert max(calls) <= step + 3
    assert sorted(calls[:10]) == list(range(10))
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_belongs_to_its_step(workers: int) -> None:
    def fn(step: int) -> int:
        if step == 2:
            raise UserError("web-000001.tar: missing shard")
        return step

    with Prefetcher(fn, workers) as reader:
        assert [reader.get(0), reader.get(1)] == [0, 1]
        with pytest.raises(UserError, match="missing shard"):
            reader.get(2)
        assert reader.get(3) == 3


def test_a_process_that_reads_ahead_ends_by_itself() -> None:
    """Neither an open prefetcher nor a signal leaves threads behind that keep the process alive."""
    code = (
        "import os, signal\n"
        "from trainer.stream.loader import Prefetcher\n"
        "reader = Prefetcher(lambda step: step, 2)\n"
        "reader.get(0)\n"
        "stopped = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: stopped.append(reader.get(1)))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('stopped with', stopped)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "stopped with [1]\n")
