"""Pools of real gloo ranks for the tests: each process imports torch and DeepSpeed once and then runs
functions.

    results = ranks.run(2, function, argument, ...)     # function(world, argument, ...) on ranks 0 and 1

One pool per world size, whose process group stays open: DeepSpeed keeps module-level groups and hangs when
the world changes under it. The function must stand at the top of a module; it and its arguments travel by
pickle. A rank that raises fails the test with its traceback; a rank that hangs is killed after `timeout`
seconds and its stacks are shown.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    from trainer.engine import world as worlds

    world = worlds.start("cpu", os.environ)
    while True:
        job = pipe.recv()
        if job is None:
            break
        function, args = job
        try:
            pipe.send((True, function(world, *args)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
    worlds.stop(world)


class Pool:
    """`size` processes that share one process group."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        deadline = time.monotonic() + timeout
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            # Once one rank has failed the others hang in a collective: they get a moment, not the whole time.
            if not pipe.poll(2 if failures else max(0.0, deadline - time.monotonic())):
                failures.append(f"rank {rank}: no answer within {timeout} s")
                continue
            try:
                good, value = pipe.recv()
            except EOFError:
                good, value = False, f"rank {rank}: the process died"
            (results if good else failures).append(value)
        if failures:
            raise AssertionError("\n".join(failures))
        return results

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR2)  # its stacks, on stderr
        time.sleep(0.5)
        for process in self.processes:
            process.kill()
            process.join()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=20)
            process.kill()


class Ranks:
    """The pools of a test session, made when first asked for."""

    def __init__(self) -> None:
        self.pools: dict[int, Pool] = {}

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
        """`function(world, *args)` on `size` ranks; their results in rank order."""
        if size not in self.pools:
            self.pools[size] = Pool(size)
        try:
            return self.pools[size].run(function, args, timeout)
        except AssertionError:
            self.pools.pop(size).kill()  # a failed collective must not reach the next test
            raise

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
        self.pools = {}
