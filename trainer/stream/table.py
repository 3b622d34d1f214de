"""The list of shards of a data set, in columns: 100,000 shards as objects would cost 100 MB and a second.

An index holds one short row per shard, [file, bytes, blocks, xxh3, hashes]; a `Shard` is made when asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COLUMNS = ["file", "bytes", "blocks", "xxh3", "hashes"]
SECTOR = 512


@dataclass(frozen=True)
class Shard:
    """One tar: `file` beside the index, its size in bytes, and where its blocks lie.

    xxh3: of the whole file. hashes: xxh3 of this shard's slice of the file of block hashes. first_block: the
    number of its first block in the whole row. Hashes are xxh3_64 in 16 hex digits.
    """

    file: str
    bytes: int
    blocks: int
    base: int
    stride: int
    xxh3: str
    hashes: str
    first_block: int


class Shards(Sequence[Shard]):
    """All shards in order. base, stride: of the members, the same in every shard of a data set.

    Raises ValueError, saying what is wrong, for rows that no writer of ours wrote.
    """

    def __init__(self, rows: Sequence[Sequence[Any]], base: int, stride: int):
        self.base, self.stride = base, stride
        if any(len(row) != len(COLUMNS) for row in rows):
            raise ValueError("the list of shards is damaged")
        columns = list(zip(*rows)) or [()] * len(COLUMNS)
        self.files: tuple[str, ...] = columns[0]
        self.blocks = _counts(columns[2])
        self._xxh3, self._hashes = _digests(columns[3]), _digests(columns[4])
        for file in self.files:
            # As the name of the file is joined to a path, it must not lead out of the directory.
            if not isinstance(file, str) or "/" in file or file in ("", ".", ".."):
                raise ValueError(f"shard file {file!r} is not a plain file name")
        if len(set(self.files)) != len(self.files):
            raise ValueError("two shards have the same file name")
        wrong = np.flatnonzero((self.sizes() != _counts(columns[1])) | (self.blocks < 1))
        if wrong.size:
            file, blocks = self.files[wrong[0]], self.blocks[wrong[0]]
            raise ValueError(f"shard {file} has a size that does not fit its {blocks} blocks")
        self.first_block = np.concatenate([[0], np.cumsum(self.blocks)])  # one more: the number of blocks

    def sizes(self) -> np.ndarray:
        """Bytes of every shard, int64: its members and the two empty sectors that end a tar."""
        return self.blocks * self.stride + 2 * SECTOR

    def rows(self) -> list[list[Any]]:
        """What the index holds of each shard."""
        columns = (self.files, self.sizes().tolist(), self.blocks.tolist(), self._xxh3, self._hashes)
        return [[file, size, blocks, hex_of(x), hex_of(h)] for file, size, blocks, x, h in zip(*columns)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        blocks = int(self.blocks[number])
        return Shard(
            file=self.files[number],
            bytes=blocks * self.stride + 2 * SECTOR,
            blocks=blocks,
            base=self.base,
            stride=self.stride,
            xxh3=hex_of(self._xxh3[number]),
            hashes=hex_of(self._hashes[number]),
            first_block=int(self.first_block[number]),
        )

    def __iter__(self) -> Iterator[Shard]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and self.rows() == other.rows()

    __hash__ = None  # type: ignore[assignment]


def hex_of(digest: int) -> str:
    """An xxh3_64 as it is written in an index and in messages: 16 hex digits."""
    return f"{digest:016x}"


def _counts(column: Sequence[Any]) -> np.ndarray:
    counts = np.array(column, np.int64) if not column else np.array(column)
    if counts.dtype.kind != "i" or counts.ndim != 1:
        raise ValueError("the list of shards is damaged")
    return counts.astype(np.int64)


def _digests(column: Sequence[Any]) -> np.ndarray:
    if not all(isinstance(digest, str) and len(digest) == 16 for digest in column):
        raise ValueError("the list of shards is damaged")
    try:
        return np.frombuffer(bytes.fromhex("".join(column)), ">u8")
    except ValueError:
        raise ValueError("the list of shards is damaged") from None
