"""Text to ids and back: exact, unforgeable, and the same as `tokenizers` and `transformers` say."""

import json
import pickle
import shutil

import numpy as np
import pytest
from chat_corpus import corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HF
from transformers import AutoTokenizer

from trainer.chat.mirror import LONG_RUN, SAMPLE
from trainer.chat.save import ranks_from_spec, save_tokenizer
from trainer.chat.tokenizer import SPECIAL_TOKENS, Tokenizer
from trainer.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
WORDS = st.lists(
    st.sampled_from([" ", "  ", "\n", "a", "The", "'s", "'LL", "12", "中", "é", "\r\n", "!?", "\u3000"])
)
ANY = st.one_of(TEXT, WORDS.map("".join))


def plain_hf(directory) -> HF:
    """`tokenizers` on the same file, told to read the names of special tokens as text."""
    hf = HF.from_file(str(directory / "tokenizer.json"))
    hf.encode_special_tokens = True
    return hf


def test_layout_is_bytes_then_merges_then_specials(tokenizer, ranks):
    assert tokenizer.fallback is None
    assert tokenizer.vocab_size == len(ranks) + len(SPECIAL_TOKENS)
    assert [tokenizer.special[name] for name in SPECIAL_TOKENS] == list(
        range(len(ranks), tokenizer.vocab_size)
    )
    assert tokenizer.eos_id == tokenizer.special["<|endoftext|>"]
    assert tokenizer.eos_ids == (tokenizer.eos_id,)
    assert tokenizer.encode("\x00A") == [0, 65]


@settings(max_examples=300, deadline=None)
@given(ANY)
def test_round_trip_and_byte_counts_are_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(ANY)
def test_ids_equal_those_of_tokenizers(tokenizer, text):
    assert tokenizer.encode(text) == plain_hf(tokenizer.directory).encode(text, add_special_tokens=False).ids


def test_transformers_loads_it_with_the_same_ids(tokenizer):
    auto = AutoTokenizer.from_pretrained(tokenizer.directory)
    assert len(auto) == tokenizer.vocab_size
    assert (auto.eos_token_id, auto.pad_token_id) == (tokenizer.eos_id, tokenizer.special["<|pad|>"])
    for text in [*corpus(), SAMPLE.replace("<|endoftext|>", "")]:
        ids = tokenizer.encode(text)
        assert auto.encode(text, add_special_tokens=False) == ids
        assert auto.decode(ids) == text
    assert auto.encode("a<|im_end|>b") == [97, tokenizer.special["<|im_end|>"], 98]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), st.text("<|>/imendoftxhk_ ", max_size=6))))
def test_text_cannot_forge_a_special_token(tokenizer, parts):
    ids = tokenizer.encode("".join(parts))
    assert all(index < min(tokenizer.special.values()) for index in ids)
    assert tokenizer.decode(ids) == "".join(parts)


def test_hard_texts(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("a\x00b")) == "a\x00b"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # a lone surrogate is no character
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"  # a pair is one
    assert tokenizer.decode([0xE4]) == "\ufffd"  # a third of a character
    assert tokenizer.token_text(0xE4) == "\\xe4"
    assert tokenizer.decode([tokenizer.eos_id, 65, tokenizer.vocab_size + 5]) == "<|endoftext|>A\ufffd"
    with pytest.raises(ValueError, match="-100"):
        tokenizer.decode([65, -100])


