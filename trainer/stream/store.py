"""Where shards lie: a directory that can be mapped, or any URL that fsspec opens (s3://, gs://, https://,
...).

A remote shard gets a sparse file of its full size in the node's cache (`cache.py`), and blocks are fetched
into it one by one with ranged reads when they are first touched. The hash of a block says whether it is
there, so there is nothing else to keep in step: no lock, no list of what was fetched. Processes that fetch
the same block at once write the same bytes, and a crash in the middle of a write leaves a block that does
not match and is fetched again.
"""

import http.client
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import fsspec

from trainer.errors import UserError
from trainer.stream.cache import CachedFile, NodeCache
from trainer.stream.index import HASH, HASHES_FILE, INDEX_FILE
from trainer.stream.table import Shard

ATTEMPTS = 3
PAUSE_S = 1.0  # before the second attempt; doubled before the third


class Mapped:
    """The bytes of a shard whose size was checked; blocks of a remote one may still be zeros.

    Holds the map and an open file: a fetch must write into the very file that is mapped, though somebody may
    have tidied up the cache and put another one in its place.
    """

    def __init__(self, handle: int, length: int, cached: CachedFile | None = None):
        self.handle = handle
        self.view = mmap.mmap(handle, length, prot=mmap.PROT_READ)
        self.cached = cached

    def __del__(self) -> None:
        os.close(self.handle)


class Store(Protocol):
    """One data set directory. Every method raises FileNotFoundError for what is not there."""

    def name(self, file: str) -> str:
        """Full path or URL, for messages."""

    def read_index(self) -> bytes: ...

    def size(self, file: str) -> int: ...

    def known(self, shard: Shard) -> bool:
        """Whether the size of this shard needs no question: it was asked on this node before."""

    def map(self, shard: Shard) -> Mapped: ...

    def hashes(self, shard: Shard, mapped: Mapped, attempt: int) -> bytes:
        """The shard's slice of the block hashes; later attempts go to the source again."""

    def fetch(self, shard: Shard, mapped: Mapped, start: int, count: int, attempt: int) -> bool:
        """Bring `count` bytes from `start` on into the map, for the attempt-th time; False: nothing left to
        try.
        """


class LocalStore:
    """A directory on a local or shared file system, mapped where it lies."""

    def __init__(self, directory: str):
        self.directory = Path(directory)

    def name(self, file: str) -> str:
        return str(self.directory / file)

    def read_index(self) -> bytes:
        return (self.directory / INDEX_FILE).read_bytes()

    def size(self, file: str) -> int:
        return os.stat(f"{self.directory}/{file}").st_size  # a Path object would cost as much as the question

    def known(self, shard: Shard) -> bool:
        return False

    def map(self, shard: Shard) -> Mapped:
        return Mapped(os.open(self.directory / shard.file, os.O_RDONLY), shard.bytes)

    def hashes(self, shard: Shard, mapped: Mapped, attempt: int) -> bytes:
        with open(self.directory / HASHES_FILE, "rb", buffering=0) as file:
            return os.pread(file.fileno(), HASH.itemsize * shard.blocks, HASH.itemsize * shard.first_block)

    def fetch(self, shard: Shard, mapped: Mapped, start: int, count: int, attempt: int) -> bool:
        """Let the kernel forget the block once, so that it is read from the disk or the server again."""
        if attempt:
            return False
        begin = start - start % mmap.PAGESIZE
        mapped.view.madvise(mmap.MADV_DONTNEED, begin, start + count - begin)
        os.posix_fadvise(mapped.handle, begin, start + count - begin, os.POSIX_FADV_DONTNEED)
        return True


class RemoteStore:
    """A URL, with a cache on this node that all its processes share."""

    def __init__(self, url: str, cache_dir: str):
        self.url = url.rstrip("/")
        self.cache = NodeCache(cache_dir)
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
        """The file of the cache that stands for this shard: the shard, and its slice of the hashes behind
        it.
        """
        return self.cache.path(f"{self.name(shard.file)}\n{shard.bytes}\n{shard.xxh3}\n{shard.hashes}")

    def known(self, shard: Shard) -> bool:
        return self.cached(shard).exists()

    def map(self, shard: Shard) -> Mapped:
        cached = self.cache.open(self.cached(shard), shard.bytes + HASH.itemsize * shard.blocks)
        return Mapped(cached.handle, shard.bytes, cached)

    def hashes(self, shard: Shard, mapped: Mapped, attempt: int) -> bytes:
        count = HASH.itemsize * shard.blocks
        if attempt == 0:
            return os.pread(mapped.handle, count, shard.bytes)
        start = HASH.itemsize * shard.first_block
        raw = self._try(HASHES_FILE, "cat_file", start=start, end=start + count)
        assert mapped.cached is not None
        mapped.cached.write(raw, shard.bytes)
        return raw

    def fetch(self, shard: Shard, mapped: Mapped, start: int, count: int, attempt: int) -> bool:
        assert mapped.cached is not None
        if mapped.cached.neighbour is not None:
            if attempt == 0:
                return mapped.cached.copy_from_neighbour(start, count)
            attempt -= 1
        if attempt == ATTEMPTS:
            return False
        mapped.cached.write(self._try(shard.file, "cat_file", start=start, end=start + count), start)
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
            except network_errors() as error:
                reason = str(error) or type(error).__name__
        raise UserError(
            f"{self.name(file)}: cannot be read after {ATTEMPTS} attempts ({reason}): check the network and "
            f"the store"
        )


def network_errors() -> tuple[type[BaseException], ...]:
    """What file systems raise when a connection fails: not all of it is an OSError."""
    errors: tuple[type[BaseException], ...] = (OSError, EOFError, http.client.HTTPException)
    aiohttp = sys.modules.get("aiohttp")  # loaded by the file systems that use it
    return errors if aiohttp is None else (*errors, aiohttp.ClientError)


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
