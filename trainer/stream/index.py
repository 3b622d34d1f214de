"""TokenShard v2: a corpus as one endless row of tokens, cut into blocks and kept in ordinary WebDataset tars.

    DIR/web-000000.tar                 USTAR, uncompressed, mtime 0: the same tokens give the same bytes
        000000000.tokens.npy           block_tokens + 1 ids, little-endian uint16 (vocab <= 65,536) or uint32
        000000001.tokens.npy           its first token is the last one of the member before
    DIR/blocks.xxh3                    xxh3_64 of the tokens of every block, 8 bytes each, little-endian
    DIR/index.json                     written last: a directory without it holds no data set

Block b holds tokens [b * B, b * B + B] of the row (B = block_tokens). Because the last token is repeated as
the first of the next block, windows of L + 1 tokens tile the row exactly for every L that divides B, so
`seq_len` is chosen when training, not when writing. All members of a shard have the same size, so the offset
of any token is arithmetic (`base + block * stride`): there is no per-sample index. Only the last block is
padded, with EOS.

The index names the hash of each shard's slice of `blocks.xxh3`, so its own sha256, the fingerprint of the
data, covers every block, while a reader of 100,000 shards loads 10 MB and not the hashes of 200 million
blocks. Any `webdataset` reader reads these tars; `.decode()` turns members into numpy arrays.
"""

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainer.errors import UserError
from trainer.stream.table import COLUMNS, SECTOR, Shards

FORMAT = "trivium-tokens-2"
BLOCK_TOKENS = 1 << 18
BLOCKS_PER_SHARD = 2_000  # about 1 GiB of uint16
INDEX_FILE = "index.json"
HASHES_FILE = "blocks.xxh3"
HASH = np.dtype("<u8")
WRITING_FILE = ".writing"  # present while a writer owns the directory, left behind by one that was killed
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def dtype_for(vocab_size: int) -> str:
    """The smallest dtype that holds ids 0 .. vocab_size - 1: `uint16` up to 65,536, else `uint32`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def block_hash(tokens: np.ndarray) -> int:
    """xxh3_64 of a block's token bytes (little-endian, npy header not included)."""
    return xxhash.xxh3_64_intdigest(tokens.data)


def npy_header(block_tokens: int, dtype: str) -> bytes:
    """The npy header of one member; its length does not depend on the member, so offsets stay arithmetic."""
    out = io.BytesIO()
    descr = DTYPES[dtype].str
    np.lib.format.write_array_header_1_0(
        out, {"descr": descr, "fortran_order": False, "shape": (block_tokens + 1,)}
    )
    return out.getvalue()


