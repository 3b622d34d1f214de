"""Hangs and stragglers, named: which rank, on which host, in which phase, over which samples.

A collective that one rank never enters looks the same on all others: they wait. So each rank has a second
thread whose heart beats through a channel that is no collective, an own connection to the run's store:

- The main thread only says where it is (`enter`), which costs a few attribute writes.
- The second thread publishes that every tenth of the limit. A rank that is idle for half the limit looks at
  the beats of all (only the first few ranks do, so 1,000 ranks do not read 1,000,000 keys). If no rank that
  still speaks has made progress for the limit, the run is hung: the lowest live rank prints who the others
  wait for, every live rank writes the Python stacks of all its threads into the log directory, and all leave
  with EXIT_HUNG. A process that was stopped or whose host is gone is known by its silence.
- In between the thread samples what the main thread is doing. The share of samples outside communication,
  times the wall time, is the rank's own time per step: the time in which others may have to wait for it.
  (Time in forward or backward as such says nothing: collectives inside make all ranks equally slow.) On a GPU
  the host sees only its own side: a kernel that is slow on one GPU shows as waiting wherever the host first
  synchronises, so there only slow data, slow hosts and slow Python are found.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.engine.world import World
from trainer.errors import EXIT_HUNG
from trainer.observe.watch_config import WatchConfig
from trainer.observe.watch_decide import Beat, culprits, is_hung, report, silence, slow_ranks

OBSERVERS = 4  # ranks that look at all beats; the others wait for their verdict
SAMPLE_S = 0.02
PHASES = ("data", "forward", "backward", "optimizer", "eval")  # those that every rank enters equally often
# Innermost Python frames of a main thread that waits for other ranks (seen under FSDP2 and ZeRO on gloo).
COMMUNICATION = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py",
    "torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py",
    "torch/distributed/checkpoint/utils.py",
    "deepspeed/comm/torch.py",
    "deepspeed/comm/comm.py",
    "deepspeed/runtime/comm/coalesced_collectives.py",
)
VERDICT = "watch/verdict"


class Watch:
    """One rank's watch, from its construction (collective) to `close()`."""

    def __init__(self, config: WatchConfig, world: World, log_dir: Path):
        self.config, self.world, self.log_dir = config, world, log_dir
        self.beat_s = min(2.0, max(0.1, config.limit_s / 10))
        self._ticks = self._step = self._entered = self._number = self._steps_done = 0
        self._phase, self._samples, self._waits = "startup", "", False
        self._moved = time.monotonic()
        self._window, self._own, self._busiest = 0, 0.0, ""
        self._window_began = time.monotonic()
        self._seen: Counter[str] = Counter()  # samples of this window by phase; "" for communication
        self._seen_beats: dict[int, tuple[int, float]] = {}  # rank -> (beat number, when it was first seen)
        self._slow: dict[int, int] = {}  # rank -> windows in a row
        self._compared = 0
        self._first: Beat | None = None  # what rank 0 last said
        self._messages: list[str] = []
        self._answered = time.monotonic()  # when the store last did
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        if not config.enabled:
            return
        self._store = self._open_store()
        self._publish()
        world.barrier()  # now the beat of every rank is there to be read
        # Two threads: one talks to the store and is stuck for good if the store's host is, the other judges.
        for name, work in (("watch", self._look), ("watch-store", self._talk)):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            self._threads[-1].start()

    def _open_store(self) -> Any:
        """An own connection: a store that two threads use at once makes one wait for the other."""
        if self.world.size == 1:
            return None
        store: Any = dist.distributed_c10d._get_default_store()
        return store.clone()

    # --- called by the main thread

    def enter(self, phase: str) -> None:
        """The main thread goes over to `phase`; each call is progress."""
        self._ticks += 1
        if phase in PHASES:
            self._entered += 1
        self._phase = phase
        self._moved = time.monotonic()

    def begin_step(self, step: int) -> None:
        """Step `step`, counted from 1 as in the log, begins."""
        self._step, self._entered, self._samples = step, 0, ""
        self.enter("data")

    def batch(self, first_sample: int, num_samples: int) -> None:
        """The batch has come: what the report names."""
        self._samples = f"{first_sample}..{first_sample + num_samples - 1}"

    def end_step(self) -> str:
        """The step is done. Returns what there is to say about slow ranks (on rank 0, seldom), else ""."""
        self._steps_done += 1
        if self._steps_done == 1:  # compilation and first touches are in no window
            self._begin_window()
        elif (self._steps_done - 1) % self.config.window_steps == 0:
            seen, total = self._seen.copy(), sum(self._seen.values())
            share = 1 - seen.pop("", 0) / total if total else 1.0
            self._own = share * (time.monotonic() - self._window_began) / self.config.window_steps
            self._busiest = seen.most_common(1)[0][0] if seen else ""
            self._window += 1
            self._begin_window()
        messages, self._messages = self._messages, []
        return "; ".join(messages)

    def _begin_window(self) -> None:
        self._seen = Counter()
        self._window_began = time.monotonic()

    def close(self) -> None:
        """The run ends well; no rank may take the silence that follows for a hang."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2 * self.beat_s + 5)
        self._threads = []

    # --- the threads

    def _look(self) -> None:
        """Sample the main thread; and judge alone where the store no longer answers."""
        while not self._closed.wait(SAMPLE_S):
            self._sample()
            idle, silent = time.monotonic() - self._moved, time.monotonic() - self._answered
            if idle >= 1.2 * self._limit() and silent >= 0.6 * self._limit():
                text = ["the run's store, which lives with rank 0 or its launcher, does not answer"]
                text += silence(self._first) if self._first else []
            elif idle >= 2 * self._limit() and self.world.rank >= OBSERVERS:
                text = [f"none of the first {OBSERVERS} ranks speaks"]
            else:
                continue
            text = [f"trivium: HUNG: {text[0]}", *text[1:], f"  told by {self._mine()}, {idle:.0f} s already"]
            self._tell("\n".join(text), [self._first or self._mine()], [0])
            self._leave()

    def _talk(self) -> None:
        try:
            while not self._closed.wait(self.beat_s):
                self._beat()
                self._answered = time.monotonic()
        except RuntimeError:  # the store is gone: at the end of a run no matter, else _look() will tell
            return

    def _sample(self) -> None:
        frame = sys._current_frames().get(self._main or 0)
        if frame is not None:
            waits = frame.f_code.co_filename.replace(os.sep, "/").endswith(COMMUNICATION)
            self._seen["" if waits else self._phase] += 1
            self._waits = waits

    def _mine(self) -> Beat:
        return Beat(
            self.world.rank, socket.gethostname(), os.getpid(), self._number, time.monotonic() - self._moved,
            self._phase, (self._step, self._entered), self._waits, self._samples, self._window, self._own,
            self._busiest,
        )  # fmt: skip

    def _limit(self) -> float:
        return self.config.limit_s if self._steps_done else self.config.startup_limit_s

    def _publish(self) -> None:
        self._number += 1
        if self._store is not None:
            self._store.set(f"watch/{self.world.rank}", json.dumps(self._mine().plain()))

    def _beat(self) -> None:
        self._publish()
        if self._store is not None and self._store.check([VERDICT]):
            self._leave()
        if self._store is not None and 0 < self.world.rank < OBSERVERS:
            self._first = Beat.of(json.loads(self._store.get("watch/0")))  # it may take the store with it
        if time.monotonic() - self._moved >= self._limit() / 2 and self.world.rank < OBSERVERS:
            self._observe()
        elif self.world.rank == 0 and self._window > self._compared:
            self._compare()

    def _beats(self) -> list[Beat]:
        if self._store is None:
            return [self._mine()]
        keys = [f"watch/{rank}" for rank in range(self.world.size)]
        return [Beat.of(json.loads(raw)) for raw in self._store.multi_get(keys)]

    def _observe(self) -> None:
        """This rank is idle: is the whole run, and who is silent?"""
        now, beats, frozen = time.monotonic(), self._beats(), []
        for beat in beats:
            number, since = self._seen_beats.get(beat.rank, (-1, now))
            if beat.number != number:
                self._seen_beats[beat.rank] = (beat.number, now)
            elif beat.rank != self.world.rank and now - since > max(3 * self.beat_s, 1.0):
                frozen.append(beat.rank)
        live = [beat.rank for beat in beats if beat.rank not in frozen]
        if is_hung(beats, frozen, self._limit()) and self.world.rank == min(live):
            self._tell(report(beats, frozen, self._limit()), beats, frozen)
            if self._store is not None:
                self._store.set(VERDICT, "hung")
            self._leave()

    def _tell(self, text: str, beats: list[Beat], frozen: list[int]) -> None:
        where = f"  stacks and details: {self.log_dir}"
        print(f"{text}\n{where}", file=sys.stderr, flush=True)
        content = {"culprits": culprits(beats, frozen), "frozen": frozen, "ranks": [b.plain() for b in beats]}
        (self.log_dir / "hang.json").write_text(json.dumps({"text": text, **content}, indent=1) + "\n")

    def _leave(self) -> None:
        """Write the stacks of this process and end it: its main thread will not come back."""
        with open(self.log_dir / f"stacks-rank-{self.world.rank}.txt", "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        # Launchers kill the rest as soon as one has gone; each gets the time to see the verdict first.
        time.sleep(3 * self.beat_s)
        os._exit(EXIT_HUNG)

    def _compare(self) -> None:
        """Rank 0, once a window: who needs more time of its own than the others?"""
        beats = self._beats()
        if min(beat.window for beat in beats) < self._window:
            return  # the last ones have not said it yet
        self._compared = self._window
        slow = slow_ranks(beats, self.config.slow_factor)
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow}
        for rank, windows in self._slow.items():
            if windows % self.config.slow_windows == 0:
                beat, steps = beats[rank], windows * self.config.window_steps
                self._messages.append(
                    f"rank {rank} (host {beat.host}) is slow: {slow[rank]:.2f}x the median of the ranks' own "
                    f"time, {beat.own:.3f} s a step over {steps} steps, most of it in {beat.busiest}"
                )
