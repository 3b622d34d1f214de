"""Crash trials that are real and cheap: ranks are forked from a server that has imported everything.

    server = CrashServer()
    result = server.attempt(arguments, world=2, log=path, kill=Kill("save/rename"))

Each rank is a process of its own that gets a launcher's environment and runs `trivium pretrain` as a user
would; it starts in a tenth of a second instead of five. A kill is SIGKILL: at a kill point (the hook of
`trainer.faults` is set in the child, the product knows nothing of it) or at any moment. When one rank is gone
the others get a moment to notice and are then killed too, as launchers do.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import free_port

PRELOAD = ["torch", "deepspeed", "trainer.loop", "trainer.pretrain", "trainer.engine.fsdp", "trainer.run"]
PRELOAD += ["trainer.engine.deepspeed", "trainer.stream.batches", "trainer.model.attention", "crashes"]
NOTICE_S = 2.0  # what the other ranks get when one has died


@dataclass(frozen=True)
class Kill:
    """SIGKILL at the `count`-th reach of a point of `trainer.faults`, or `after` so many seconds.

    `rank`: which one dies; `everyone`: all at that same moment, as when a machine goes down.
    """

    point: str = ""
    count: int = 1
    rank: int = 0
    everyone: bool = False
    after: float = 0.0


@dataclass
class Result:
    """`codes` of the ranks in order; `killed`: the kill happened (a run may end before)."""

    codes: list[int]
    killed: bool
    output: str
    seconds: float


def _rank(
    arguments: list[str],
    rank: int,
    size: int,
    port: int,
    log: Path,
    kill: Kill | None,
    prepare: Callable[[int], None] | None,
    pipe: Any,
) -> None:
    """One rank, in its own process."""
    os.setpgid(0, 0)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    import faulthandler

    faulthandler.register(signal.SIGUSR2, all_threads=True, file=sys.__stderr__)
    if size > 1:
        place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ.update(place, LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from trainer import faults, pretrain
    from trainer.launch import run_main

    if kill is not None and kill.point and rank == kill.rank:
        reached = 0

        def hook(point: str) -> None:
            nonlocal reached
            if point == kill.point:
                reached += 1
                if reached == kill.count:
                    pipe.send(point)  # the parent kills everyone, or notes that it happened
                    if kill.everyone:
                        time.sleep(60)
                    os.kill(os.getpid(), signal.SIGKILL)

        faults.hook = hook
    if prepare is not None:
        prepare(rank)
    code = run_main(pretrain.main, arguments)
    sys.stdout.flush()
    os._exit(code)


class CrashServer:
    """Starts the ranks of attempts; `close()` it in the end."""

    def __init__(self) -> None:
        # One thread in the server and in what is forked from it: a fork copies no other thread.
        os.environ["OMP_NUM_THREADS"] = "1"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def attempt(
        self,
        arguments: list[str],
        world: int,
        log: Path,
        kill: Kill | None = None,
        limit: float = 120,
        prepare: Callable[[int], None] | None = None,
        notice: float = NOTICE_S,
    ) -> Result:
        """One launch of a run, until all ranks are gone.

        `prepare(rank)` is called in each rank before the run; it travels by pickle. `notice`: seconds that
        the others get when one has failed.
        """
        port, started = free_port(), time.monotonic()
        ours, theirs = self.context.Pipe(duplex=False)
        ranks = [
            self.context.Process(
                target=_rank, args=(arguments, r, world, port, log, kill, prepare, theirs), daemon=True
            )
            for r in range(world)
        ]
        for process in ranks:
            process.start()
        theirs.close()
        killed, first_death = False, None
        while any(p.exitcode is None for p in ranks):
            time.sleep(0.01)
            now = time.monotonic()
            point_reached = not killed and kill is not None and bool(kill.point) and _said(ours)
            moment = not killed and kill is not None and 0 < kill.after <= now - started
            if point_reached or moment:
                assert kill is not None
                killed = True
                if kill.everyone:
                    _kill(ranks)
                elif moment:
                    _kill([ranks[kill.rank]])
            dead = [p for p in ranks if p.exitcode is not None]
            if dead and first_death is None:
                first_death = now
            failed = any(p.exitcode for p in dead)
            if failed and first_death is not None and now - first_death > notice:
                _kill(ranks)
            if now - started > limit:
                for process in ranks:
                    if process.exitcode is None and process.pid:
                        os.kill(process.pid, signal.SIGUSR2)  # the stacks of all threads, into the log
                time.sleep(0.5)
                _kill(ranks)
                raise AssertionError(f"attempt of {world} ranks took over {limit} s:\n{log.read_text()}")
        killed = killed or (kill is not None and bool(kill.point) and _said(ours))
        for process in ranks:
            process.join()
        output = log.read_text() if log.exists() else ""
        return Result([p.exitcode or 0 for p in ranks], killed, output, time.monotonic() - started)


def _said(pipe: Any) -> bool:
    """The hook has told that its point was reached."""
    try:
        return bool(pipe.poll() and pipe.recv())
    except EOFError:
        return False


def _kill(processes: list[Any]) -> None:
    for process in processes:
        if process.exitcode is None:
            process.kill()
