"""Goodput: which share of a run's life trained steps that count. Over all attempts, from the first start to
now.

Each attempt appends its events to goodput.jsonl: `start`, then ranges of steps with the seconds of each
part of a step, then `stop` with the reason. A killed attempt has no `stop`; the time until the next `start`
is then `down` (the queue, the requeue, and what the kill took with it). Where an attempt goes on before the
end of the one before it, the steps in between were trained twice: the first time was for nothing and is
booked as `recomputed`.

The idea is MaxText's (common/goodput.py); all seconds are wall time of the whole job, so they sum to its
life."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.observe.files import LineFile, read_lines
from trainer.observe.metrics import PARTS

PRODUCTIVE = ("forward_backward", "optimizer", "rollout")  # a rollout is what a GRPO step trains on
RANGE_SECONDS = 30.0  # a kill loses the accounting (not the work) of at most this long
RANGE_STEPS = 1000

# What the life of a run is divided into, in the order of a reader's interest.
KINDS = {
    "productive": "steps that count: forward, backward, optimizer, rollouts",
    "recomputed": "steps trained again after a return to an earlier checkpoint",
    "wait_data": PARTS["wait_data"],
    "save": "checkpoints the steps had to wait for",
    "eval": "evaluation and text samples",
    "startup": "from the start of an attempt to its first step: imports, building, loading",
    "down": "between attempts: in the queue, or dead",
    "other": "logging and all the rest",
}
KIND_OF_PART = {
    **dict.fromkeys(PARTS, "other"),
    **dict.fromkeys(PRODUCTIVE, "productive"),
    "wait_data": "wait_data", "save": "save", "eval": "eval", "sample": "eval",
}  # fmt: skip


class Goodput:
    """Writes goodput.jsonl; with `path=None` (ranks other than 0) does nothing. `clock`: seconds since the
    epoch, so that attempts on different hosts share it."""

    def __init__(self, path: Path | None, attempt: int, clock: Callable[[], float] = time.time):
        self._file = LineFile(path) if path else None
        self._attempt = attempt
        self._clock = clock
        self._clear()

    def _clear(self) -> None:
        self._first: int | None = None
        self._last = 0
        self._parts: dict[str, float] = {}

    def _event(self, event: str, **fields: object) -> None:
        if self._file:
            self._file.append({"event": event, "time": self._clock(), "attempt": self._attempt, **fields})

    def start(self, began: float | None = None) -> None:
        """The attempt began, at `began` (seconds since the epoch; e.g. when the process was started) or
        now."""
        if self._file:
            self._file.append(
                {
                    "event": "start",
                    "time": self._clock() if began is None else began,
                    "attempt": self._attempt,
                }
            )

    def step(self, step: int, parts: dict[str, float]) -> None:
        """One step is over; `parts` is what `StepTimer.finish()` returned."""
        if self._first is None:
            self._first = step
        self._last = step
        for part in PARTS:
            self._parts[part] = self._parts.get(part, 0.0) + parts.get(f"speed/{part}_s", 0.0)
        if sum(self._parts.values()) >= RANGE_SECONDS or step - self._first + 1 >= RANGE_STEPS:
            self.flush()

    def flush(self) -> None:
        """Writes the range of steps so far. Call it right after the step that saved a checkpoint: a later
        attempt goes on from a checkpoint, so ranges that end there are counted or recomputed as a whole."""
        if self._first is not None:
            seconds = {part: round(value, 6) for part, value in self._parts.items() if value}
            self._event("steps", first=self._first, last=self._last, seconds=seconds)
        self._clear()

    def rewind(self, step: int) -> None:
        """The run goes back to `step` within this attempt; what came after it will be trained again."""
        self.flush()
        self._event("rewind", step=step)

    def summary(self) -> "GoodputSummary | None":
        """Where the time of the run went so far, this attempt included; for `run/goodput` at each
        evaluation."""
        self.flush()
        return summarize(self._file.path, now=self._clock()) if self._file else None

    def stop(self, reason: str) -> None:
        """The attempt ends: "done", "signal", "error", ..."""
        self.flush()
        self._event("stop", reason=reason)
        if self._file:
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class GoodputSummary:
    """Seconds per kind of `KINDS`; they sum to `wall`."""

    wall: float
    seconds: dict[str, float]
    attempts: int
    steps: int  # the last step that counts
    recomputed_steps: int
    stops: list[str]  # why each attempt ended; "killed" where nobody could say, "running" for the last

    @property
    def goodput(self) -> float:
        return self.seconds["productive"] / self.wall if self.wall > 0 else 0.0


class _Ranges:
    """Ranges of steps that count so far, with seconds per kind."""

    def __init__(self) -> None:
        self.counted: list[tuple[int, int, dict[str, float]]] = []  # first step, last step, seconds per kind
        self.recomputed_steps = 0
        self.recomputed_seconds = 0.0

    def add(self, first: int, last: int, seconds: dict[str, float]) -> None:
        """`seconds` per part of a step. Ranges that reach beyond `first` are taken back: this one trains
        them again."""
        self.take_back(first)
        kinds: dict[str, float] = {}
        for part, value in seconds.items():
            kind = KIND_OF_PART.get(part, "other")
            kinds[kind] = kinds.get(kind, 0.0) + value
        self.counted.append((first, last, kinds))

    def take_back(self, first: int) -> None:
        """Books all steps from `first` on as recomputed; a range that is cut is divided in proportion."""
        kept = []
        for begin, end, kinds in self.counted:
            lost = min(end - begin + 1, max(0, end - first + 1))
            share = lost / (end - begin + 1)
            self.recomputed_steps += lost
            self.recomputed_seconds += share * sum(kinds.values())
            if lost <= end - begin:
                kept.append((begin, end - lost, {kind: value * (1 - share) for kind, value in kinds.items()}))
        self.counted = kept


def summarize(path: Path, now: float | None = None) -> GoodputSummary | None:
    """Reads goodput.jsonl, also of a run that is going on (`now`: the end of its life so far; default: the
    last event). None if the run never started."""
    records = [
        record for record in read_lines(path) if record.get("event") in ("start", "steps", "rewind", "stop")
    ]
    if not records:
        return None
    seconds = dict.fromkeys(KINDS, 0.0)
    ranges = _Ranges()
    stops: list[str] = []
    idle = "down"  # what a time without steps is at this point of the life
    last = records[0]["time"]
    for record in records:
        moment = max(record["time"], last)  # clocks of two hosts may differ: time never runs backwards here
        gap, last = moment - last, moment
        if record["event"] == "steps":
            total = sum(record["seconds"].values())
            fits = min(1.0, gap / total) if total > 0 else 0.0  # nor may skew make more time than there was
            ranges.add(record["first"], record["last"], {k: v * fits for k, v in record["seconds"].items()})
            seconds[idle] += gap - total * fits
            idle = "other"
            continue
        seconds["down" if record["event"] == "start" else idle] += gap
        if record["event"] == "start":
            stops = [reason.replace("running", "killed") for reason in stops] + ["running"]
            idle = "startup"
        elif record["event"] == "rewind":
            ranges.take_back(record["step"] + 1)
        else:
            stops[-1:] = [record.get("reason", "?")]
            idle = "down"
    if now is not None and now > last:
        seconds[idle] += now - last
        last = now
    for _, _, kinds in ranges.counted:
        for kind, value in kinds.items():
            seconds[kind] += value
    seconds["recomputed"] = ranges.recomputed_seconds
    return GoodputSummary(
        wall=last - records[0]["time"],
        seconds=seconds,
        attempts=len(stops),
        steps=max((end for _, end, _ in ranges.counted), default=0),
        recomputed_steps=ranges.recomputed_steps,
        stops=stops,
    )
