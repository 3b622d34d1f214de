"""Read ahead: compute the batches of the coming steps while the model trains on this one.

Threads, not processes. A batch costs about 1 ms of numpy and hashing. A worker process has to send it
through shared memory (on 2 busy cores a step then waited 7-13 ms for a torch DataLoader worker, 0.7-3 ms for
a thread, and 1.5 ms when nothing was read ahead), must not be forked after CUDA or with our signal handlers
installed, and can be left behind by a crash. What a thread costs is the interpreter lock for up to 1 ms a
step. Figures of this machine: `tests/bench/bench_stream.py`.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """`get(step)` returns fn(step), which was computed ahead if the steps are asked for in order.

    fn: a pure function of the step, callable from `workers` threads at once; 0 workers: called when asked.
    ahead: how many steps are kept ready (default 2 for each worker). Any other step than the next one drops
    what was read ahead and begins anew there, so seeking and resuming need nothing. What fn raises, `get` of
    that step raises.
    """

    def __init__(self, fn: Callable[[int], T], workers: int, ahead: int | None = None):
        self.fn = fn
        self.workers = workers
        self.ahead = 2 * workers if ahead is None else ahead
        self._executor: ThreadPoolExecutor | None = None
        self._ready: deque[tuple[int, Future[T]]] = deque()

    def get(self, step: int) -> T:
        """The value of `step`, waiting for it if need be."""
        if self.workers == 0:
            return self.fn(step)
        if self._ready and self._ready[0][0] != step:
            self.drop()
        first = self._ready[-1][0] + 1 if self._ready else step
        for ahead in range(first, step + max(1, self.ahead) + 1):
            self._ready.append((ahead, self._pool().submit(self.fn, ahead)))
        return self._ready.popleft()[1].result()

    def close(self) -> None:
        """Stop reading ahead; the threads end after the step they are in."""
        self.drop()
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _pool(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.workers, thread_name_prefix="read-ahead")
        return self._executor

    def drop(self) -> None:
        """Forget what was read ahead: the next `get` computes anew."""
        while self._ready:
            self._ready.popleft()[1].cancel()
