"""Damaged blocks that a run puts out of use (`data.on_damage=quarantine`), and what it reads in their place.

A substitute is a keyed function of (seed, split, source, block): every rank, world size and resumed run
reads the same one. It is a full block of the same source; one that is damaged itself is passed over for the
next in the same keyed order.

A block is out of use from a sample on: the first of the batch in which its damage was found. What was
trained before never changes by it, although another node may have read the block whole. So a batch is a pure
function of (config, step, list of damaged blocks), and that list only grows, by a union that does not depend
on the order. The loop's part, which makes the list the same on every rank before a batch is trained on:

    batch = reader.get(step)                       # on every rank
    found = [every rank's] batches.new_damage()    # one collective, each step
    if any of them: write them to the run directory; batches.adopt_damage(found); reader.drop(); again

What is in no list then has touched no update. A run that is killed adopts what was written, so a shard that
was repaired in the meantime does not change its order; what was found but not yet written is found again,
or was never used.
"""

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.keyed import key
from trainer.stream.order import permute
from trainer.stream.table import Shards

Damage = dict[str, Any]  # JSON; of a list that is adopted, NAMES and from_sample are needed
NAMES = ("split", "source", "shard", "block")  # what a damaged block is called; block: of the shard


class Quarantine:
    """The damaged blocks of all sources of a run. Thread-safe.

    policy: "halt" raises for a block that is newly found, "quarantine" records it, up to `most` of them.
    Blocks that were adopted are out of use under both: they are part of this run's past.
    """

    def __init__(self, policy: str = "halt", most: int = 0, seed: int = 0):
        self.policy, self.most, self.seed = policy, most, seed
        self.sources: dict[tuple[str, str], SourceQuarantine] = {}
        self._known: dict[tuple[Any, ...], Damage] = {}
        self._new: list[Damage] = []
        self._lock = threading.Lock()

    def source(self, split: str, name: str, shards: Shards, num_full: int) -> "SourceQuarantine":
        """The part of one reader. num_full: blocks at the start of the row in which every token is real."""
        with self._lock:
            part = SourceQuarantine(self, split, name, shards, num_full)
            self.sources[split, name] = part
            for damage in self._known.values():
                part.put_out(damage)
            return part

    def found(self, damage: Damage, message: str) -> None:
        """Record what a reader found. Raises UserError(message) under the policy "halt"."""
        with self._lock:
            if self._active(damage):
                return  # another thread was faster
            if self.policy == "halt":
                raise UserError(message)
            self._put_out([damage])
            self._new.append(damage)

    def take_new(self) -> list[Damage]:
        """What was found since the last call."""
        with self._lock:
            new, self._new = self._new, []
            return new

    def adopt(self, damages: Iterable[Damage]) -> None:
        """Put blocks out of use that another rank or an earlier attempt found. Raises UserError above the
        bound.
        """
        with self._lock:
            self._put_out(damages)

    def state(self, consumed: int) -> list[Damage]:
        """What the first `consumed` samples, and evaluation, went without: sorted, as JSON.

        What was found ahead of them while reading ahead may not have reached every rank yet.
        """
        with self._lock:
            known = [damage for _, damage in sorted(self._known.items())]
        keep = (*NAMES, "from_sample")
        past = [d for d in known if d["from_sample"] < max(1, consumed)]
        return [{name: damage[name] for name in keep} for damage in past]

    def _active(self, damage: Damage) -> bool:
        known = self._known.get(identity(damage))
        return known is not None and known["from_sample"] <= damage["from_sample"]

    def _put_out(self, damages: Iterable[Damage]) -> None:
        last = None
        for damage in damages:
            if self._active(damage):  # one list may name a block twice, from different samples on
                continue
            last = self._known[identity(damage)] = damage
            for part in self.sources.values():
                part.put_out(damage)
        if last is not None and len(self._known) > self.most:
            raise UserError(
                f"data.max_damaged={self.most}: {len(self._known)} blocks are damaged, the last one block "
                f"{last['block']} of {last['shard']} ({last['source']}): copy the damaged shards again, or "
                f"raise the key"
            )


class SourceQuarantine:
    """What the reader of one source asks: which block to read for which."""

    def __init__(self, whole: Quarantine, split: str, name: str, shards: Shards, num_full: int):
        self.whole, self.split, self.name = whole, split, name
        self.shards, self.num_full = shards, num_full
        # Block of the row -> first sample from which on it is out of use. Replaced and never changed, so that
        # threads may walk through it.
        self.damaged: dict[int, int] = {}

    def put_out(self, damage: Damage) -> None:
        """Note a damaged block, if it is one of this source."""
        if (damage["split"], damage["source"]) != (self.split, self.name):
            return
        if damage["shard"] not in self.shards.files:
            raise UserError(
                f"{damage['shard']}: quarantined in source {self.name}, which holds no such shard now: point "
                f"data.* at the shards this run began with"
            )
        first = int(self.shards.first_block[self.shards.files.index(damage["shard"])])
        self.damaged = {**self.damaged, first + damage["block"]: damage["from_sample"]}

    def substituted(self, block_N: np.ndarray, sample: int) -> np.ndarray:
        """The blocks to read for these blocks of the row, in a batch that begins at `sample`."""
        out = {block for block, since in self.damaged.items() if since <= sample}
        if not out:
            return block_N
        block_N = block_N.copy()
        for row in np.flatnonzero(np.isin(block_N, list(out))):
            block_N[row] = self._substitute(int(block_N[row]), out)
        return block_N

    def _substitute(self, block: int, out: set[int]) -> int:
        order = key(self.whole.seed, "substitute", self.split, self.name, block)
        for position in range(self.num_full):
            candidate = int(permute(np.array([position]), self.num_full, order)[0])
            if candidate != block and candidate not in out:
                return candidate
        raise UserError(
            f"source {self.name}: {len(out)} of its blocks are damaged, and no whole one is left to take "
            f"their place: copy its shards again"
        )


def identity(damage: Damage) -> tuple[Any, ...]:
    """What tells a damaged block from every other."""
    return tuple(damage[name] for name in NAMES)
