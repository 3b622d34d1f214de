"""Read windows of one data set: window number -> tokens, by arithmetic on memory-mapped shards.

Plain tar readers accept a tar that was cut at a member boundary in silence; this one compares the size of a
shard with the index before it maps it (a map beyond the end of a file would kill the process with SIGBUS),
and the hash of a block the first time it reads from it.

Legend: N windows, L seq_len.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import xxhash

from trainer.errors import UserError
from trainer.stream.damage import Quarantine
from trainer.stream.index import DTYPES, HASH, HASHES_FILE, INDEX_FILE, Index, block_hash
from trainer.stream.store import ATTEMPTS, Mapped, open_store
from trainer.stream.table import Shard, hex_of

MAX_OPEN = 128  # a map keeps a file descriptor; the usual limit of a process is 1,024


@dataclass
class OpenShard:
    """A shard in use: blocks is an array [blocks, block_tokens + 1] over its map."""

    shard: Shard
    mapped: Mapped
    blocks: np.ndarray
    hashes: np.ndarray  # of its blocks, uint64; empty when they are not looked at


class TokenReader:
    """Windows of `seq_len + 1` tokens of one directory; thread-safe, and safe to hand to forked workers.

    where: the config key that named the directory, for messages. Raises UserError for everything that makes
    the data unusable: no index, other format, no tokens, `seq_len` that does not tile a block, missing or
    damaged shards. quarantine: what to do about damaged blocks (None: halt), known there as `name`, `split`.
    """

    def __init__(
        self,
        directory: str,
        *,
        seq_len: int,
        verify: str = "blocks",
        where: str = "data.train",
        cache_dir: str = "~/.cache/trivium/shards",
        name: str = "train",
        split: str = "train",
        quarantine: Quarantine | None = None,
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
        self._first_block = self.index.shards.first_block
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        # One bit for each block whose hash was compared. Threads may lose a bit of each other: the block is
        # compared again. What was never touched takes no memory, all of 200 million blocks 25 MB.
        self._verified = np.zeros(self.index.num_blocks // 8 + 1, np.uint8)
        self._lock = threading.Lock()
        self.quarantine = (quarantine or Quarantine()).source(
            split, name, self.index.shards, (self.index.tokens - 1) // block_tokens
        )
        if self.verify == "blocks":
            self._check_size(HASHES_FILE, HASH.itemsize * self.index.num_blocks)

    def check_sizes(self, part: int = 0, parts: int = 1) -> None:
        """Compare the sizes of shards part, part + parts, ... with the index: each rank takes its share.

        Only when opened for a remote store, where each question would be a request.
        """
        if not self.remote:
            shards, sizes = self.index.shards, self.index.shards.sizes()
            for number in range(part, len(shards), parts):
                self._check_size(shards.files[number], int(sizes[number]))

    def read(self, window_N: np.ndarray, out_NL: np.ndarray, batch: tuple[int, int] = (0, 0)) -> None:
        """Fill `out_NL` [N, seq_len + 1] with these windows; cheapest in the dtype of the index.

        batch: first sample and number of samples of the global batch they are for, which decide from when on
        a block that turns out damaged is out of use.
        """
        block_N, place_N = np.divmod(window_N, self.windows_per_block)
        block_N = self.quarantine.substituted(block_N, batch[0])
        shard_N = np.searchsorted(self._first_block, block_N, side="right") - 1
        local_N, start_N = block_N - self._first_block[shard_N], place_N * self.seq_len
        unknown_N = np.zeros(len(block_N), bool)
        if self.verify == "blocks":
            unknown_N = self._verified[block_N >> 3] >> (block_N & 7) & 1 == 0
        current, known, width = -1, -1, self.seq_len + 1
        substitutes: list[tuple[np.ndarray, np.ndarray]] = []
        for row, (number, local, start, unknown) in enumerate(
            zip(shard_N.tolist(), local_N.tolist(), start_N.tolist(), unknown_N.tolist())
        ):
            if number != current:
                current, known = number, -1
                shard = self._shard(number)
                blocks = shard.blocks
            if unknown and local != known:
                if not self._is_good(shard, local, window_N, block_N, batch):
                    damaged = block_N == block_N[row]
                    rows_NL = np.empty((int(damaged.sum()), width), out_NL.dtype)
                    self.read(window_N[damaged], rows_NL, batch)  # their substitutes, for it is noted now
                    substitutes.append((damaged, rows_NL))
                known = local
            out_NL[row] = blocks[local, start : start + width]
        for damaged, rows_NL in substitutes:
            out_NL[damaged] = rows_NL

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

    def _shard(self, number: int) -> OpenShard:
        """Shard `number`, opened when first needed, kept while it is among the last used."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        opened = self._open_shard(self.index.shards[number])  # two threads may both do it: harmless
        with self._lock:
            self._open[number] = opened
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)  # the map closes with its last view
        return opened

    def _open_shard(self, shard: Shard) -> OpenShard:
        if not self.store.known(shard):
            self._check_size(shard.file, shard.bytes)
        try:
            mapped = self.store.map(shard)
        except OSError as error:
            name = self.store.name(shard.file)
            raise UserError(
                f"{name}: cannot be opened ({error.strerror}): check the file and its rights"
            ) from None
        dtype = DTYPES[self.index.dtype]
        shape, strides = (shard.blocks, self.index.block_tokens + 1), (shard.stride, dtype.itemsize)
        blocks: np.ndarray = np.ndarray(shape, dtype, mapped.view, offset=shard.base, strides=strides)
        hashes = self._hashes(shard, mapped) if self.verify == "blocks" else np.empty(0, HASH)
        return OpenShard(shard, mapped, blocks, hashes)

    def _hashes(self, shard: Shard, mapped: Mapped) -> np.ndarray:
        """The hashes of a shard's blocks, as the index vouches for them."""
        for attempt in range(1 + ATTEMPTS):
            try:
                raw = self.store.hashes(shard, mapped, attempt)
            except OSError as error:
                where = self.store.name(HASHES_FILE)
                raise UserError(f"{where}: cannot be read ({error}): check the file and its rights") from None
            if xxhash.xxh3_64_hexdigest(raw) == shard.hashes:
                return np.frombuffer(raw, HASH)
        start, count = HASH.itemsize * shard.first_block, HASH.itemsize * shard.blocks
        raise UserError(
            f"{self.store.name(HASHES_FILE)}: the hashes of {shard.file}, {count} bytes at byte {start}, are "
            f"not those that {INDEX_FILE} vouches for: copy {HASHES_FILE} and {INDEX_FILE} there again"
        )

    def _check_size(self, file: str, expected: int) -> None:
        name, kind = self.store.name(file), "file" if file == HASHES_FILE else "shard"
        try:
            size = self.store.size(file)
        except FileNotFoundError:
            raise UserError(
                f"{name}: missing {kind}, though {INDEX_FILE} lists it: copy it there again or write the "
                f"shards anew"
            ) from None
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error}): check the file and its rights") from None
        if size != expected:
            what = "truncated" if size < expected else f"not the {kind} that was written"
            raise UserError(
                f"{name}: {size} bytes where {INDEX_FILE} says {expected}: the {kind} is {what}, "
                f"copy it again or write the shards anew"
            )

    def _is_good(
        self,
        opened: OpenShard,
        block: int,
        window_N: np.ndarray,
        block_N: np.ndarray,
        batch: tuple[int, int],
    ) -> bool:
        """Whether a block has the hash of the index, after fetching it where that helps; if not, report it.

        Raises UserError where damage is to halt the run.
        """
        shard, tokens = opened.shard, opened.blocks[block]
        start, number = shard.base + block * shard.stride, shard.first_block + block
        found, expected, attempt = block_hash(tokens), int(opened.hashes[block]), 0
        name = self.store.name(shard.file)
        try:
            while found != expected and self.store.fetch(shard, opened.mapped, start, tokens.nbytes, attempt):
                found, attempt = block_hash(tokens), attempt + 1
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error}): check the file and its rights") from None
        if found == expected:
            self._verified[number >> 3] |= np.uint8(1 << (number & 7))
            return True
        damage = {
            "split": self.quarantine.split,
            "source": self.quarantine.name,
            "shard": shard.file,
            "block": block,
            "from_sample": batch[0],
            "file": name,
            "offset": start,
            "bytes": tokens.nbytes,
            "found": hex_of(found),
            "expected": hex_of(expected),
            "batch": list(batch),
            "windows": window_N[block_N == number].tolist(),
        }
        self.quarantine.whole.found(
            damage,
            f"{name}: block {block} at byte {start} has hash {hex_of(found)} where {HASHES_FILE} says "
            f"{hex_of(expected)}: the shard is damaged, copy it again or write the shards anew (or go on "
            f"without the block: data.on_damage=quarantine)",
        )
        return False
