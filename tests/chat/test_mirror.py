"""Tokenizers of others: mirrored in tiktoken only where the ids are the same, else left to `tokenizers`."""

import json
from pathlib import Path

import pytest
from chat_corpus import SCRIPTS, corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HF

from trainer.chat import mirror
from trainer.chat.tokenizer import SPLIT_PATTERN, Tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
POSSESSIVE = r"\p{N}{1,3}+|[^\p{N}]+"  # Ruby's meaning: any number of digits; Rust's: three, possessively


def byte_level(use_regex: bool = False, prefix: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level()])


def train(pre_tokenizer, normalizer=None, texts=None) -> HF:
    """Trained by `tokenizers`; its special tokens come first and its bytes in another order than ours."""
    hf = HF(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        hf.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator(texts or corpus(), trainer)
    return hf


def saved(hf: HF, directory: Path, **model) -> Tokenizer:
    spec = json.loads(hf.to_str())
    spec["model"].update(model)
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    return Tokenizer.load(directory)


def agree(tokenizer: Tokenizer, texts: list[str]) -> None:
    hf = HF.from_file(str(tokenizer.directory / "tokenizer.json"))
    for text in texts:
        assert tokenizer.encode(text) == hf.encode(text, add_special_tokens=False).ids, text[:80]


TEXTS = [*corpus(), mirror.SAMPLE.replace("<|endoftext|>", ""), "", " ", "\n", "a" * 3000, "cafe\u0301"]


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen", "no split"])
def test_known_families_run_on_tiktoken(kind, tmp_path):
    pre, normalizer = {
        "gpt2": (byte_level(use_regex=True), None),
        "llama3": (split(LLAMA3), None),
        "qwen": (split(LLAMA3.replace("{1,3}", "")), normalizers.NFC()),
        "no split": (byte_level(), None),
    }[kind]
    texts = (
        [SCRIPTS] if kind == "no split" else corpus()
    )  # without a split a text is one long word: slow to train
    tokenizer = saved(train(pre, normalizer, texts), tmp_path, ignore_merges=kind == "llama3")
    assert tokenizer.fallback is None
    agree(tokenizer, TEXTS)
    text = "na\u0069\u0308ve cafe\u0301"
    expected = "naïve café" if kind == "qwen" else text
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(expected.encode())


def test_merges_by_every_split_as_in_llama_3(tmp_path):
    """Llama 3's file was converted from tiktoken: each token comes with all of its splits as merges."""
    hf = train(split(LLAMA3))
    model = json.loads(hf.to_str())["model"]
    vocab = model["vocab"]
    merges = [
        [token[:i], token[i:]]
        for token, _ in sorted(vocab.items(), key=lambda item: item[1])
        if token != "<|endoftext|>"
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    assert len(merges) > len(model["merges"])
    tokenizer = saved(hf, tmp_path, merges=merges, ignore_merges=True)
    assert tokenizer.fallback is None
    agree(tokenizer, TEXTS)


@pytest.mark.parametrize(
    ("pre", "normalizer", "reason"),
    [
        (split(POSSESSIVE), None, "differently"),
        (byte_level(use_regex=True, prefix=True), None, "pre-tokenizer"),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(), byte_level(use_regex=True)]),
            None,
            "pre-tokenizer",
        ),
        (split(LLAMA3), normalizers.Lowercase(), "normalizer Lowercase"),
    ],
)
def test_what_tiktoken_cannot_mirror_is_left_to_tokenizers(pre, normalizer, reason, tmp_path):
    tokenizer = saved(train(pre, normalizer), tmp_path)
    assert reason in (tokenizer.fallback or "")
    agree(tokenizer, TEXTS)
    assert tokenizer.encode("<|endoftext|>")[0] != 0


def test_sentencepiece_bpe_like_llama_2(tmp_path):
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
        "▁ab",
    ]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    hf = HF(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = saved(hf, tmp_path)
    assert "normalizer" in (tokenizer.fallback or "")
    agree(tokenizer, ["ab a b", "aé\x00b", ""])
    for text in ("ab a b", "é中\nab", "a</s>b", "<unk>"):
        ids = tokenizer.encode(text)
        assert not set(ids) & {0, 1, 2}
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) + 1  # the space that is put in front
    assert tokenizer.decode([1, *tokenizer.encode("ab"), 2]) == "<s>ab</s>"


def test_added_tokens_that_are_not_special_are_not_recognised_either(tmp_path):
    """Qwen 3 marks <think> as `special: false`; `tokenizers` would still find it in any text."""
    hf = train(split(LLAMA3))
    hf.add_tokens([AddedToken("<think>", special=False)])
    for fallback, model in ((False, {}), (True, {"dropout": 0.0, "unk_token": "<|endoftext|>"})):
        tokenizer = saved(hf, tmp_path, **model)
        assert (tokenizer.fallback is not None) == fallback
        ids = tokenizer.encode("a<think>b")
        assert tokenizer.special["<think>"] not in ids
        assert tokenizer.decode(ids) == "a<think>b"
        assert tokenizer.decode([tokenizer.special["<think>"]]) == "<think>"


