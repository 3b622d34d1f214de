"""Shards behind a URL: fetched block by block into a cache that many processes share, and checked by hash."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from corpora import FIRST, write_corpus
from fsspec.implementations.memory import MemoryFileSystem

from trainer.errors import UserError
from trainer.stream import store as store_module
from trainer.stream.batches import TokenBatches
from trainer.stream.config import DataConfig, SourceConfig
from trainer.stream.reader import TokenReader
from trainer.stream.store import RemoteStore

BLOCKS = 20


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """memory://data/{web,code}/train: two sources whose shards have equal file names."""
    monkeypatch.setattr(store_module, "PAUSE_S", 0.0)
    memory = fsspec.filesystem("memory")
    for name, document in (("web", 10**6), ("code", 5)):
        write_corpus(tmp_path / "up" / name / "train", 64 * BLOCKS, document=document)
        memory.put(str(tmp_path / "up" / name), f"/data/{name}", recursive=True)
    yield memory
    memory.rm("/data", recursive=True)


def reader_of(cache: Path, source: str = "web") -> TokenReader:
    return TokenReader(f"memory://data/{source}/train", seq_len=64, cache_dir=str(cache))


def read(reader: TokenReader, windows: list[int]) -> np.ndarray:
    out_NL = np.empty((len(windows), 65), np.uint32)
    reader.read(np.array(windows), out_NL)
    return out_NL


def count_fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every ranged read, as 'path start'."""
    fetched: list[str] = []
    original = MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, path: str, start: int | None = None, **options: Any) -> bytes:
        if start is not None:
            fetched.append(f"{path} {start}")
        return original(self, path, start=start, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return fetched


def test_batches_from_a_url_equal_those_from_disk(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    def hashes(root: str) -> list[int]:
        config = DataConfig(
            sources={name: SourceConfig(f"{root}/{name}") for name in ("web", "code")},
            cache_dir=str(tmp_path / "cache"),
        )
        batches = TokenBatches(config, seed=1, seq_len=16, global_batch=16, micro_batch=16)
        return [batches.batch(step).micros[0].rows_hash for step in range(8)]

    assert hashes("memory://data") == hashes(str(tmp_path / "up"))
    assert (
        len(list((tmp_path / "cache").iterdir())) == 6
    )  # three shards of each source, equal names kept apart


def test_only_touched_blocks_are_fetched_and_only_once_a_node(
    bucket: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = count_fetches(monkeypatch)
    assert read(reader_of(tmp_path), [3, 11, 3])[:, 0].tolist() == [FIRST + 64 * w for w in (3, 11, 3)]
    assert sum(".tar" in name for name in fetched) == 2
    assert sum("blocks.xxh3" in name for name in fetched) == 2  # the slices of two shards
    sizes: list[str] = []
    monkeypatch.setattr(
        RemoteStore,
        "size",
        lambda self, file, size=RemoteStore.size: [sizes.append(file), size(self, file)][1],
    )
    read(reader_of(tmp_path), [3, 11])  # another process of the node
    assert len(fetched) == 4
    assert sizes == ["blocks.xxh3"]  # asked once a process; the shards' sizes, once a node
    read(reader_of(tmp_path), [3, 12])
    assert len(fetched) == 5
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.glob("*.tar")) < 64 * 1024


def test_the_cache_tells_urls_and_versions_apart(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    shard, store = reader.index.shards[0], reader.store
    other_url = RemoteStore("memory://data/code/train", str(tmp_path))
    assert isinstance(store, RemoteStore)
    names = {store.cached(shard), other_url.cached(shard), store.cached(replace(shard, xxh3="0" * 16))}
    assert len(names) == 3
    assert store.cached(shard) == RemoteStore("memory://data/web/train/", str(tmp_path)).cached(shard)


def test_a_half_written_block_in_the_cache_is_fetched_again(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    expected = read(reader, list(range(BLOCKS)))
    cached = reader.store.cached(reader.index.shards[0])  # type: ignore[attr-defined]
    raw = bytearray(cached.read_bytes())
    raw[reader.index.shards[0].base + 4 : reader.index.shards[0].base + 90] = bytes(86)
    cached.write_bytes(raw)
    np.testing.assert_array_equal(read(reader_of(tmp_path), list(range(BLOCKS))), expected)
    cached.write_bytes(b"")  # a crash between creating the file and giving it its size
    np.testing.assert_array_equal(read(reader_of(tmp_path), list(range(BLOCKS))), expected)


def test_readers_that_fetch_the_same_blocks_at_once_agree(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: read(reader_of(tmp_path), list(range(BLOCKS))), range(8)))
    assert all((result[:, 0] == FIRST + 64 * np.arange(BLOCKS)).all() for result in results)


def test_a_damaged_remote_block_is_an_error(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    raw = bytearray(bucket.cat_file("/data/web/train/web-000001.tar"))
    raw[700] ^= 1
    bucket.pipe_file("/data/web/train/web-000001.tar", bytes(raw))
    with pytest.raises(
        UserError, match=r"memory://data/web/train/web-000001\.tar: block 0 at byte 640 has hash"
    ):
        read(reader_of(tmp_path), list(range(BLOCKS)))


def test_a_truncated_and_a_missing_remote_shard_are_errors(bucket: MemoryFileSystem, tmp_path: Path) -> None:
    whole = bucket.cat_file("/data/web/train/web-000001.tar")
    bucket.pipe_file("/data/web/train/web-000001.tar", whole[:-512])
    with pytest.raises(UserError, match=rf"web-000001\.tar: {len(whole) - 512} bytes where index\.json says"):
        read(reader_of(tmp_path), [8])
    bucket.rm_file("/data/web/train/web-000001.tar")
    with pytest.raises(UserError, match=r"web-000001\.tar: missing shard"):
        read(reader_of(tmp_path), [8])
    with pytest.raises(UserError, match=r"memory://data/nothing/train/index\.json: not found"):
        reader_of(tmp_path, "nothing")


def test_a_network_that_fails_twice_is_forgiven_and_three_times_is_named(
    bucket: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(tmp_path)
    failures = [OSError("connection reset")] * 2
    original = MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, path: str, **options: Any) -> bytes:
        if failures:
            raise failures.pop()
        return original(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    assert read(reader, [4])[0, 0] == FIRST + 64 * 4
    failures.extend([OSError("connection reset")] * 3)
    with pytest.raises(
        UserError, match=r"web-000000\.tar: cannot be read after 3 attempts \(connection reset\)"
    ):
        read(reader, [5])


def test_an_unknown_kind_of_url_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nosuch://bucket/data: cannot be opened"):
        TokenReader("nosuch://bucket/data", seq_len=16, cache_dir=str(tmp_path))
