"""Saving while training goes on: copy, then write in the background on a group of its own.

The step waits only until its ranges are copied to host memory (buffers that are kept, so a rank holds one
more copy of what it writes and nothing else grows). A thread then writes, hashes and commits. It talks over
its own gloo group: a barrier on a group that training uses would meet training's collectives in another
order on another rank and hang. One save is in flight; the next one waits for it.

A save that fails leaves training and the older checkpoints alone; `result()` tells it at the next step.
"""

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.engine import checkpoint, commit
from trainer.engine.checkpoint_config import CheckpointConfig
from trainer.engine.engine import Engine
from trainer.engine.ranges import FlatRange
from trainer.errors import UserError
from trainer.faults import reach

SLOWEST_SAVE = timedelta(hours=6)  # until the slowest rank has written its part the others wait in a gather
LOOK_S = 0.2  # between two looks whether a save that is waited for makes progress


class Saver:
    """Saves of one run, one at a time. Collective like the engine: every rank calls the same in the same
    order.
    """

    def __init__(self, root: Path, engine: Engine, config: CheckpointConfig):
        self.root = root
        self.engine = engine
        self.config = config
        group = dist.new_group(backend="gloo", timeout=SLOWEST_SAVE)
        self.world = replace(engine.world, cpu_group=group)
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.committed = -1  # step of the last save that this rank knows to be whole
        self._pieces = 0
        self._pruning = False

    def save(
        self,
        step: int,
        state: dict[str, Any],
        extra: dict[str, Path],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Stage the checkpoint of `step` and start writing it. An earlier save must have been taken note of
        (`wait`).

        `before_commit` runs on the writing thread of rank 0, see `checkpoint.write`.
        """
        assert self._thread is None, "wait() for the earlier save first"
        ranges = self._stage()
        whole = checkpoint.describe(self.engine, step, state)
        reach("save/staged")
        self._thread = threading.Thread(
            target=self._write, args=(step, ranges, whole, extra, before_commit), name="save", daemon=True
        )
        self._thread.start()

    def _stage(self) -> dict[str, FlatRange]:
        """Copies in host memory of what this rank will write; the buffers are used again for every save."""
        staged = {}
        for name, shard in self.engine.ranges_to_save().items():
            local = shard.local
            if name not in self._buffers:
                pin = local.device.type == "cuda"
                self._buffers[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=pin)
            self._buffers[name].copy_(local, non_blocking=True)
            staged[name] = FlatRange(self._buffers[name], shard.start, shard.whole_shape)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return staged

    def _write(
        self,
        step: int,
        ranges: dict[str, FlatRange],
        state: dict[str, Any],
        extra: dict[str, Path],
        before_commit: Callable[[], None],
    ) -> None:
        if sys.platform == "linux":  # there it means this thread alone: the model's threads go first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            checkpoint.write(
                self.root, step, ranges, state, extra, self.world, before_commit, self._count_piece
            )
            self.committed = step
            if self.world.is_main:
                self._prune()
        except BaseException as error:  # told by result() on the training thread
            self._error = error

    def _prune(self) -> None:
        self._pruning = True
        try:
            commit.prune(self.root, self.config)
        except OSError as error:  # the save itself is whole
            raise UserError(
                f"{error.filename}: cannot delete an old checkpoint ({error.strerror})"
            ) from error
        finally:
            self._pruning = False

    def _count_piece(self) -> None:
        self._pieces += 1

    def result(self) -> str | None:
        """None while a save is under way or none was ordered; then once: "" for a success, or what went
        wrong, in one line.

        Raises:
            Exception: a fault of ours on the writing thread.
        """
        if self._thread is None or self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> str:
        """The result of the save under way when it is done; "" if there is none."""
        if self._thread is None:
            return ""
        seen = -1
        while self._thread.is_alive():
            self._thread.join(LOOK_S)
            # Bytes written and files deleted are progress, waiting for another rank is not.
            if self._pieces != seen or self._pruning:
                seen = self._pieces
                self.engine.on_phase("save")
        self._thread = None
        error, self._error = self._error, None
        if isinstance(error, UserError):
            return str(error)
        if error is not None:
            raise error
        return ""
