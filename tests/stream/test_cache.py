"""The node's cache: several jobs and users, killed fetches, full disks, networks that fail or lie."""

import errno
import http.client
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from corpora import FIRST, write_corpus
from fsspec.spec import AbstractFileSystem

from trainer.errors import UserError
from trainer.stream import store as store_module
from trainer.stream.batches import TokenBatches
from trainer.stream.cache import NodeCache
from trainer.stream.config import DataConfig
from trainer.stream.reader import TokenReader
from trainer.stream.store import RemoteStore

BLOCKS, OTHER_USER = 20, 54321


class FlakyFileSystem(AbstractFileSystem):
    """Local files behind a network: each of `faults` spoils one ranged read of a shard."""

    protocol = "flaky"
    cachable = False
    faults: list[Any] = []  # noqa: RUF012  (shared on purpose: fsspec makes the instances)
    reads: list[tuple[str, int]] = []  # noqa: RUF012

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": os.stat(self._strip_protocol(path)).st_size, "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        data = Path(self._strip_protocol(path)).read_bytes()[start:end]
        if path.endswith(".tar"):
            self.reads.append((path, start or 0))
            if self.faults:
                fault = self.faults.pop(0)
                if isinstance(fault, BaseException):
                    raise fault
                return fault(data)
        return data


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that every user of the machine can reach, with a data set and room for a cache."""
    monkeypatch.setattr(store_module, "PAUSE_S", 0.0)
    FlakyFileSystem.faults.clear()
    FlakyFileSystem.reads.clear()
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    (directory / "scratch").mkdir()
    (directory / "scratch").chmod(0o1777)
    write_corpus(directory / "data", 64 * BLOCKS, document=10**6)
    mask = os.umask(0o022)
    yield directory
    os.umask(mask)
    shutil.rmtree(directory)


def reader_of(node: Path, **options: Any) -> TokenReader:
    return TokenReader(
        f"flaky://{node}/data", seq_len=64, cache_dir=str(node / "scratch" / "cache"), **options
    )


def first_tokens(reader: TokenReader, windows: range) -> list[int]:
    out_NL = np.empty((len(windows), 65), np.uint32)
    reader.read(np.array(windows), out_NL)
    return ((out_NL[:, 0].astype(np.int64) - FIRST) // 64).tolist()


USER = """
import json, os, sys
sys.path.insert(0, {tests!r})
import test_cache
from pathlib import Path
node = Path({node!r})
os.umask(0o022)
if {uid}: os.setuid({uid})
reader = test_cache.reader_of(node)
windows = test_cache.first_tokens(reader, range({first}, {last}))
print(json.dumps([windows, len(reader.store.system.reads)]))
"""


def other_user(node: Path, first: int, last: int) -> tuple[list[int], int]:
    """(windows read, fetches) of another user's job; where only root may become one, of one who may not
    write the files that are there.
    """
    uid = OTHER_USER if os.geteuid() == 0 else 0
    code = USER.format(tests=str(Path(__file__).parent), node=str(node), uid=uid, first=first, last=last)
    shared = [p for p in (node / "scratch" / "cache").glob("*.tar") if "-" not in p.name]
    modes = {} if uid else {path: path.stat().st_mode for path in shared}
    for path in modes:
        path.chmod(0o444)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    for path, mode in modes.items():
        path.chmod(mode)
    assert done.returncode == 0, done.stderr
    windows, fetches = json.loads(done.stdout)
    return windows, fetches


def test_two_users_share_what_is_there_and_fetch_the_rest_into_files_of_their_own(node: Path) -> None:
    assert first_tokens(reader_of(node), range(10)) == list(range(10))
    cache = node / "scratch" / "cache"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o1777  # as the directory for all that it lies in
    mine = {path.name: path.read_bytes() for path in cache.glob("*.tar")}
    assert len(mine) == 2
    windows, fetches = other_user(node, 4, 14)
    assert windows == list(range(4, 14))
    assert fetches == 4  # 10 .. 13: the others were in files that this user may read, not write
    uid = OTHER_USER if os.geteuid() == 0 else os.geteuid()
    theirs = sorted(path for path in cache.glob("*.tar") if path.name not in mine)
    assert sorted(path.name.removesuffix(f"-{uid}.tar") + ".tar" for path in theirs) == sorted(mine)
    assert all(path.stat().st_uid == uid for path in theirs)
    assert {name: (cache / name).read_bytes() for name in mine} == mine
    assert other_user(node, 4, 14) == (windows, 0)
    assert first_tokens(reader_of(node), range(BLOCKS)) == list(range(BLOCKS))


def test_who_comes_first_owns_the_file_whoever_it_is(node: Path) -> None:
    if os.geteuid() == 0:
        assert other_user(node, 0, 10) == (list(range(10)), 10)
        # root may write to it, and does; the owner still can, too
        assert first_tokens(reader_of(node), range(12)) == list(range(12))
        assert len(FlakyFileSystem.reads) == 2
        assert other_user(node, 0, 12) == (list(range(12)), 0)
    else:
        assert first_tokens(reader_of(node), range(10)) == list(range(10))
    assert len(list((node / "scratch" / "cache").glob("*.tar"))) == 2


def test_a_file_that_may_not_be_read_is_no_hindrance(node: Path) -> None:
    first_tokens(reader_of(node), range(3))
    for path in (node / "scratch" / "cache").glob("*.tar"):
        path.chmod(0o600 if os.geteuid() == 0 else 0o000)
    if os.geteuid() == 0:
        assert other_user(node, 0, 3) == ([0, 1, 2], 3)
    else:
        assert first_tokens(reader_of(node), range(3)) == [0, 1, 2]


def test_a_cache_outside_of_shared_directories_obeys_the_umask(node: Path) -> None:
    os.umask(0o027)
    directory = node / "home" / "a" / "b"
    cached = NodeCache(str(directory)).open(directory / "x.tar", 10)
    os.close(cached.handle)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o750
    assert stat.S_IMODE((directory / "x.tar").stat().st_mode) == 0o640


def test_a_link_in_the_cache_is_not_followed(node: Path) -> None:
    reader = reader_of(node)
    cached = reader.store.cached(reader.index.shards[0])  # type: ignore[attr-defined]
    cached.parent.mkdir()
    precious = node / "precious"
    precious.write_bytes(b"keep me")
    cached.symlink_to(precious)
    assert first_tokens(reader, range(3)) == [0, 1, 2]
    assert precious.read_bytes() == b"keep me"


def test_a_cache_that_cannot_be_written_is_one_line(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (node / "scratch" / "cache").write_bytes(b"a file")
    with pytest.raises(
        UserError, match=r"the cache cannot be written .* set data\.cache_dir to one of yours"
    ):
        first_tokens(reader_of(node), range(1))
    (node / "scratch" / "cache").unlink()
    first_tokens(reader_of(node), range(1))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError) as error:
            first_tokens(reader_of(node), range(9))
    assert "No space left on device): make room, or set data.cache_dir to a larger disk" in str(error.value)
    assert "\n" not in str(error.value)
    assert first_tokens(reader_of(node), range(9)) == list(range(9))


def test_a_file_limit_is_a_full_disk(node: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    reader = reader_of(node)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(UserError, match=r"the cache cannot be written \(File too large\): make room"):
            first_tokens(reader, range(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_cache
from pathlib import Path
write = os.pwrite
def half(handle, data, start):
    if len(data) > 200:
        write(handle, data[: len(data) // 2], start)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(handle, data, start)
os.pwrite = half
test_cache.first_tokens(test_cache.reader_of(Path({node!r})), range(3))
"""


