"""Writing files so that a half-written one never counts, and knowing a file again without reading it twice.

Every output is written under a temporary name, fsynced and renamed. A full disk becomes a `UserError` naming
the path and how much was needed; whatever else the operating system says stays an `OSError`.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
import zstandard

from trainer.durable import fsync_directory
from trainer.errors import UserError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
READ_BYTES = 1 << 20


@contextmanager
def disk_errors(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn "disk full" and "not writable" while working on `path` into a UserError; other errors pass
    through.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            more = f" (about {format_bytes(needed_bytes)} needed there)" if needed_bytes else ""
            raise UserError(
                f"{path}: no space left on the disk{more}: free some, or set output=DIR on another disk; "
                "the same command then goes on where this one stopped"
            ) from error
        if error.errno in NOT_WRITABLE:
            raise UserError(
                f"{path}: not writable ({error.strerror}): set output=DIR to a directory of yours"
            ) from error
        raise


@contextmanager
def atomic_file(path: Path, needed_bytes: int = 0, shared: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears as `path` only when the block ends without an error, fsynced before it is
    renamed.

    `shared`: other processes may be writing the same file (a cache), so the temporary name is this process's
    own.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else path.name + ".tmp")
    with disk_errors(path, needed_bytes):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def jsonl_writer(path: Path, needed_bytes: int = 0) -> Iterator["JsonlFile"]:
    """Append JSON objects to the zstd-compressed file `path`, which appears whole or not at all."""
    # One thread and a fixed level: the same rows give the same bytes on every run.
    compressor = zstandard.ZstdCompressor(level=3)
    with atomic_file(path, needed_bytes) as file, compressor.stream_writer(file, closefd=False) as stream:
        yield JsonlFile(stream)


class JsonlFile:
    """One JSON object a line into a stream of bytes."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, row: dict[str, Any]) -> None:
        self.stream.write(
            json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
        )


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a `.jsonl.zst` file, one at a time."""
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        rest = b""
        while block := stream.read(READ_BYTES):
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            for line in lines:
                yield json.loads(line)


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, hexadecimal (20 GB/s of CPU: the disk is the limit)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """{"bytes", "mtime_ns", "xxh3"} of a file. `known`, an older fingerprint, saves the hash when size and
    time agree.
    """
    status = path.stat()
    if known and known["bytes"] == status.st_size and known["mtime_ns"] == status.st_mtime_ns:
        return known
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "xxh3": hash_file(path)}


def replace_directory(new: Path, old: Path) -> None:
    """Put directory `new` in the place of `old` (which may not exist)."""
    trash = old.with_name(old.name + ".old")
    shutil.rmtree(trash, ignore_errors=True)
    if old.exists():
        os.replace(old, trash)
    os.replace(new, old)
    fsync_directory(old.parent)
    shutil.rmtree(trash, ignore_errors=True)


def require_space(directory: Path, needed_bytes: int) -> None:
    """Refuse before starting when `directory`'s disk has fewer than `needed_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise UserError(
            f"{directory}: {format_bytes(needed_bytes)} needed, {format_bytes(free)} free: free some space, "
            "or set output=DIR on another disk"
        )


def format_bytes(count: float) -> str:
    """1234567 -> '1.2 MB' (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
