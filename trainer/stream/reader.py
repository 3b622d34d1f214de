"""Read windows of one data set: window number -> tokens, by arithmetic on memory-mapped shards.

Plain tar readers accept a tar that was cut at a member boundary in silence; this one compares the size of a
shard with the index before it maps it (a map beyond the end of a file would kill the process with SIGBUS),
and the hash of a block the first time it reads from it.

Legend: N windows, L seq_len.
"""

import mmap
import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from trainer.errors import UserError
from trainer.stream.index import DTYPES, INDEX_FILE, Index, block_hash

MAX_OPEN = 128  # a map keeps a file descriptor; the usual limit of a process is 1,024


def split_directory(path: str, split: str) -> str | None:
    """Where split `train` or `val` of a data set lies; None when there is no such validation split."""
    if (Path(path) / split / INDEX_FILE).exists():
        return str(Path(path) / split)
    return path if split == "train" else None


class TokenReader:
    """Windows of `seq_len + 1` tokens of one directory; thread-safe, and safe to hand to forked workers.

    where: the config key that named the directory, for messages. Raises UserError for everything that makes
    the data unusable: no index, other format, no tokens, `seq_len` that does not tile a block, missing or
    damaged shards.
    """

    def __init__(self, directory: str, *, seq_len: int, verify: str = "blocks", where: str = "data.train"):
        self.directory = Path(directory)
        self.where = where
        self.index = Index.load(self.directory)
        self.seq_len = seq_len
        self.verify = verify
        block_tokens = self.index.block_tokens
        if seq_len < 1 or block_tokens % seq_len:
            fits = [d for d in range(1, block_tokens + 1) if block_tokens % d == 0]
            near = sorted(fits, key=lambda d: abs(d - seq_len))[:2]
            raise UserError(
                f"seq_len={seq_len}: does not divide the blocks of {block_tokens} tokens of {directory}: "
                f"use seq_len={' or '.join(map(str, sorted(near)))}"
            )
        if self.index.tokens < 2:
            raise UserError(
                f"{where}={directory}: holds {self.index.tokens} tokens, nothing to learn: add documents"
            )
        self.windows_per_block = block_tokens // seq_len
        self.num_windows = -(-(self.index.tokens - 1) // seq_len)
        self._first_block = np.cumsum([0] + [shard.blocks for shard in self.index.shards])
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._verified = [np.zeros(shard.blocks, bool) for shard in self.index.shards]
        self._lock = threading.Lock()

    def check_sizes(self, part: int = 0, parts: int = 1) -> None:
        """Compare the sizes of shards part, part + parts, ... with the index: each rank takes its share."""
        for shard in range(part, len(self.index.shards), parts):
            path = self.directory / self.index.shards[shard].file
            try:
                self._check_size(shard, path.stat().st_size)
            except FileNotFoundError:
                raise self._missing(path) from None

    def read(self, window_N: np.ndarray, out_NL: np.ndarray) -> None:
        """Fill `out_NL` [N, seq_len + 1] with these windows; cheapest in the dtype of the index."""
        block_N, place_N = np.divmod(window_N, self.windows_per_block)
        shard_N = np.searchsorted(self._first_block, block_N, side="right") - 1
        local_N = block_N - self._first_block[shard_N]
        current, blocks, verified = -1, np.empty((0, 0)), np.empty(0, bool)
        check = self.verify == "blocks"
        start_N = place_N * self.seq_len
        for row, (shard, block, start) in enumerate(
            zip(shard_N.tolist(), local_N.tolist(), start_N.tolist())
        ):
            if shard != current:
                current, blocks, verified = shard, self._blocks(shard), self._verified[shard]
            if check and not verified[block]:
                self._check_block(shard, block, blocks[block])
            out_NL[row] = blocks[block, start : start + self.seq_len + 1]

    def num_targets(self, window_N: np.ndarray) -> np.ndarray:
        """Real targets of each window, int64 [N]: fewer than seq_len where the padding begins."""
        return np.minimum(self.seq_len, self.index.tokens - 1 - window_N * self.seq_len)

    def _blocks(self, shard: int) -> np.ndarray:
        """The shard as an array [blocks, block_tokens + 1] over its map, opened when first needed."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            entry = self.index.shards[shard]
            path = self.directory / entry.file
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                raise self._missing(path) from None
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be opened ({error.strerror}): check the file and its rights"
                ) from None
            try:
                self._check_size(shard, os.fstat(handle).st_size)
                mapped = mmap.mmap(handle, 0, prot=mmap.PROT_READ)
            finally:
                os.close(handle)
            dtype = DTYPES[self.index.dtype]
            shape, strides = (entry.blocks, self.index.block_tokens + 1), (entry.stride, dtype.itemsize)
            blocks: np.ndarray = np.ndarray(shape, dtype, mapped, offset=entry.base, strides=strides)
            self._open[shard] = blocks
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)  # the map closes with its last view
            return blocks

    def _missing(self, path: Path) -> UserError:
        return UserError(
            f"{path}: missing shard, though {INDEX_FILE} lists it: copy it there again or write the shards "
            f"anew"
        )

    def _check_size(self, shard: int, size: int) -> None:
        entry = self.index.shards[shard]
        if size != entry.bytes:
            what = "truncated" if size < entry.bytes else "not the shard that was written"
            raise UserError(
                f"{self.directory / entry.file}: {size} bytes where {INDEX_FILE} says {entry.bytes}: the "
                f"shard is "
                f"{what}, copy it again or write the shards anew"
            )

    def _check_block(self, shard: int, block: int, tokens: np.ndarray) -> None:
        entry = self.index.shards[shard]
        found = block_hash(tokens)
        if found != entry.hash_of(block):
            raise UserError(
                f"{self.directory / entry.file}: block {block} at byte {entry.base + block * entry.stride} "
                f"has hash "
                f"{found} where {INDEX_FILE} says {entry.hash_of(block)}: the shard is damaged, copy it "
                f"again or "
                f"write the shards anew"
            )
        self._verified[shard][block] = True