def test_added_runs_of_spaces_are_text(tmp_path):
    """GPT-NeoX adds them after training; without them its texts would get ids it never saw."""
    hf = train(split(LLAMA3))
    hf.add_tokens([AddedToken(" " * count, special=False, normalized=False) for count in (2, 3, 4)])
    hf.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer = saved(hf, tmp_path)
    text = "if x:\n    return  y   # <to"
    ids = tokenizer.encode(text)
    assert ids == hf.encode(text).ids
    assert {hf.token_to_id(" " * count) for count in (2, 3, 4)} <= set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text)
    assert set(tokenizer.special) == {"<|endoftext|>", "<tool>"}
    assert tokenizer.special["<tool>"] not in tokenizer.encode("  <tool>  ")


def abc_tokenizer(
    merges: list[tuple[str, str]], ignore_merges: bool, extra: list[str], directory: Path
) -> Tokenizer:
    """All single bytes, then the results of `merges`, then tokens that no merge makes."""
    alphabet = [mirror.BYTE_TO_CHAR[byte] for byte in range(256)]
    tokens = [*dict.fromkeys([*alphabet, *(left + right for left, right in merges), *extra])]
    hf = HF(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=ignore_merges))
    hf.pre_tokenizer, hf.decoder = split(SPLIT_PATTERN), decoders.ByteLevel()
    return saved(hf, directory)


def test_a_token_that_its_own_bytes_do_not_reach(tmp_path):
    """abc = ab + c, but bc is merged before ab. Ranks alone would join a + bc; the merges never do."""
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    tokenizer = abc_tokenizer(merges, False, [], tmp_path)
    assert tokenizer.fallback is None
    assert [tokenizer.token_text(index) for index in tokenizer.encode("abc")] == ["a", "bc"]
    whole = abc_tokenizer(merges, True, [], tmp_path)
    assert "no result of the merges" in (whole.fallback or "")
    assert [whole.token_text(index) for index in whole.encode("abc")] == ["abc"]


def test_ids_that_are_not_in_the_order_of_the_merges(tmp_path):
    """tiktoken merges by id: with these ids it would join b + c first."""
    tokens = [*(mirror.BYTE_TO_CHAR[byte] for byte in range(256)), "bc", "ab"]
    hf = HF(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b"), ("b", "c")]))
    hf.pre_tokenizer, hf.decoder = split(SPLIT_PATTERN), decoders.ByteLevel()
    tokenizer = saved(hf, tmp_path)
    assert tokenizer.fallback == "ids are not in the order of the merges"
    assert [tokenizer.token_text(index) for index in tokenizer.encode("abc")] == ["ab", "c"]


@st.composite
def merge_lists(draw) -> list[tuple[str, str]]:
    pool, merges = list("abc"), []
    for _ in range(draw(st.integers(1, 9))):
        pair = (draw(st.sampled_from(pool)), draw(st.sampled_from(pool)))
        if pair not in merges and len("".join(pair)) < 8:
            merges.append(pair)
            pool.append("".join(pair))
    return merges


MIRRORED = {True: 0, False: 0}


@settings(max_examples=250, deadline=None)
@given(
    merges=merge_lists(),
    ignore_merges=st.booleans(),
    extra=st.lists(st.text("abc", min_size=2, max_size=5), max_size=2),
    texts=st.lists(st.text("abc ", max_size=24), min_size=5, max_size=12),
)
def test_any_merges_give_the_ids_of_tokenizers(merges, ignore_merges, extra, texts, tmp_path_factory):
    tokenizer = abc_tokenizer(merges, ignore_merges, extra, tmp_path_factory.mktemp("abc", numbered=True))
    MIRRORED[tokenizer.fallback is None] += 1
    agree(tokenizer, texts)


def test_the_property_above_saw_both_kinds():
    assert min(MIRRORED.values()) > 20


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, LLAMA3])
def test_both_engines_cut_every_kind_of_character_alike(pattern):
    """Letters, digits and spaces at the edge of words, numbers and runs. (All of Unicode agreed, once.)"""
    hf = HF(models.BPE())
    hf.pre_tokenizer = split(pattern)
    rest = [*range(0x2100, 0xD800, 29), *range(0xE000, 0x34000, 29), *range(0xE0000, 0xE0200, 5)]
    for codes in (range(0x1000), range(0x1000, 0x2100), rest):
        text = "".join(f"a{char}b 1{char}2 {char}{char}x " for char in map(chr, codes))
        assert mirror._cut_alike(pattern, hf, text)