def test_a_killed_fetch_leaves_a_block_that_is_fetched_again(node: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    code = KILLED.format(tests=str(Path(__file__).parent), node=str(node))
    done = subprocess.run([sys.executable, "-c", code], timeout=120, env=environment, check=False)
    assert done.returncode == -9
    reader = reader_of(node)
    shard = reader.index.shards[0]
    raw = reader.store.cached(shard).read_bytes()  # type: ignore[attr-defined]
    expected = (node / "data" / shard.file).read_bytes()
    assert raw[shard.base : shard.base + 100] == expected[shard.base : shard.base + 100]
    assert raw[: shard.bytes] != expected
    assert first_tokens(reader, range(3)) == [0, 1, 2]
    assert len(FlakyFileSystem.reads) == 3


def test_a_cache_that_is_tidied_up_under_a_running_job_does_not_disturb_it(node: Path) -> None:
    reader = reader_of(node)
    assert first_tokens(reader, range(2)) == [0, 1]
    shutil.rmtree(node / "scratch" / "cache")
    assert first_tokens(reader, range(BLOCKS)) == list(range(BLOCKS))


CUT = http.client.IncompleteRead(b"")


@pytest.mark.parametrize(
    "faults",
    [
        [OSError("reset")] * 2,
        [TimeoutError(), EOFError()],
        [CUT, OSError("reset")],
        [lambda data: data[:50]] * 2,  # answered, but cut short
        [lambda data: bytes(len(data)), lambda data: data[::-1]],  # answered, and wrong
    ],
)
def test_a_store_that_fails_or_lies_twice_is_forgiven(node: Path, faults: list[Any]) -> None:
    FlakyFileSystem.faults.extend(faults)
    assert first_tokens(reader_of(node), range(5)) == list(range(5))
    assert FlakyFileSystem.faults == []
    assert len(FlakyFileSystem.reads) == 7


def test_three_failures_and_three_lies_are_told_apart(node: Path) -> None:
    FlakyFileSystem.faults.extend([OSError("reset")] * 3)
    with pytest.raises(UserError, match=r"web-000000\.tar: cannot be read after 3 attempts \(reset\)"):
        first_tokens(reader_of(node), range(5))
    FlakyFileSystem.faults.extend([lambda data: data[:50]] * 3)
    with pytest.raises(UserError, match=r"web-000000\.tar: block 0 at byte 640 has hash"):
        first_tokens(reader_of(node), range(5))
    FlakyFileSystem.faults.append(PermissionError("denied"))
    with pytest.raises(UserError, match=r"web-000000\.tar: cannot be read \(denied\): check the file"):
        first_tokens(reader_of(node), range(5))


def test_only_damage_is_quarantined_never_a_network_that_fails(node: Path) -> None:
    config = DataConfig(
        train=f"flaky://{node}/data", cache_dir=str(node / "scratch" / "cache"), on_damage="quarantine"
    )
    batches = TokenBatches(config, seed=1, seq_len=16, global_batch=80, micro_batch=8)
    FlakyFileSystem.faults.extend([OSError("reset")] * 3)
    with pytest.raises(UserError, match="cannot be read after 3 attempts"):
        batches.batch(0)
    assert batches.new_damage() == []
    FlakyFileSystem.faults.extend([lambda data: data[:50]] * 3)
    batches.batch(0)
    (damage,) = batches.new_damage()
    assert damage["file"].startswith(f"flaky://{node}/data/web-")
    assert isinstance(batches.readers["train"].store, RemoteStore)
