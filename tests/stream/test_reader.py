"""Reading windows back, and refusing data that is damaged, missing or does not fit."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash
from corpora import EOS, FIRST, numbered_row, write_corpus

from trainer.errors import UserError
from trainer.stream import reader as reader_module
from trainer.stream.reader import TokenReader


def read_all(directory: Path, seq_len: int, verify: str = "blocks") -> np.ndarray:
    reader = TokenReader(str(directory), seq_len=seq_len, verify=verify)
    if verify != "off":
        reader.check_sizes()
    out_NL = np.empty((reader.num_windows, seq_len + 1), reader.index.dtype)
    reader.read(np.arange(reader.num_windows), out_NL)
    return out_NL


@pytest.mark.parametrize("tokens", [2, 64, 65, 66, 1000, 64 * 7 + 1, 64 * 7 + 2, 64 * 15])
@pytest.mark.parametrize("seq_len", [1, 4, 16, 64])
def test_windows_of_any_length_tile_the_row(tmp_path: Path, tokens: int, seq_len: int) -> None:
    write_corpus(tmp_path, tokens)
    row = numbered_row(tokens, 37)
    rows_NL = read_all(tmp_path, seq_len)
    assert len(rows_NL) == -(-(tokens - 1) // seq_len)  # no window of padding alone
    reader = TokenReader(str(tmp_path), seq_len=seq_len)
    num_targets_N = reader.num_targets(np.arange(len(rows_NL)))
    assert num_targets_N.sum() == tokens - 1
    assert num_targets_N.min() >= 1
    targets = np.concatenate([r[1 : 1 + n] for r, n in zip(rows_NL, num_targets_N)])
    np.testing.assert_array_equal(targets, row[1:])  # every token but the first is predicted exactly once
    np.testing.assert_array_equal(rows_NL[:, 0], row[::seq_len][: len(rows_NL)])


def test_plain_webdataset_yields_the_same_windows(tmp_path: Path) -> None:
    for name, tokens, options in (
        ("a", 3000, {}),
        ("b", 3000, {"vocab_size": 40_000}),
        ("c", 64 * 21 + 1, {}),
    ):
        write_corpus(tmp_path / name, tokens, **options)
        urls = [str(path) for path in sorted((tmp_path / name).glob("*.tar"))]
        assert len(urls) > 1
        plain: Counter[int] = Counter()
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            block = sample["tokens.npy"]
            plain.update(xxhash.xxh3_64_intdigest(block[k : k + 17].tobytes()) for k in range(0, 64, 16))
        reader = TokenReader(str(tmp_path / name), seq_len=16)
        whole = np.empty((reader.index.num_blocks * 4, 17), reader.index.dtype)
        reader.read(np.arange(len(whole)), whole)
        assert Counter(xxhash.xxh3_64_intdigest(row.tobytes()) for row in whole) == plain


def test_reading_into_a_wider_type_and_in_any_order(tmp_path: Path) -> None:
    write_corpus(tmp_path, 2000, document=10**6, vocab_size=5000)
    reader = TokenReader(str(tmp_path), seq_len=32)
    window_N = np.array([61, 0, 0, 30, 5])
    out_NL = np.empty((5, 33), np.int64)
    reader.read(window_N, out_NL)
    np.testing.assert_array_equal(out_NL, FIRST + window_N[:, None] * 32 + np.arange(33))


def test_more_shards_than_may_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN", 2)
    write_corpus(tmp_path, 64 * 30, document=10**6, blocks_per_shard=1)
    reader = TokenReader(str(tmp_path), seq_len=64)
    out_NL = np.empty((30, 65), np.uint32)
    for window_N in (np.arange(30), np.arange(30)[::-1]):
        reader.read(window_N, out_NL)
        np.testing.assert_array_equal(out_NL[:, 0], FIRST + 64 * window_N)
    assert list(reader._open) == [1, 0]  # the two that were used last


@pytest.mark.parametrize("verify", ["off", "size", "blocks"])
def test_a_shard_cut_anywhere_is_an_error(tmp_path: Path, verify: str) -> None:
    """At member boundaries, every 512 bytes, inside headers and payloads: never a silent short read."""
    index = write_corpus(tmp_path, 64 * 20)
    path = tmp_path / index.shards[1].file
    whole = path.read_bytes()
    cuts = [*range(0, len(whole), 512), 1, 511, 513, 700, 1000, len(whole) - 1]
    assert index.shards[1].stride in cuts
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(
            UserError, match=rf"web-000001\.tar: {cut} bytes where index\.json says {len(whole)}"
        ):
            read_all(tmp_path, 16, verify)
    path.write_bytes(whole)
    assert len(read_all(tmp_path, 16, verify)) == 80


def test_a_shard_cut_after_the_start_is_found_when_opened(tmp_path: Path) -> None:
    index = write_corpus(tmp_path, 64 * 20)
    reader = TokenReader(str(tmp_path), seq_len=16)
    reader.check_sizes()
    path = tmp_path / index.shards[2].file
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match="truncated"):
        reader.read(np.array([79]), np.empty((1, 17), np.uint32))


def test_a_grown_and_a_missing_shard_are_errors(tmp_path: Path) -> None:
    index = write_corpus(tmp_path, 64 * 20)
    path = tmp_path / index.shards[1].file
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(UserError, match="not the shard that was written"):
        read_all(tmp_path, 16)
    path.unlink()
    for verify in ("off", "size"):
        with pytest.raises(UserError, match=r"web-000001\.tar: missing shard, though index\.json lists it"):
            read_all(tmp_path, 16, verify)


def test_each_rank_checks_its_share_of_the_shards(tmp_path: Path) -> None:
    index = write_corpus(tmp_path, 64 * 20)
    (tmp_path / index.shards[1].file).unlink()
    reader = TokenReader(str(tmp_path), seq_len=16)
    reader.check_sizes(0, 2)
    with pytest.raises(UserError, match="missing shard"):
        reader.check_sizes(1, 2)


def test_one_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    index = write_corpus(tmp_path, 64 * 20)
    shard = index.shards[1]
    raw = bytearray((tmp_path / shard.file).read_bytes())
    offset = shard.base + 2 * shard.stride
    raw[offset + 100] ^= 4
    (tmp_path / shard.file).write_bytes(raw)
    with pytest.raises(
        UserError, match=rf"web-000001\.tar: block 2 at byte {offset} has hash [0-9a-f]+ where"
    ):
        read_all(tmp_path, 16)
    assert len(read_all(tmp_path, 16, "size")) == 80  # asked not to look


def test_damaged_cut_and_missing_block_hashes_are_errors(tmp_path: Path) -> None:
    index = write_corpus(tmp_path, 64 * 20)
    path = tmp_path / "blocks.xxh3"
    whole = path.read_bytes()
    assert len(whole) == 8 * 20
    path.write_bytes(whole[:80] + bytes([whole[80] ^ 1]) + whole[81:])
    with pytest.raises(UserError, match=rf"blocks\.xxh3: the hashes of {index.shards[1].file}, 56 bytes at"):
        read_all(tmp_path, 16)
    assert len(read_all(tmp_path, 16, "size")) == 80  # asked not to look
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"blocks\.xxh3: 159 bytes where index\.json says 160: .* truncated"):
        read_all(tmp_path, 16)
    path.unlink()
    with pytest.raises(UserError, match=r"blocks\.xxh3: missing file, though index\.json lists it"):
        read_all(tmp_path, 16)
    assert len(read_all(tmp_path, 16, "size")) == 80


def test_a_block_is_hashed_once_also_when_its_shard_was_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN", 1)
    hashed: list[int] = []
    original = reader_module.block_hash

    def block_hash(tokens: np.ndarray) -> int:
        hashed.append(int(tokens[1]))
        return original(tokens)

    monkeypatch.setattr(reader_module, "block_hash", block_hash)
    write_corpus(tmp_path, 64 * 20)
    reader = TokenReader(str(tmp_path), seq_len=16)
    for _ in range(3):
        reader.read(np.arange(80), np.empty((80, 17), np.uint32))
    assert len(hashed) == len(set(hashed)) == 20


def test_a_sequence_length_that_does_not_divide_names_ones_that_do(tmp_path: Path) -> None:
    write_corpus(tmp_path, 1000)
    for seq_len, fix in ((48, "32 or 64"), (100, "32 or 64"), (3, "2 or 4"), (0, "1 or 2")):
        with pytest.raises(
            UserError, match=rf"seq_len={seq_len}: does not divide the blocks of 64 .* seq_len={fix}"
        ):
            TokenReader(str(tmp_path), seq_len=seq_len)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_data_set_without_a_target_is_refused(tmp_path: Path, tokens: int) -> None:
    write_corpus(tmp_path, tokens)
    with pytest.raises(UserError, match=rf"data\.train=.*: holds {tokens} tokens"):
        TokenReader(str(tmp_path), seq_len=16)


def test_unfinished_and_foreign_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json: not found"):
        TokenReader(str(tmp_path / "nowhere"), seq_len=16)
    write_corpus(tmp_path, 1000)
    content = json.loads((tmp_path / "index.json").read_text())
    content["format"] = "trivium-tokens-9"
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="format 'trivium-tokens-9' is not the one this version reads"):
        TokenReader(str(tmp_path), seq_len=16)


def test_eos_ends_every_document_of_the_corpus(tmp_path: Path) -> None:
    index = write_corpus(tmp_path, 1000)
    assert index.documents == 1000 // 37
    assert np.count_nonzero(read_all(tmp_path, 64)[:, :-1] == EOS) >= index.documents
