"""Tokenizer and shards: tiktoken and tokenizers agree on hostile text; shards say where documents lie."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_prep.bpe import compression, in_split, make_tokenizer, train_ranks
from data_prep.config import ShardsConfig, TokenizerConfig
from data_prep.dedup import document_files
from data_prep.files import jsonl_writer, read_jsonl
from data_prep.tokens import SPLITS, write_shards
from trainer.chat.tokenizer import SPECIAL_TOKENS, Tokenizer
from trainer.errors import UserError
from trainer.stream.index import Index

HOSTILE = [
    "a" * 20_000,
    " " * 5_000 + "x" + "\n" * 5_000 + "\t \r\n" * 900,
    "0123456789" * 900,
    "=-" * 4_000 + "!" * 4_000,
    "中文字符测试，" * 900 + "日本語のテスト。" + "한국어" * 99,
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽" * 200,
    "\x00\x01\x7f\u200b\ufeff\u2028\u00a0" * 99,
    "<|endoftext|><|im_start|>user<|im_end|>",
    "é" * 300 + "é" * 300,
    "Don't WE'LL i'Ve 'tis O'Clock ' s",
    "".join(map(chr, range(0x20, 0x2FF))),
    "\U0010ffff\ud7ff\ue000" * 99,
    "line " * 40_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_tiktoken_and_tokenizers_give_the_same_ids(prepared: Path, text: str) -> None:
    ours = Tokenizer.load(prepared / "tokenizer")
    assert ours.fallback is None
    theirs = tokenizers.Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json"))
    theirs.encode_special_tokens = True  # ordinary text cannot forge a special token
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == text
    assert not set(ids) & set(ours.special.values())


@pytest.mark.parametrize("trainer", ["rustbpe", "tokenizers"])
def test_both_trainers_learn_the_frequent_words(trainer: str) -> None:
    texts = ["the river and the bridge and the river again"] * 50
    ranks = train_ranks(iter(texts), 270, trainer)
    assert len(ranks) == 270
    assert b" the" in ranks
    assert sorted(ranks.values()) == list(range(270))


def test_a_vocabulary_larger_than_the_text_can_fill_is_refused(tmp_path: Path) -> None:
    write_documents(tmp_path, ["just a few words"])
    config = TokenizerConfig(vocab_size=1000)
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=1000.*or less"):
        make_tokenizer(document_files(tmp_path), 16, config, 0.0, tmp_path / "tokenizer")


def write_documents(directory: Path, texts: list[str]) -> None:
    rows = [
        {"id": f"id-{i}", "url": f"https://a.org/{i}", "source": {"file": "x", "offset": i}}
        for i in range(len(texts))
    ]
    for row, text in zip(rows, texts):
        row |= {"text": text, "language": "en", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    with jsonl_writer(directory / "documents-0000.jsonl.zst") as out:
        for row in sorted(rows, key=lambda row: row["sha256"]):
            out.write(row)


def shards(
    documents: Path, tokenizer: Tokenizer, out: Path, cell_bytes: int = 1 << 30, **options: object
) -> dict:
    config = ShardsConfig(block_tokens=256, blocks_per_shard=3, val_fraction=0.2)
    out.mkdir()
    settings = {"name": "t", "seed": 1, "threads": 1} | options
    return write_shards(
        document_files(documents), 20_000, tokenizer, config, cell_bytes=cell_bytes, directory=out, **settings
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


def read_tokens(directory: Path) -> np.ndarray:
    """The row of tokens of a data set, from the tars themselves."""
    index = Index.load(directory)
    row = [np.zeros(0, np.int64)]
    for shard in index.shards:
        data = (directory / shard.file).read_bytes()
        for block in range(shard.blocks):
            start = shard.base + block * shard.stride
            row.append(np.frombuffer(data, index.dtype, index.block_tokens, start).astype(np.int64))
    return np.concatenate(row)


@pytest.fixture(scope="module")
def documents(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("documents")
    words = ["the", "river", "bridge", "plan", "committee", "water", "stone", "letter", "town", "people"]
    texts = [" ".join(words[(i * j) % 10] for j in range(1 + i * 7 % 90)) + f" {i}" for i in range(60)]
    write_documents(directory, texts)
    return directory


def test_every_document_lies_where_its_row_says(prepared: Path, documents: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    result = shards(documents, tokenizer, tmp_path / "out")
    texts = {row["id"]: row["text"] for row in read_jsonl(document_files(documents)[0])}
    seen = []
    for split in SPLITS:
        row = read_tokens(tmp_path / "out" / split)
        index = Index.load(tmp_path / "out" / split)
        assert index.tokens == result[split]["tokens"]
        places = list(read_jsonl(tmp_path / "out" / split / "documents.jsonl.zst"))
        assert index.documents == len(places)
        assert sum(place["num_tokens"] for place in places) == index.tokens
        for place in places:
            start = place["block"] * 256 + place["offset"]
            ids = row[start : start + place["num_tokens"]]
            assert ids[-1] == tokenizer.eos_id
            if start + place["num_tokens"] <= len(row):
                assert tokenizer.decode(ids[:-1]) == texts[place["id"]]
            assert place["shard"] == index.shards[place["block"] // 3].file
            assert in_split(place["sha256"], 0.2) == (split == "val")
            seen.append(place["id"])
        assert index.bytes_of_text == sum(len(texts[place["id"]].encode()) for place in places)
    assert sorted(seen) == sorted(texts)


def test_shards_are_the_same_bytes_whatever_cells_and_threads(
    prepared: Path, documents: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    shards(documents, tokenizer, tmp_path / "one")
    shards(documents, tokenizer, tmp_path / "many", cell_bytes=1000, threads=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    shards(documents, tokenizer, tmp_path / "seed", seed=2)
    order = [
        [row["id"] for row in read_jsonl(tmp_path / d / "train" / "documents.jsonl.zst")]
        for d in ("one", "seed")
    ]
    assert order[0] != order[1]
    assert sorted(order[0]) == sorted(order[1])
    assert order[0] != sorted(order[0])


def test_validation_is_never_empty_and_never_everything(prepared: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    write_documents(tmp_path, ["first text", "second text"])
    files, config = document_files(tmp_path), ShardsConfig(block_tokens=256, val_fraction=1e-9)
    options = {"name": "t", "seed": 0, "cell_bytes": 1 << 20, "threads": 1}
    result = write_shards(files, 20, tokenizer, config, directory=tmp_path / "a", **options)
    assert result["val"]["documents"] == result["train"]["documents"] == 1
    config.val_fraction = 0.0
    assert set(write_shards(files, 20, tokenizer, config, directory=tmp_path / "b", **options)) == {"train"}
    config.val_fraction = 0.999999
    with pytest.raises(UserError, match="val_fraction"):
        write_shards(files, 20, tokenizer, config, directory=tmp_path / "c", **options)


def test_compression_counts_bytes_per_token(prepared: Path) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    report = compression(tokenizer, {"en": ["the database of the server"] * 3, "zh": ["数据库"], "none": []})
    assert set(report) == {"en", "zh"}
    assert report["en"]["bytes_per_token"] > report["zh"]["bytes_per_token"] >= 1.0
    assert tokenizer.vocab_size == 600
    assert len(SPECIAL_TOKENS) == len(tokenizer.special)
