"""The order of one source as a pure function: the n-th sample that a source gives -> (epoch, window).

No list of samples exists anywhere: a position is sent through keyed permutations, so the memory is O(1),
seeking is O(1), and every rank, worker and resumed run computes the same answer. An epoch visits every
window exactly once.

Two levels keep reads local without weakening the shuffle: the blocks of the source are permuted, cut into
groups of `group_blocks` neighbours in that new order, and the windows of one group are permuted among
themselves. So at any time the whole cluster reads from about one group (1,024 blocks of uint16 = 512 MiB).
Documents were already shuffled over the whole source when it was written, so windows of one group have
nothing to do with each other.

The last block of a source is usually not full. It takes no part in the permutation of blocks: it belongs to
the last group of each epoch, which costs nothing in randomness (it is one block) and keeps everything
arithmetic.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trainer.keyed import GOLDEN, key, mix64

FEISTEL_ROUNDS = 6
TABLE_LIMIT = (
    4096  # part of the order: up to here a permutation is a sorted table, above it a Feistel network
)


@lru_cache(maxsize=256)
def permutation_table(n: int, key: int) -> np.ndarray:
    """A keyed permutation of 0 .. n-1 as int64 [n]: the ranks of keyed hashes, uniform over all permutations.

    For small domains only: a Feistel network over a few bits reaches only a part of the permutations.
    """
    words = mix64(mix64(np.arange(n, dtype=np.uint64) * np.uint64(GOLDEN)) + np.uint64(key))
    table = np.argsort(words, kind="stable")  # stable: equal hashes too sort alike in every numpy
    table.flags.writeable = False
    return table


def permute(x_N: np.ndarray, n: int, key: int) -> np.ndarray:
    """Keyed bijection of [0, n): int64 [N] positions -> int64 [N] images. Needs 0 <= x < n.

    Above TABLE_LIMIT: a Feistel network (Luby, Rackoff 1988) with splitmix64 as round function, over a grid
    of about sqrt(n) times sqrt(n) numbers with modular addition instead of exclusive or. The grid is larger
    than n by at most sqrt(n) numbers: the few images that fall outside [0, n) walk on through the network
    until they are inside.
    """
    if n <= TABLE_LIMIT:
        return permutation_table(n, key)[x_N]
    rows = math.isqrt(n - 1) + 1
    high_mod, low_mod, one = np.uint64(rows), np.uint64(-(-n // rows)), np.uint64(1)
    round_keys = [np.uint64((key + i * GOLDEN) & (1 << 64) - 1) for i in range(FEISTEL_ROUNDS)]

    def network(value_N: np.ndarray) -> np.ndarray:
        high_N, low_N = np.divmod(value_N, low_mod)
        for i in range(0, FEISTEL_ROUNDS, 2):
            high_N = (high_N + (mix64(low_N + round_keys[i]) >> one)) % high_mod
            low_N = (low_N + (mix64(high_N + round_keys[i + 1]) >> one)) % low_mod
        return high_N * low_mod + low_N

    image_N = network(np.asarray(x_N).astype(np.uint64))
    outside_K = np.flatnonzero(image_N >= np.uint64(n))
    while outside_K.size:
        image_N[outside_K] = network(image_N[outside_K])
        outside_K = outside_K[image_N[outside_K] >= np.uint64(n)]
    return image_N.astype(np.int64)


@lru_cache(maxsize=64)
def _group_blocks(num_full: int, first: int, last: int, key: int) -> np.ndarray:
    """Block numbers at places first .. last-1; the place beyond the full blocks is the ragged block."""
    places = np.arange(first, last, dtype=np.int64)
    blocks = places.copy()
    full = places < num_full
    blocks[full] = permute(places[full], num_full, key)
    blocks.flags.writeable = False
    return blocks


@dataclass(frozen=True)
class SourceOrder:
    """Order of the windows of one source; keyed by `seed` and `name`, so no source influences another."""

    name: str
    seed: int
    num_windows: int
    windows_per_block: int
    group_blocks: int

    @property
    def num_blocks(self) -> int:
        return -(-self.num_windows // self.windows_per_block)

    @property
    def num_groups(self) -> int:
        """Groups are nearly equal, of group_blocks to 2 * group_blocks - 1 blocks: none is tiny."""
        return max(1, self.num_blocks // self.group_blocks)

    def group(self, g: int) -> tuple[int, int]:
        """First place and end place of group g in the permuted row of blocks."""
        return g * self.num_blocks // self.num_groups, (g + 1) * self.num_blocks // self.num_groups

    def pieces(self, start: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """Samples start .. start+count-1 of this source, in order, as (epoch, windows int64 [n]) pieces."""
        per_block = self.windows_per_block
        num_full = self.num_windows // per_block
        while count > 0:
            epoch, position = divmod(start, self.num_windows)
            g = ((position // per_block + 1) * self.num_groups - 1) // self.num_blocks
            first, last = self.group(g)
            begin, end = first * per_block, min(last * per_block, self.num_windows)
            take = min(count, end - position)
            places = np.arange(position - begin, position - begin + take, dtype=np.int64)
            inside = permute(places, end - begin, key(self.seed, "windows", self.name, epoch, g))
            blocks = _group_blocks(num_full, first, last, key(self.seed, "blocks", self.name, epoch))
            yield epoch, blocks[inside // per_block] * per_block + inside % per_block
            start, count = start + take, count - take

    def windows(self, start: int, count: int) -> np.ndarray:
        """Windows of samples start .. start+count-1 of this source: int64 [count]."""
        pieces = [windows for _, windows in self.pieces(start, count)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)
