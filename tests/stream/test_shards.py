"""TokenShard v1: what is written, what a plain reader sees, and what is refused."""

import errno
import io
import itertools
import json
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash

from trainer.errors import UserError
from trainer.stream.index import BLOCK_TOKENS, Index, member_layout
from trainer.stream.shards import ShardWriter

EOS = 9


def write(directory: Path, documents: list[list[int]], **changes: object) -> Index:
    options: dict = {
        "name": "web", "vocab_size": 1000, "eos_id": EOS, "tokenizer_sha256": "t", "block_tokens": 16,
        "blocks_per_shard": 3,
    }  # fmt: skip
    writer = ShardWriter(directory, **(options | changes))
    for document in documents:
        writer.add(np.array(document, dtype=np.int64))
    return writer.close()


def plain_blocks(directory: Path) -> list[np.ndarray]:
    """The blocks as the real webdataset package reads them."""
    urls = [str(path) for path in sorted(directory.glob("*.tar"))]
    return [sample["tokens.npy"] for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()]


def row_of(documents: list[list[int]]) -> np.ndarray:
    return np.array([token for document in documents for token in document], dtype=np.int64)


@pytest.mark.parametrize(
    "sizes", [[], [0], [1], [2], [16], [17], [18], [33], [32, 1], [1] * 40, [0, 100, 0, 7, 1, 49]]
)
def test_blocks_tile_the_row_of_documents(tmp_path: Path, sizes: list[int]) -> None:
    """Empty, one-token and longer-than-a-block documents: nothing lost, nothing added but the padding."""
    documents = [[*range(100, 99 + size), EOS] if size else [] for size in sizes]
    row = row_of(documents)
    index = write(tmp_path, documents)
    blocks = plain_blocks(tmp_path) if index.shards else []
    assert index.tokens == len(row)
    assert index.documents == sum(size > 0 for size in sizes)
    assert len(blocks) == index.num_blocks
    assert all(block.dtype == np.uint16 and len(block) == 17 for block in blocks)
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(blocks))
    joined = np.concatenate([block[:-1] for block in blocks[:-1]] + blocks[-1:]) if blocks else row
    np.testing.assert_array_equal(joined[: len(row)], row)
    assert (joined[len(row) :] == EOS).all()
    if blocks:
        assert index.n_valid == len(row) - 16 * (len(blocks) - 1)
        assert len(joined) - len(row) <= 16  # never a block of padding alone
    assert Index.load(tmp_path) == index


def test_default_block_and_layout_of_the_paper_form() -> None:
    assert BLOCK_TOKENS == 2**18
    assert member_layout(BLOCK_TOKENS, "uint16") == (640, 525_312)
    assert member_layout(BLOCK_TOKENS, "uint32") == (640, 1_049_600)


def test_tars_are_plain_and_byte_reproducible(tmp_path: Path) -> None:
    documents = [[*range(10, 90), EOS]] * 3
    first, second = write(tmp_path / "a", documents), write(tmp_path / "b", documents)
    assert first.fingerprint == second.fingerprint
    for shard in first.shards:
        raw = (tmp_path / "a" / shard.file).read_bytes()
        assert raw == (tmp_path / "b" / shard.file).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for position, member in enumerate(tar.getmembers()):
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
                assert raw[member.offset + 257 :][:6] == b"ustar\0"  # POSIX, no GNU or PAX extension
                assert member.offset == position * shard.stride
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                tokens = np.load(io.BytesIO(content), allow_pickle=False)
                np.testing.assert_array_equal(
                    np.frombuffer(raw, "<u2", 17, shard.base + position * shard.stride), tokens
                )