@pytest.mark.parametrize("count", [LONG_RUN // 2, LONG_RUN, 400_000])
def test_a_long_run_of_spaces_does_not_panic(tokenizer, count):
    for text in (" " * count, "word" * 5000 + " " * count + "x", " \t" * (count // 2) + "x"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == plain_hf(tokenizer.directory).encode(text, add_special_tokens=False).ids


def test_token_bytes_is_zero_for_specials_and_not_shared(tokenizer):
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == np.int64
    assert sizes.shape == (tokenizer.vocab_size,)
    assert (sizes == 0).sum() == len(SPECIAL_TOKENS)
    sizes[:] = 7
    assert tokenizer.token_bytes()[65] == 1


def test_batches_and_pickles_give_the_same_ids(tokenizer):
    texts = [text[i : i + 50] for text in corpus() for i in range(0, 1000, 50)]
    alone = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == alone
    assert tokenizer.encode_batch(texts, threads=3) == alone
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.sha256 == tokenizer.sha256
    assert again.encode_batch(texts) == alone


def test_saving_twice_gives_the_same_bytes(tokenizer, ranks, tmp_path):
    save_tokenizer(tmp_path, reversed(ranks))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json", "trivium.json"]
    assert all((tmp_path / name).read_bytes() == (tokenizer.directory / name).read_bytes() for name in names)


def test_saved_again_from_its_own_json_it_is_the_same(tokenizer, tmp_path):
    spec = json.loads((tokenizer.directory / "tokenizer.json").read_text())
    assert save_tokenizer(tmp_path, ranks_from_spec(spec)).sha256 == tokenizer.sha256


def test_save_refuses_what_is_no_byte_level_bpe(ranks, tmp_path):
    with pytest.raises(ValueError, match="single bytes"):
        save_tokenizer(tmp_path, [(data, rank) for data, rank in ranks if data != b"a"])
    with pytest.raises(ValueError, match="cannot be merged"):
        save_tokenizer(tmp_path, [*ranks, (b"qzjxkv", len(ranks))])
    with pytest.raises(ValueError, match="eos"):
        save_tokenizer(tmp_path, ranks, special_tokens=["<|pad|>"])
    assert not list(tmp_path.iterdir())


def test_end_of_text_of_a_hugging_face_checkpoint(tokenizer, tmp_path):
    """Several ids may end a text: Llama 3 Instruct names three (TRL PR #7039 shows what it costs to honour
    one).
    """
    shutil.copy(tokenizer.directory / "tokenizer.json", tmp_path)
    im_end, pad = tokenizer.special["<|im_end|>"], tokenizer.special["<|pad|>"]
    assert Tokenizer.load(tmp_path).eos_ids == (tokenizer.eos_id,)  # by its name
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": im_end}))
    assert Tokenizer.load(tmp_path).eos_ids == (im_end,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [pad, im_end]}))
    assert Tokenizer.load(tmp_path).eos_ids == (pad, im_end)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    assert Tokenizer.load(tmp_path).eos_ids == (tokenizer.eos_id, pad, im_end)


def spoil(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda d: (d / "tokenizer.json").write_text('{"model": {'), "not JSON"),
        (lambda d: (d / "tokenizer.json").write_text("[1, 2]"), "no model.vocab"),
        (lambda d: spoil(d / "tokenizer.json", model={"type": "Unigram", "vocab": []}), "model.type=Unigram"),
        (lambda d: spoil(d / "tokenizer.json", pre_tokenizer={"type": "New"}), "too new"),
        (lambda d: spoil(d / "tokenizer.json", added_tokens=[]), "trivium.json: sha256"),
        (lambda d: spoil(d / "trivium.json", vocab_size=17), "vocab_size is 17"),
        (lambda d: (d / "trivium.json").write_text("{"), "trivium.json: not JSON"),
        (lambda d: (d / "trivium.json").write_text("[]"), "expected a JSON object"),
        (shutil.rmtree, "no such directory"),
    ],
)
def test_user_mistakes_are_named_in_one_line(tokenizer, tmp_path, damage, message):
    directory = shutil.copytree(tokenizer.directory, tmp_path / "copy")
    damage(directory)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(directory)
    assert str(directory) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_end_of_text_token_is_a_user_error(tokenizer, tmp_path):
    shutil.copy(tokenizer.directory / "tokenizer.json", tmp_path)
    spoil(tmp_path / "tokenizer.json", added_tokens=[])
    with pytest.raises(UserError, match="no end-of-text token"):
        Tokenizer.load(tmp_path)


def test_vocabulary_must_fit_the_model(tokenizer):
    tokenizer.check_vocab(tokenizer.vocab_size + 100)  # padded to a round number: fine
    with pytest.raises(UserError, match=f"model.vocab_size={tokenizer.vocab_size}"):
        tokenizer.check_vocab(tokenizer.vocab_size - 1)
