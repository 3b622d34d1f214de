"""Where shards lie: a directory that can be mapped, or any URL that fsspec opens (s3://, gs://, https://,
...).

A remote shard gets a sparse file of its full size in the node's cache, and blocks are fetched into it one by
one with ranged reads when they are first touched. The hash in the index says whether a block is there, so
there is nothing else to keep in step: no lock, no list of what was fetched. Processes that fetch the same
block at once write the same bytes, and a crash in the middle of a write leaves a block that does not match
and is fetched again. The name in the cache comes from the whole URL and the hash of the shard, so equal file
names of two sources never meet.
"""

import hashlib
import mmap
import os
import time
from pathlib import Path
from typing import Any, Protocol

import fsspec

from trainer.errors import UserError
from trainer.stream.index import INDEX_FILE, Shard, disk_errors

ATTEMPTS = 3
PAUSE_S = 1.0  # before the second attempt; doubled before the third


class Store(Protocol):
    """One data set directory. Every method raises FileNotFoundError for what is not there."""

    def name(self, file: str) -> str:
        """Full path or URL, for messages."""

    def read_index(self) -> bytes: ...

    def size(self, file: str) -> int: ...

    def map(self, shard: Shard) -> mmap.mmap:
        """The bytes of a shard, whose size was checked; blocks of a remote one may still be zeros."""

    def fetch(self, shard: Shard, start: int, count: int) -> bool:
        """Bring `count` bytes from `start` on into the map. False: they are as they are, nothing to fetch."""


class LocalStore:
    """A directory on a local or shared file system, mapped where it lies."""

    def __init__(self, directory: str):
        self.directory = Path(directory)

    def name(self, file: str) -> str:
        return str(self.directory / file)

    def read_index(self) -> bytes:
        return (self.directory / INDEX_FILE).read_bytes()

    def size(self, file: str) -> int:
        return (self.directory / file).stat().st_size

    def map(self, shard: Shard) -> mmap.mmap:
        with open(self.directory / shard.file, "rb") as file:
            return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def fetch(self, shard: Shard, start: int, count: int) -> bool:
        return False


class RemoteStore:
    """A URL, with a cache on this node that all its processes share."""

    def __init__(self, url: str, cache_dir: str):
        self.url = url.rstrip("/")
        self.cache = Path(cache_dir).expanduser()
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: cannot be opened: {error}") from None

    def name(self, file: str) -> str:
        return f"{self.url}/{file}"

    def read_index(self) -> bytes:
        return self._try(INDEX_FILE, "cat_file")

    def size(self, file: str) -> int:
        return int(self._try(file, "size"))

    def cached(self, shard: Shard) -> Path:
        """The file of the cache that stands for this shard."""
        key = hashlib.sha256(f"{self.name(shard.file)}\n{shard.bytes}\n{shard.xxh3}".encode()).hexdigest()
        return self.cache / f"{key[:40]}.tar"

    def map(self, shard: Shard) -> mmap.mmap:
        path = self.cached(shard)
        with disk_errors(path):
            self.cache.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if os.fstat(handle).st_size != shard.bytes:
                    os.ftruncate(handle, shard.bytes)
                return mmap.mmap(handle, 0, prot=mmap.PROT_READ)
            finally:
                os.close(handle)

    def fetch(self, shard: Shard, start: int, count: int) -> bool:
        data = self._try(shard.file, "cat_file", start=start, end=start + count)
        path = self.cached(shard)
        with disk_errors(path), open(path, "r+b") as file:
            file.seek(start)
            file.write(data)
        return True

    def _try(self, file: str, method: str, **options: Any) -> Any:
        """Call a method of the file system on `file`; a network that hiccups gets two more chances."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                return getattr(self.system, method)(f"{self.root}/{file}", **options)
            except (FileNotFoundError, PermissionError):
                raise
            except OSError as error:
                reason = str(error) or type(error).__name__
        raise UserError(
            f"{self.name(file)}: cannot be read after {ATTEMPTS} attempts ({reason}): check the network and "
            f"the store"
        )


def open_store(path: str, cache_dir: str) -> Store:
    """The store of a data set directory: a URL has `://` in it, everything else is a path."""
    return RemoteStore(path, cache_dir) if "://" in path else LocalStore(path)


def split_path(path: str, split: str, cache_dir: str) -> str | None:
    """Where split `train` or `val` of a data set lies; None when there is no such validation split."""
    below = f"{path.rstrip('/')}/{split}"
    try:
        open_store(below, cache_dir).size(INDEX_FILE)
    except OSError:
        return path if split == "train" else None
    return below