@pytest.mark.parametrize(("vocab", "dtype"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_dtype_at_the_edge_of_uint16(tmp_path: Path, vocab: int, dtype: str) -> None:
    index = write(tmp_path, [[0, vocab - 1, EOS]], vocab_size=vocab)
    assert index.dtype == dtype
    assert plain_blocks(tmp_path)[0][1] == vocab - 1


def test_vocabulary_larger_than_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size=65537 does not fit uint16 .* use dtype=uint32"):
        write(tmp_path, [], vocab_size=65_537, dtype="uint16")


@pytest.mark.parametrize("bad", [-1, 1000, 70_000])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, bad: int) -> None:
    with pytest.raises(UserError, match=f"token id {bad} is outside the vocabulary of 1000"):
        write(tmp_path, [[1, bad, EOS]])


def test_tokens_must_be_integers(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, name="web", vocab_size=10, eos_id=1, tokenizer_sha256="t")
    with pytest.raises(ValueError, match="1-D array of integers"):
        writer.add(np.array([1.5]))


def test_only_the_index_commits(tmp_path: Path) -> None:
    """A writer that dies leaves no data set, and the next one replaces what it left."""
    options = {"name": "web", "vocab_size": 1000, "eos_id": EOS, "tokenizer_sha256": "t", "block_tokens": 16}
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, **options, blocks_per_shard=1) as writer:  # noqa: PT012
        writer.add(np.arange(100, 200))
        raise KeyboardInterrupt
    assert len(list(tmp_path.glob("*.tar"))) == 6
    with pytest.raises(UserError, match=r"index\.json: not found"):
        Index.load(tmp_path)
    index = write(tmp_path, [[100, EOS]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks.xxh3", "index.json", "web-000000.tar"]
    assert index.tokens == 2


def test_a_finished_data_set_and_foreign_tars_are_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "done", [[100, EOS]])
    with pytest.raises(UserError, match="a finished data set is already here"):
        write(tmp_path / "done", [[100, EOS]])
    assert write(tmp_path / "done", [[100, 101, EOS]], overwrite=True).tokens == 3
    (tmp_path / "web-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="this writer did not write"):
        write(tmp_path, [[100, EOS]])
    assert (tmp_path / "web-000000.tar").read_bytes() == b"mine"


def test_full_disk_is_one_line_and_no_commit(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            UserError, match=r"000000\.tar: cannot be written .* nothing was committed"
        ) as error:
            write(tmp_path, [list(range(10, 900)) * 20], blocks_per_shard=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.EFBIG
    assert not (tmp_path / "index.json").exists()


ROW = ["web-000000.tar", 2048, 1, "0" * 16, "0" * 16]


def damaged(**changes: object) -> bytes:
    """A valid index with some keys changed; None removes the key."""
    content = {
        "format": "trivium-tokens-2", "name": "web", "dtype": "uint16", "vocab_size": 1000, "eos_id": EOS,
        "tokenizer_sha256": "t", "block_tokens": 16, "tokens": 17, "n_valid": 17, "documents": 1,
        "bytes_of_text": 0, "meta": {}, "base": 640, "stride": 1024,
        "columns": ["file", "bytes", "blocks", "xxh3", "hashes"], "shards": [ROW],
    }  # fmt: skip
    content |= changes
    return json.dumps({name: value for name, value in content.items() if value is not None}).encode()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            damaged(format="trivium-tokens-1"),
            "'trivium-tokens-1' keeps the block hashes in the index, .* again",
        ),
        (damaged(format="trivium-tokens-9"), "format 'trivium-tokens-9' is not the one this version reads"),
        (b"[1, 2]", "format None is not the one"),
        (b'{"format": "trivium-tok', "not valid JSON"),
        (damaged(tokens=None), "key 'tokens' is missing"),
        (damaged(tokens="17"), "tokens='17' is not a count"),
        (damaged(tokens=34), "do not fill 1 blocks of 16"),
        (damaged(n_valid=3), "n_valid=3 does not fit"),
        (damaged(vocab_size=65_537), "does not fit uint16"),
        (damaged(eos_id=1000), "eos_id=1000 is outside the vocabulary"),
        (damaged(dtype="int8"), "dtype='int8'"),
        (damaged(shards=[{"file": "a.tar"}]), "list of shards is damaged"),
        (damaged(shards=[5]), "list of shards is damaged"),
        (damaged(shards=5), "list of shards is damaged"),
        (damaged(shards=[[*ROW[:2], "1", *ROW[3:]]]), "list of shards is damaged"),
        (damaged(shards=[[*ROW[:2], True, *ROW[3:]]]), "list of shards is damaged"),
        (damaged(shards=[[*ROW[:4], "0" * 15 + "x"]]), "list of shards is damaged"),
        (damaged(shards=[[*ROW[:4], "0" * 15]]), "list of shards is damaged"),
        (damaged(shards=[ROW, ROW]), "two shards have the same file name"),
        (
            damaged(shards=[[*ROW[:2], 2, *ROW[3:]]]),
            "shard web-000000.tar has a size that does not fit its 2",
        ),
        (damaged(shards=[[ROW[0], 1024, 0, *ROW[3:]]]), "size that does not fit its 0 blocks"),
        (damaged(columns=["file"]), r"columns are \['file'\] and not"),
        (damaged(stride=None), "key 'stride' is missing"),
        (damaged(stride="512"), "index is damaged|list of shards is damaged"),
        (damaged(block_tokens=512), "do not fit block_tokens"),
    ],
)
def test_a_damaged_index_is_refused(raw: bytes, message: str) -> None:
    assert Index.parse(damaged(), "i").tokens == 17
    with pytest.raises(UserError, match=message):
        Index.parse(raw, "DIR/index.json")


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "..", "."])
def test_a_shard_path_cannot_leave_the_directory(file: str) -> None:
    with pytest.raises(UserError, match="not a plain file name"):
        Index.parse(damaged(shards=[[file, *ROW[1:]]]), "i")


def test_block_hashes_lie_beside_the_index_and_under_its_fingerprint(tmp_path: Path) -> None:
    index = write(tmp_path, [[*range(10, 200), EOS]])
    raw = (tmp_path / "blocks.xxh3").read_bytes()
    blocks = plain_blocks(tmp_path)
    assert raw == b"".join(xxhash.xxh3_64_digest(block.tobytes())[::-1] for block in blocks)
    assert len(index.shards) == 4
    for shard in index.shards:
        part = raw[8 * shard.first_block : 8 * (shard.first_block + shard.blocks)]
        assert xxhash.xxh3_64_hexdigest(part) == shard.hashes
        assert xxhash.xxh3_64_hexdigest((tmp_path / shard.file).read_bytes()) == shard.xxh3
    text = (tmp_path / "index.json").read_text()
    assert sum("web-0000" in line for line in text.splitlines()) == 4  # a line a shard


def test_hashes_that_a_killed_writer_left_are_swept_up(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [[*range(10, 90), EOS]])
    (tmp_path / "b").mkdir()
    for name in (".writing", "blocks.xxh3", "blocks.xxh3.tmp"):
        (tmp_path / "b" / name).write_bytes(b"left")
    assert write(tmp_path / "b", [[*range(10, 90), EOS]]) == first
    names = ["blocks.xxh3", "index.json", "web-000000.tar", "web-000001.tar"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == names
    again = write(tmp_path / "b", [[*range(10, 50), EOS]], overwrite=True)
    assert (tmp_path / "b" / "blocks.xxh3").stat().st_size == 8 * again.num_blocks
