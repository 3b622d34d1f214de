"""Read windows of one data set: window number -> tokens, by arithmetic on memory-mapped shards.

Plain tar readers accept a tar that was cut at a member boundary in silence; this one compares the size of a
shard with the index before it maps it (a map beyond the end of a file would kill the process with SIGBUS),
and the hash of a block the first time it reads from it.

Legend: N windows, L seq_len.
"""

import threading
from collections import OrderedDict

import numpy as np

from trainer.errors import UserError
from trainer.stream.index import DTYPES, INDEX_FILE, Index, Shard, block_hash
from trainer.stream.store import open_store

MAX_OPEN = 128  # a map keeps a file descriptor; the usual limit of a process is 1,024


class TokenReader:
    """Windows of `seq_len + 1` tokens of one directory; thread-safe, and safe to hand to forked workers.

    where: the config key that named the directory, for messages. Raises UserError for everything that makes
    the data unusable: no index, other format, no tokens, `seq_len` that does not tile a block, missing or
    damaged shards.
    """

    def __init__(
        self,
        directory: str,
        *,
        seq_len: int,
        verify: str = "blocks",
        where: str = "data.train",
        cache_dir: str = "~/.cache/trivium/shards",
    ):
        self.directory = directory
        self.where = where
        self.store = open_store(directory, cache_dir)
        self.remote = "://" in directory
        self.index = self._load_index()
        self.seq_len = seq_len
        self.verify = "blocks" if self.remote else verify  # what is not there yet is known by its hash alone
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
        """Compare the sizes of shards part, part + parts, ... with the index: each rank takes its share.

        Only when opened for a remote store, where each question would be a request.
        """
        if not self.remote:
            for shard in self.index.shards[part::parts]:
                self._check_size(shard)

    def read(self, window_N: np.ndarray, out_NL: np.ndarray) -> None:
        """Fill `out_NL` [N, seq_len + 1] with these windows; cheapest in the dtype of the index."""
        block_N, place_N = np.divmod(window_N, self.windows_per_block)
        shard_N = np.searchsorted(self._first_block, block_N, side="right") - 1
        local_N = block_N - self._first_block[shard_N]
        current, blocks, verified = -1, np.empty((0, 0)), np.empty(0, bool)
        check = self.verify == "blocks"
        start_N = place_N * self.seq_len
        for row, (number, block, start) in enumerate(
            zip(shard_N.tolist(), local_N.tolist(), start_N.tolist())
        ):
            if number != current:
                current, blocks, verified = number, self._blocks(number), self._verified[number]
            if check and not verified[block]:
                self._check_block(number, block, blocks[block])
            out_NL[row] = blocks[block, start : start + self.seq_len + 1]

    def num_targets(self, window_N: np.ndarray) -> np.ndarray:
        """Real targets of each window, int64 [N]: fewer than seq_len where the padding begins."""
        return np.minimum(self.seq_len, self.index.tokens - 1 - window_N * self.seq_len)

    def _load_index(self) -> Index:
        where = self.store.name(INDEX_FILE)
        try:
            return Index.parse(self.store.read_index(), where)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{where}: not found, so {self.where} names no finished data set: give a directory with "
                f"train/{INDEX_FILE} or {INDEX_FILE}, or run the command that writes the shards to its end"
            ) from None
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error}): check the path and its rights") from None

    def _blocks(self, number: int) -> np.ndarray:
        """Shard `number` as an array [blocks, block_tokens + 1] over its map, opened when first needed."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            shard = self.index.shards[number]
            self._check_size(shard)
            try:
                mapped = self.store.map(shard)
            except OSError as error:
                name = self.store.name(shard.file)
                raise UserError(
                    f"{name}: cannot be opened ({error.strerror}): check the file and its rights"
                ) from None
            dtype = DTYPES[self.index.dtype]
            shape, strides = (shard.blocks, self.index.block_tokens + 1), (shard.stride, dtype.itemsize)
            blocks: np.ndarray = np.ndarray(shape, dtype, mapped, offset=shard.base, strides=strides)
            self._open[number] = blocks
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)  # the map closes with its last view
            return blocks

    def _check_size(self, shard: Shard) -> None:
        name = self.store.name(shard.file)
        try:
            size = self.store.size(shard.file)
        except FileNotFoundError:
            raise UserError(
                f"{name}: missing shard, though {INDEX_FILE} lists it: copy it there again or write the "
                f"shards anew"
            ) from None
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error}): check the file and its rights") from None
        if size != shard.bytes:
            what = "truncated" if size < shard.bytes else "not the shard that was written"
            raise UserError(
                f"{name}: {size} bytes where {INDEX_FILE} says {shard.bytes}: the shard is {what}, "
                f"copy it again or write the shards anew"
            )

    def _check_block(self, number: int, block: int, tokens: np.ndarray) -> None:
        """Compare the hash of a block with the index, after fetching it if that helps."""
        shard = self.index.shards[number]
        start = shard.base + block * shard.stride
        found, expected = block_hash(tokens), shard.hash_of(block)
        if found != expected and self.store.fetch(shard, start, tokens.nbytes):
            found = block_hash(tokens)
        if found != expected:
            raise UserError(
                f"{self.store.name(shard.file)}: block {block} at byte {start} has hash {found} where "
                f"{INDEX_FILE} "
                f"says {expected}: the shard is damaged, copy it again or write the shards anew"
            )
        self._verified[number][block] = True
