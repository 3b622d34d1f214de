"""Which source a sample comes from: exact proportions per 1,000 samples, weights that may change.

Of every CYCLE = 1,000 samples a source owns a fixed number of slots; which slots, is a keyed permutation of
the cycle. A source's own counter (how many samples it gave before sample n) is closed-form: whole phases +
whole cycles + the slots of a part of one cycle. So a change of weights moves only the pace at which a source
is read, never its order, and a batch is simply, for each source, the run of its own samples between two
counters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from trainer.errors import UserError
from trainer.keyed import key
from trainer.stream.order import SourceOrder, permutation_table

CYCLE = 1000
Schedule = Sequence[tuple[int, Mapping[str, float]]]  # [(first sample, {source: weight}), ...]; absent = 0


def slots_per_cycle(weights: Mapping[str, float], where: str) -> dict[str, int]:
    """Weights -> slots of CYCLE (sum CYCLE) by largest remainder, ties by name, in exact arithmetic."""
    total = sum(Fraction(weight) for weight in weights.values())
    exact = {name: Fraction(weights[name]) * CYCLE / total for name in sorted(weights)}
    slots = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (slots[name] - exact[name], name))
    for name in by_remainder[: CYCLE - sum(slots.values())]:
        slots[name] += 1
    for name, weight in weights.items():
        if weight > 0 and slots[name] == 0:
            raise UserError(
                f"{where}: the weight {weight} of {name} is less than one sample in {CYCLE}: raise it or "
                f"set it to 0"
            )
    return slots


@lru_cache(maxsize=64)
def _labels(slots: tuple[int, ...], cycle_key: int) -> np.ndarray:
    """Source number of every slot of one cycle: int64 [CYCLE]."""
    return np.repeat(np.arange(len(slots)), slots)[permutation_table(CYCLE, cycle_key)]


@dataclass(frozen=True)
class Phase:
    """From sample `start` on, source i owns slots[i] of each CYCLE samples; it gave base[i] before."""

    number: int
    start: int
    slots: tuple[int, ...]
    base: tuple[int, ...]


class Mixture:
    """Several sources and a weight schedule: sample number -> (source, epoch, window).

    sources: orders sorted by name, whatever their order in the config; `schedule` starts at sample 0.
    """

    def __init__(self, sources: Sequence[SourceOrder], schedule: Schedule, seed: int):
        self.sources = sorted(sources, key=lambda source: source.name)
        self.seed = seed
        self.phases: list[Phase] = []
        base = [0] * len(self.sources)
        for number, (start, weights) in enumerate(schedule):
            if self.phases:
                base = self.counters(start)
            slots = slots_per_cycle(weights, f"data.sources, weights from sample {start} on")
            shares = tuple(slots.get(source.name, 0) for source in self.sources)
            self.phases.append(Phase(number, start, shares, tuple(base)))

    def _phase(self, sample: int) -> Phase:
        return next(phase for phase in reversed(self.phases) if phase.start <= sample)

    def _cycle_labels(self, phase: Phase, cycle: int) -> np.ndarray:
        return _labels(phase.slots, key(self.seed, "mixture", phase.number, cycle))

    def counters(self, sample: int) -> list[int]:
        """How many samples each source gave before `sample`."""
        phase = self._phase(sample)
        cycle, slot = divmod(sample - phase.start, CYCLE)
        counts = [base + cycle * slots for base, slots in zip(phase.base, phase.slots)]
        if slot and len(counts) == 1:
            return [counts[0] + slot]
        if slot:
            partial = np.bincount(self._cycle_labels(phase, cycle)[:slot], minlength=len(counts))
            counts = [count + int(extra) for count, extra in zip(counts, partial)]
        return counts

    def locate(self, sample: int) -> tuple[str, int, int]:
        """(source name, epoch, window) of one sample."""
        phase = self._phase(sample)
        cycle, slot = divmod(sample - phase.start, CYCLE)
        number = int(self._cycle_labels(phase, cycle)[slot])
        epoch, windows = next(self.sources[number].pieces(self.counters(sample)[number], 1))
        return self.sources[number].name, epoch, int(windows[0])

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The set of samples first .. first+count-1, sorted by (source, window): two int64 [count] arrays.

        Sorted, because then neighbours in a rank's slice share blocks (8 nodes: 1.4 reads a block instead of
        8).
        """
        sources, windows = [], []
        for number, (a, b) in enumerate(zip(self.counters(first), self.counters(first + count))):
            if b > a:
                windows.append(np.sort(self.sources[number].windows(a, b - a)))
                sources.append(np.full(b - a, number, np.int64))
        return np.concatenate(sources), np.concatenate(windows)

    def epochs(self, sample: int) -> dict[str, float]:
        """How many times each source was read through before `sample`, as a fraction."""
        return {
            source.name: count / source.num_windows
            for source, count in zip(self.sources, self.counters(sample))
        }
