"""The same byte-level BPE in tiktoken, or the reason why it cannot be.

Hugging Face merges by the rank of a *pair*, tiktoken by the rank (= id) of the *result*. The two agree on
every piece of text when (1) every token that is not a single byte is what its own bytes encode to, and (2)
along the list of merges the ids of the results never fall. Why: two neighbours x, y in a run of the Hugging
Face encoder, whose join t is a token, were made by merges inside the bytes of t alone, so they also stand
side by side when t itself is encoded; there they must be merged into t, by (1). So (x, y) is a merge, and the
only one that ever makes t. Hence both encoders see the same candidates, by (2) in the same order, in every
step. Tokens that break (1) can never come out of the merges and are left out of tiktoken's table.

The split pattern runs on two engines (Oniguruma there, Rust's fancy-regex here). They are compared on a small
adversarial sample; patterns that they read differently (possessive quantifiers) fail there or are refused.
"""

import itertools
import re
from typing import Any

import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers
from tokenizers.normalizers import NFC

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A run of about 300,000 spaces exhausts the backtracking stack of fancy-regex, and tiktoken panics.
LONG_RUN = 1 << 16
_SPACES = re.compile(r"\s*")
SAMPLE = (
    "Hello, WORLD's 12345 we'LL  don't 'tis\n\n  x = y[0]\t\t# done\r\n \u00a0\u3000 \u2028\u200b"
    " end \x00\x7f"
    " naïve cafe\u0301 \u017f's ǅ 中文字符。日本語 مرحبا हिन्दी สวัสดี 한국어 ١٢٣½Ⅻ²"
    " \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \ufffd\U0010ffff"
    "   \n   \n\n a1b2_c3--==>>...!!!???   <|endoftext|> \\frac{1}{2} http://a.b/c?d=e&f"
    " 1234567 \u0661\u0662\u0663\u0664  "
)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte (OpenAI gpt-2 `encoder.py`, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def bytes_to_token(data: bytes) -> str:
    """How `tokenizer.json` spells a byte-level token."""
    return "".join(BYTE_TO_CHAR[byte] for byte in data)


def token_to_bytes(text: str, byte_level: bool) -> bytes:
    """The bytes of text behind a vocabulary entry; a name outside the byte alphabet stands for itself."""
    if byte_level:
        try:
            return bytes(CHAR_TO_BYTE[char] for char in text)
        except KeyError:
            return text.encode()
    match = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else text.replace("\u2581", " ").encode()


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[key] if part.get("type") == "Sequence" else [part]


def is_byte_level(spec: dict[str, Any]) -> bool:
    """Whether tokens are spelt in the byte alphabet."""
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers") + _steps(spec.get("decoder"), "decoders")
    return any(step.get("type") == "ByteLevel" for step in steps)


def is_text(added: dict[str, Any]) -> bool:
    """Whether an added token is ordinary text: GPT-NeoX adds runs of spaces, which nobody could forge."""
    return not added.get("special") and added["content"].isspace()


def without_specials(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, which does not know its special tokens: no text can be read as one of them."""
    model = dict(spec["model"])
    kept = [token for token in spec.get("added_tokens", []) if is_text(token)]
    special = [token for token in spec.get("added_tokens", []) if not is_text(token)]
    added = {token["content"] for token in special} - {model.get("unk_token")}
    in_merges = {part for pair in pairs(model) for part in (*pair, "".join(pair))} & added
    vocab = {text: i for text, i in model["vocab"].items() if text not in added or text in in_merges}
    # `tokenizers` gives an added token a new id, whatever the file says, unless the vocabulary has it.
    model["vocab"] = vocab | {token["content"]: token["id"] for token in kept}
    cleared = dict.fromkeys(("post_processor", "truncation", "padding"))
    return {**spec, **cleared, "model": model, "added_tokens": kept}


def pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files spell each as `"left right"`."""
    split = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", []))
    return [(left, right) for left, right in split]


def _pattern(spec: dict[str, Any]) -> str | None:
    """The one regex that cuts text into pieces, or None when the pre-tokenizer is of another kind."""
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if steps[0].get("use_regex", True) else r"(?s:.+)"
    split = steps[0]
    if len(steps) > 2 or split.get("type") != "Split" or steps[1].get("use_regex", True):
        return None
    if split.get("behavior") != "Isolated" or split.get("invert") or "Regex" not in split["pattern"]:
        return None
    return split["pattern"]["Regex"]


def _unreachable(model: dict[str, Any], multi: list[str]) -> set[str]:
    """The tokens of `multi` (spelt in the byte alphabet) that their own bytes do not encode to."""
    bare = tokenizers.Tokenizer(models.BPE(model["vocab"], pairs(model)))
    # One call on one text: encode_batch starts threads, which a later fork (data workers) complains about.
    bare.pre_tokenizer = pre_tokenizers.Split("\n", "removed")  # no letter of the byte alphabet
    encoding = bare.encode("\n".join(multi), add_special_tokens=False)
    produced: list[list[int]] = [[] for _ in multi]
    for word, index in zip(encoding.word_ids, encoding.ids):
        if word is not None:
            produced[word].append(index)
    return {text for text, ids in zip(multi, produced) if ids != [model["vocab"][text]]}


def build(spec: dict[str, Any], hf: tokenizers.Tokenizer) -> tuple[tiktoken.Encoding | None, str | None]:
    """`(encoding, None)` when tiktoken gives the ids of `hf`, else `(None, reason)`.

    `spec` is what `hf` was built from, without its special tokens.
    """
    model = spec["model"]
    normalizer = spec.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        return None, f"normalizer {normalizer.get('type')}"
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            return None, f"model.{name}={model[name]}"
    if spec["added_tokens"]:
        return None, "added tokens that are ordinary text"
    pattern = _pattern(spec)
    if pattern is None:
        return None, "the pre-tokenizer is not one regular expression and ByteLevel"
    vocab: dict[str, int] = model["vocab"]
    if any(char not in vocab for char in CHAR_TO_BYTE):
        return None, "not every single byte is a token"
    spelt = [text for text in vocab if text and all(char in CHAR_TO_BYTE for char in text)]
    lost = _unreachable(model, [text for text in spelt if len(text) > 1])
    if lost and model.get("ignore_merges"):
        return None, f"{len(lost)} tokens are no result of the merges"
    results = [vocab[left + right] for left, right in pairs(model) if left + right not in lost]
    if any(later < earlier for earlier, later in itertools.pairwise(results)):
        return None, "ids are not in the order of the merges"
    ranks = {token_to_bytes(text, True): vocab[text] for text in spelt if text not in lost}
    try:
        encoding = tiktoken.Encoding("trivium", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        return None, f"tiktoken cannot read the pattern: {error}"
    sample = SAMPLE if normalizer is None else NFC().normalize_str(SAMPLE)
    if not _cut_alike(pattern, hf, sample):
        return None, "the two pattern engines cut the same text differently"
    if encoding.encode_ordinary(sample) != hf.encode(sample, add_special_tokens=False).ids:
        return None, "the two encoders give other ids for the same text"
    return encoding, None


def _cut_alike(pattern: str, hf: tokenizers.Tokenizer, text: str) -> bool:
    """Whether both engines cut `text` into the same pieces.

    tiktoken shows no pieces, so it gets a vocabulary of just those that `hf` cuts: a piece of its own that is
    not among them falls to bytes.
    """
    cut = hf.pre_tokenizer.pre_tokenize_str(text)
    pieces = [token_to_bytes(piece, True) for piece, _ in cut]
    single = [bytes([byte]) for byte in range(256)]
    ranks = {data: index for index, data in enumerate(dict.fromkeys(single + pieces))}
    whole = tiktoken.Encoding("pieces", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return whole.encode_ordinary(text) == [ranks[piece] for piece in pieces]


def _has_long_run(text: str) -> bool:
    """Whether there may be `LONG_RUN` spaces in a row. Looks at one character in every half run: free."""
    half = LONG_RUN // 2
    for start in range(0, len(text) - half, half):
        match = _SPACES.match(text, start)
        if match is not None and match.end() - start >= half:
            return True
    return False


def encode(encoding: tiktoken.Encoding, hf: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of `text` by tiktoken; by `tokenizers` where spaces run so long that tiktoken would panic."""
    if _has_long_run(text):
        return hf.encode(text, add_special_tokens=False).ids
    return encoding.encode_ordinary(text)