def member_layout(block_tokens: int, dtype: str) -> tuple[int, int]:
    """(base, stride) in bytes: the first token of a shard, and the distance between two members."""
    header = len(npy_header(block_tokens, dtype))
    payload = header + (block_tokens + 1) * DTYPES[dtype].itemsize
    return SECTOR + header, SECTOR + -(-payload // SECTOR) * SECTOR


@dataclass(frozen=True)
class Index:
    """The commit of a data set: everything a reader must know, and what it must refuse.

    `tokens` counts the real tokens of the row, EOS included and padding excluded; `n_valid` those of the last
    block (1 .. block_tokens + 1, the repeated first token counted). `documents` is the number of EOS tokens.
    `bytes_of_text` is the UTF-8 size of the text behind the tokens (0 = unknown). `meta` is the writer's own.
    """

    name: str
    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    block_tokens: int
    tokens: int
    n_valid: int
    documents: int
    bytes_of_text: int
    shards: Shards
    meta: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    fingerprint: str = field(default="", compare=False)  # "sha256:..." of the file; not part of the file

    @property
    def num_blocks(self) -> int:
        return int(self.shards.first_block[-1])

    def to_json(self) -> bytes:
        """One line per shard: to read, to grep, and short when there are 100,000."""
        content: dict[str, Any] = {"format": self.format}
        content |= {item.name: getattr(self, item.name) for item in fields(self)}
        del content["fingerprint"], content["shards"]
        content |= {"base": self.shards.base, "stride": self.shards.stride, "columns": COLUMNS}
        head = json.dumps(content, indent=1, ensure_ascii=False).removesuffix("\n}")
        rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in self.shards.rows())
        return f'{head},\n "shards": [\n{rows}\n ]\n}}\n'.encode()

    def save(self, directory: str | Path) -> "Index":
        """Commit: write beside, fsync, rename, fsync the directory. Returns it with its fingerprint."""
        raw = self.to_json()
        path = Path(directory) / INDEX_FILE
        temporary = path.with_suffix(".json.tmp")
        with disk_errors(path), open(temporary, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
        return Index.parse(raw, str(path))

    @classmethod
    def load(cls, directory: str | Path) -> "Index":
        """Read and check the index of a local directory. Raises UserError when it is missing or
        inconsistent.
        """
        path = Path(directory) / INDEX_FILE
        try:
            return cls.parse(path.read_bytes(), str(path))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path}: not found, so there is no finished data set here: "
                f"check the path, or run the command that writes the token shards to its end"
            ) from None

    @classmethod
    def parse(cls, raw: bytes, where: str) -> "Index":
        """`raw` is the content of an index file, `where` its name for messages."""
        rewrite = "write the token shards again"
        try:
            content = json.loads(raw)
        except ValueError:
            raise UserError(f"{where}: not valid JSON (cut or edited): {rewrite}") from None
        version = content.get("format") if isinstance(content, dict) else None
        if version == "trivium-tokens-1":
            raise UserError(
                f"{where}: format {version!r} keeps the block hashes in the index, this version beside it "
                f"({FORMAT!r}): {rewrite} (the same `trivium data` command does)"
            )
        if version != FORMAT:
            raise UserError(
                f"{where}: format {version!r} is not the one this version reads ({FORMAT!r}): {rewrite} "
                f"or install the version of trivium that wrote it"
            )
        known = {item.name for item in fields(cls)} - {"fingerprint"}
        missing = sorted((known | {"base", "stride", "columns"}) - content.keys())
        if missing:
            raise UserError(f"{where}: key {missing[0]!r} is missing: {rewrite}")
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        try:
            if content["columns"] != COLUMNS:
                raise ValueError(f"columns are {content['columns']} and not {COLUMNS}")
            shards = Shards(content["shards"], content["base"], content["stride"])
        except TypeError:
            raise UserError(f"{where}: the list of shards is damaged: {rewrite}") from None
        except ValueError as error:
            raise UserError(f"{where}: {error}: the index is damaged, {rewrite}") from None
        rest = {name: content[name] for name in known if name != "shards"}
        index = cls(**rest, shards=shards, fingerprint=digest)
        index.validate(where)
        return index

    def validate(self, where: str) -> None:
        """Raise UserError when a number contradicts another one: such an index was not written by us."""

        def refuse(what: str) -> UserError:
            return UserError(f"{where}: {what}: the index is damaged, write the token shards again")

        numbers = ("vocab_size", "eos_id", "block_tokens", "tokens", "n_valid", "documents", "bytes_of_text")
        for name in numbers:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise refuse(f"{name}={value!r} is not a count")
        if self.dtype not in DTYPES:
            raise refuse(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        check_vocabulary(where, self.vocab_size, self.eos_id, self.dtype)
        if self.block_tokens < 1:
            raise refuse("block_tokens=0")
        if (self.shards.base, self.shards.stride) != member_layout(self.block_tokens, self.dtype):
            raise refuse(f"base={self.shards.base}, stride={self.shards.stride} do not fit block_tokens")
        blocks = self.num_blocks
        if blocks != num_blocks(self.tokens, self.block_tokens):
            raise refuse(f"{self.tokens} tokens do not fill {blocks} blocks of {self.block_tokens}")
        if self.n_valid != (self.tokens - (blocks - 1) * self.block_tokens if blocks else 0):
            raise refuse(f"n_valid={self.n_valid} does not fit {self.tokens} tokens")


def num_blocks(tokens: int, block_tokens: int) -> int:
    """Blocks needed for a row of `tokens` ids: each new block brings `block_tokens` targets."""
    return 0 if tokens == 0 else max(1, -(-(tokens - 1) // block_tokens))


def check_vocabulary(where: str, vocab_size: int, eos_id: int, dtype: str) -> None:
    """Ids must fit the dtype: a uint16 cast of id 65,536 would silently become 0."""
    limit = 1 << (8 * DTYPES[dtype].itemsize)
    if not 1 <= vocab_size <= limit:
        raise UserError(
            f"{where}: vocab_size={vocab_size} does not fit {dtype} (at most {limit} ids): "
            f"use dtype={dtype_for(vocab_size)}"
        )
    if not 0 <= eos_id < vocab_size:
        raise UserError(
            f"{where}: eos_id={eos_id} is outside the vocabulary of {vocab_size} ids: fix the tokenizer"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk is the user's to mend: say so in one line, naming the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise UserError(
                f"{path}: cannot be written ({error.strerror}): make room or choose another directory; "
                f"nothing was committed"
            ) from error
        raise


def fsync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
