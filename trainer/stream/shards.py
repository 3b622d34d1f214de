"""Write TokenShard v2 (form: `trainer.stream.index`): tokens in, plain WebDataset tars out.

    with ShardWriter("data/web/train", name="web", vocab_size=n, eos_id=eos, tokenizer_sha256=sha) as writer:
        for document in documents:
            writer.add(document.ids_with_eos, bytes_of_text=len(document.text.encode()))

Memory: one block, and 100 bytes a shard. A writer that dies leaves no `index.json`, hence no data set; the
next writer sweeps up.
"""

import os
import re
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import xxhash

from trainer.errors import UserError
from trainer.stream.index import (
    BLOCK_TOKENS,
    BLOCKS_PER_SHARD,
    DTYPES,
    HASH,
    HASHES_FILE,
    INDEX_FILE,
    WRITING_FILE,
    Index,
    block_hash,
    check_vocabulary,
    disk_errors,
    dtype_for,
    fsync_directory,
    member_layout,
    npy_header,
)
from trainer.stream.table import SECTOR, Shard, Shards, hex_of

__all__ = ["BLOCKS_PER_SHARD", "BLOCK_TOKENS", "Index", "Shard", "ShardWriter", "dtype_for"]


class ShardWriter:
    """Streaming writer of one data set directory; `close()` commits it by writing `index.json`.

    dtype: "uint16" or "uint32"; None takes the smallest that holds the vocabulary.
    overwrite: first un-commit a data set that is already there (delete its index), then write the new one.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        name: str,
        vocab_size: int,
        eos_id: int,
        tokenizer_sha256: str,
        dtype: str | None = None,
        block_tokens: int = BLOCK_TOKENS,
        blocks_per_shard: int = BLOCKS_PER_SHARD,
        meta: dict[str, Any] | None = None,
        overwrite: bool = False,
    ):
        self.directory = Path(directory)
        self.name = name
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.tokenizer_sha256 = tokenizer_sha256
        self.dtype = dtype or dtype_for(vocab_size)
        self.block_tokens = block_tokens
        self.blocks_per_shard = blocks_per_shard
        self.meta = dict(meta or {})
        if self.dtype not in DTYPES:
            raise UserError(f"{self.directory}: dtype={dtype!r} is not one of {', '.join(DTYPES)}")
        if not re.fullmatch(r"[A-Za-z0-9_+-]+", name):
            # webdataset cuts member and shard names at dots, and `__x__` names are skipped by it.
            raise UserError(f"{self.directory}: name={name!r}: use letters, digits, '-', '_' and '+' only")
        if block_tokens < 1 or blocks_per_shard < 1:
            raise UserError(f"{self.directory}: block_tokens and blocks_per_shard must be at least 1")
        check_vocabulary(str(self.directory), vocab_size, eos_id, self.dtype)
        self._take_directory(overwrite)

        self.tokens = 0
        self.documents = 0
        self.bytes_of_text = 0
        self._block: np.ndarray = np.empty(block_tokens + 1, DTYPES[self.dtype])
        self._fill = 0
        self._num_blocks = 0
        self._rows: list[list[Any]] = []  # of the shards, as the index keeps them
        self._file: BinaryIO | None = None
        self._path = self.directory
        self._hash = xxhash.xxh3_64()
        self._block_hashes: list[int] = []
        self._base, self._stride = member_layout(block_tokens, self.dtype)
        self._npy_header = npy_header(block_tokens, self.dtype)
        self._padding = bytes(self._stride - SECTOR - len(self._npy_header) - self._block.nbytes)

    def _take_directory(self, overwrite: bool) -> None:
        index, writing = self.directory / INDEX_FILE, self.directory / WRITING_FILE
        if index.exists() and not overwrite:
            raise UserError(
                f"{index}: a finished data set is already here: delete it or choose another directory"
            )
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            ours = writing.exists() or index.exists()
            tars = sorted(self.directory.glob("*.tar")) + sorted(self.directory.glob("*.tar.tmp"))
            if tars and not ours:
                raise UserError(f"{tars[0]}: a tar that this writer did not write: choose an empty directory")
            writing.touch()
            index.unlink(missing_ok=True)
            fsync_directory(self.directory)
            for tar in tars:
                tar.unlink()
            (self.directory / HASHES_FILE).unlink(missing_ok=True)
            (self.directory / f"{HASHES_FILE}.tmp").write_bytes(b"")  # whatever a killed writer left in it

    def add(self, tokens: np.ndarray | list[int], *, bytes_of_text: int = 0) -> None:
        """Append ids to the row: any piece of it, usually one document with its EOS. An empty piece is fine.

        Raises UserError when an id is outside the vocabulary (the tokens come from another tokenizer).
        """
        ids = np.asarray(tokens)
        self.bytes_of_text += bytes_of_text
        if ids.size == 0:
            return
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"tokens must be a 1-D array of integers, not {ids.dtype} {ids.shape}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"{self.directory}: token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.vocab_size} ids: encode the text with the tokenizer of this data set"
            )
        self.tokens += ids.size
        self.documents += int(np.count_nonzero(ids == self.eos_id))
        start = 0
        while start < ids.size:
            piece = ids[start : start + len(self._block) - self._fill]
            self._block[self._fill : self._fill + piece.size] = piece
            self._fill += piece.size
            start += piece.size
            if self._fill == len(self._block):
                self._write_block()
                self._block[0] = self._block[-1]
                self._fill = 1

    def close(self) -> Index:
        """Pad the last block, finish the last shard, write the index. Returns it with its fingerprint."""
        if self._fill > 1 or (self._fill == 1 and self._num_blocks == 0):
            n_valid = self._fill
            self._block[self._fill :] = self.eos_id
            self._write_block()
        else:
            n_valid = len(self._block) if self._num_blocks else 0
        self._fill = 0
        if self._file is not None:
            self._finish_shard()
        hashes = self.directory / HASHES_FILE
        with disk_errors(hashes), open(f"{hashes}.tmp", "rb") as file:
            os.fsync(file.fileno())
        os.replace(f"{hashes}.tmp", hashes)  # its own fsync is the one of the directory, before the index
        fsync_directory(self.directory)
        index = Index(
            name=self.name,
            dtype=self.dtype,
            vocab_size=self.vocab_size,
            eos_id=self.eos_id,
            tokenizer_sha256=self.tokenizer_sha256,
            block_tokens=self.block_tokens,
            tokens=self.tokens,
            n_valid=n_valid,
            documents=self.documents,
            bytes_of_text=self.bytes_of_text,
            shards=Shards(self._rows, self._base, self._stride),
            meta=self.meta,
        ).save(self.directory)
        (self.directory / WRITING_FILE).unlink()
        return index

    def abort(self) -> None:
        """Give up without a commit; what was written is swept up by the next writer of this directory."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _write_block(self) -> None:
        if self._file is None:
            self._path = self.directory / f"{self.name}-{len(self._rows):06d}.tar"
            with disk_errors(self._path):
                self._file = open(f"{self._path}.tmp", "wb")  # noqa: SIM115  (closed in _finish_shard or abort)
            self._hash = xxhash.xxh3_64()
            self._block_hashes = []
        member = tarfile.TarInfo(f"{self._num_blocks:09d}.tokens.npy")
        member.size = len(self._npy_header) + self._block.nbytes
        member.mode = 0o444
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._write(self._npy_header)
        self._write(self._block.data)
        self._write(self._padding)
        self._block_hashes.append(block_hash(self._block))
        self._num_blocks += 1
        if len(self._block_hashes) == self.blocks_per_shard:
            self._finish_shard()

    def _write(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        with disk_errors(self._path):
            self._file.write(data)
        self._hash.update(data)

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._write(bytes(2 * SECTOR))  # the end of a tar
        with disk_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            self._file.close()
        self._file = None
        os.replace(f"{self._path}.tmp", self._path)
        hashes = np.array(self._block_hashes, HASH).tobytes()
        path = self.directory / f"{HASHES_FILE}.tmp"
        with disk_errors(path), open(path, "ab") as file:
            file.write(hashes)
        digests = [self._hash.hexdigest(), hex_of(xxhash.xxh3_64_intdigest(hashes))]
        self._rows.append([self._path.name, size, len(self._block_hashes), *digests])
