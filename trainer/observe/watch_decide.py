"""Who holds the run up? The pure part of the watch: from what ranks last said of themselves to a verdict."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself with each heart beat.

    `number` counts the beats, `idle` is how long its main thread has made no progress (a duration of its own
    clock, so clocks need not agree), `place` is (step, how many phases of that step it has entered), which
    grows alike on all ranks. `waits`: it was last seen inside communication. `own`: seconds per step outside
    collectives in the last window of steps.
    """

    rank: int
    host: str
    pid: int
    number: int
    idle: float
    phase: str
    place: tuple[int, int]
    waits: bool = False
    samples: str = ""
    window: int = 0
    own: float = 0.0
    busiest: str = ""

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Beat":
        return cls(**{**plain, "place": tuple(plain["place"])})

    @property
    def where(self) -> str:
        """Phase, step and samples in words."""
        samples = f", samples {self.samples}" if self.samples else ""
        return f"{self.phase} of step {self.place[0]}{samples}"

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid}): {self.where}"


def is_hung(beats: Sequence[Beat], frozen: Sequence[int], limit: float) -> bool:
    """No rank that can still speak has made progress for `limit` seconds."""
    return all(beat.idle >= limit for beat in beats if beat.rank not in frozen)


def culprits(beats: Sequence[Beat], frozen: Sequence[int]) -> list[int]:
    """Ranks that the others wait for: the frozen ones, else those least far advanced, and where all are alike
    those that are not waiting in communication; [] if that tells nothing.
    """
    if frozen or len(beats) == 1:
        return sorted(frozen) or [beats[0].rank]
    last = min(beat.place for beat in beats)
    behind = [beat for beat in beats if beat.place == last]
    if len(behind) == len(beats) and any(beat.waits for beat in beats):
        behind = [beat for beat in beats if not beat.waits]
    return [beat.rank for beat in behind] if len(behind) < len(beats) else []


def report(beats: Sequence[Beat], frozen: Sequence[int], limit: float) -> str:
    """What a person reads: who it is, where the others are. A line for each culprit (16 at most), one for all
    the ranks that are in the same place.
    """
    named = culprits(beats, frozen)
    lines = [f"trivium: HUNG: no rank has made progress for {limit:g} s"]
    for beat in [beat for beat in beats if beat.rank in named][:16]:
        if beat.rank in frozen:
            lines += silence(beat)
        else:
            others = "the others wait for" if len(beats) > 1 else "it is"
            lines.append(f"  {others} {beat}, {beat.idle:.0f} s already")
    if len(named) > 16:
        lines.append(f"  and {len(named) - 16} more like these")
    places = Counter(beat.where for beat in beats if beat.rank not in named)
    for where, count in sorted(places.items(), key=lambda item: -item[1]):
        lines.append(f"  {count} {'rank is' if count == 1 else 'ranks are'} in {where}")
    if not named:
        lines.append("  all are in the same place: the network between them, or a collective that never ends")
    return "\n".join(lines)


def silence(beat: Beat) -> list[str]:
    """What to say of a rank that no longer speaks."""
    return [
        f"  no sign of life any more (process frozen? host gone?); last heard of: {beat}",
        f"    its stacks, on {beat.host}: py-spy dump --pid {beat.pid}",
    ]


def slow_ranks(beats: Sequence[Beat], factor: float) -> dict[int, float]:
    """Rank -> its own time per step over the (low) median, for those above `factor`."""
    median = statistics.median_low([beat.own for beat in beats])
    if median <= 0:
        return {}
    return {beat.rank: beat.own / median for beat in beats if beat.own > factor * median}
