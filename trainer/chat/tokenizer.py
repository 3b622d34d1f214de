"""The only place where text becomes ids.

A tokenizer is a directory with a Hugging Face `tokenizer.json` (so that every other tool reads it too) and,
when we wrote it, a `trivium.json` that pins its sha256, vocabulary and special tokens. tiktoken encodes,
built from the same merges and the same split pattern: at least five times as fast as `tokenizers` on one
core. `mirror.py` proves that the two give the same ids; where it cannot, `tokenizers` itself encodes.

Text never forges a special token: `encode("<|endoftext|>")` is ordinary text in ordinary ids. Special ids are
put into a sequence by number only, by the code that builds conversations and documents.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.normalizers import NFC

from trainer.chat import mirror
from trainer.errors import UserError

EOS = "<|endoftext|>"
SPECIAL_TOKENS = (
    EOS,
    "<|pad|>",
    "<|im_start|>",
    "<|im_sep|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<|tool_call|>",
    "<|tool_end|>",
    "<|tool_result|>",
)
# Words with the mark before them, digits in pairs, runs of other marks, line ends, spaces. The family of
# Llama 3 and Qwen, without possessive quantifiers: `{1,2}+` means one thing to Oniguruma and another to
# Rust's fancy-regex.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FORMAT = "trivium-tokenizer-1"
EOS_GUESSES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer:
    """Byte-level BPE. Build one with `Tokenizer.load(directory)`; it can be pickled (and is loaded again
    there).

    Attributes: `vocab_size` (highest id + 1), `eos_id` (ends a document), `eos_ids` (every id that ends a
    text, `eos_id` first), `special` (name -> id), `sha256` (of `tokenizer.json`), `directory`, `fallback`
    (None when tiktoken encodes, else the reason why `tokenizers` has to).
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        raw = _read(self.directory)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        spec = _parse(self.directory / "tokenizer.json", raw)
        vocab: dict[str, int] = spec["model"]["vocab"]
        added = spec.get("added_tokens", [])
        spaces = {token["content"]: token["id"] for token in added if mirror.is_text(token)}
        self.special: dict[str, int] = {
            token["content"]: token["id"] for token in added if not mirror.is_text(token)
        }
        self.vocab_size = max([*vocab.values(), *(token["id"] for token in added)], default=-1) + 1

        self._byte_level = mirror.is_byte_level(spec)
        special_ids = set(self.special.values())
        self._bytes: list[bytes | None] = [None] * self.vocab_size  # None: no such id
        for text, index in vocab.items():
            self._bytes[index] = mirror.token_to_bytes(text, self._byte_level)
        for text, index in (self.special | spaces).items():
            self._bytes[index] = text.encode()
        ordinary = {*vocab.values(), *spaces.values()} - special_ids
        self._sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for index in ordinary:
            self._sizes[index] = len(self._bytes[index] or b"")

        plain = mirror.without_specials(spec)
        self._nfc = NFC() if (spec.get("normalizer") or {}).get("type") == "NFC" else None
        self._hf = _build_hf(self.directory, plain)
        self._tiktoken, self.fallback = mirror.build(plain, self._hf)
        self.eos_ids = self._check_and_find_eos()
        self.eos_id = self.eos_ids[0]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a directory with `tokenizer.json`, ours or a Hugging Face checkpoint's. Raises UserError."""
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (str(self.directory),)

    def encode(self, text: str) -> list[int]:
        """Ordinary ids of `text`; names of special tokens are spelt out. Lone surrogates become U+FFFD."""
        text = _clean(text)
        if self._tiktoken is None:
            return self._hf.encode(text, add_special_tokens=False).ids
        return mirror.encode(self._tiktoken, self._hf, self._normalize(text))

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """`[encode(text) for text in texts]` on `threads` threads."""
        if threads <= 1 or len(texts) < 2:
            return [self.encode(text) for text in texts]
        from concurrent.futures import ThreadPoolExecutor  # both encoders release the GIL

        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts, chunksize=max(1, len(texts) // (threads * 8))))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: special ids by name; invalid UTF-8 and ids past the vocabulary as U+FFFD."""
        indices = [int(index) for index in ids]
        if any(index < 0 for index in indices):
            raise ValueError(f"negative token id {min(indices)}: a padding or ignore mark, not a token")
        if not self._byte_level:
            return self._hf_decode(indices)
        return b"".join(self.id_to_bytes(index) for index in indices).decode("utf-8", errors="replace")

    def id_to_bytes(self, index: int) -> bytes:
        """UTF-8 bytes of one id, possibly a part of a character."""
        known = self._bytes[index] if 0 <= index < self.vocab_size else None
        return "\ufffd".encode() if known is None else known

    def token_text(self, index: int) -> str:
        """One token for a human to look at: parts of characters as `\\xe4`."""
        return self.id_to_bytes(index).decode("utf-8", errors="backslashreplace")

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether every id stands for the same bytes in both; the files may differ in form."""
        return self.sha256 == other.sha256 or self._bytes == other._bytes

    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: bytes of text that each id stands for, 0 for special tokens.

        For every text, the sum over `encode(text)` is `len(text.encode())` (after NFC, where the tokenizer
        normalises). A tokenizer that is not byte-level (Llama 2) also counts the space that it puts in front.
        """
        return self._sizes.copy()

    def check_vocab(self, vocab_size: int, what: str = "model") -> None:
        """UserError when a model of `vocab_size` rows cannot hold every id; more rows (padding) are fine."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"{self.directory}: the tokenizer has {self.vocab_size} ids but the {what} has "
                f"{vocab_size}; use the tokenizer that it was trained with, or set "
                f"model.vocab_size={self.vocab_size}"
            )

    def _normalize(self, text: str) -> str:
        """Qwen's NFC. By `tokenizers`, since Python's `unicodedata` may know another version of Unicode."""
        if self._nfc is None or text.isascii():
            return text
        return self._nfc.normalize_str(text)

    def _hf_decode(self, indices: list[int]) -> str:
        """Runs between special ids through the Hugging Face decoder, special ids by name."""
        names = {index: name for name, index in self.special.items()}
        parts: list[str] = []
        run: list[int] = []
        for index in [*indices, -1]:
            if 0 <= index < self.vocab_size and index not in names:
                run.append(index)
                continue
            if run:
                parts.append(self._hf.decode(run, skip_special_tokens=False))
                run = []
            if index >= 0:
                parts.append(names.get(index, "\ufffd"))
        return "".join(parts)

    def _check_and_find_eos(self) -> tuple[int, ...]:
        """Checks `trivium.json` where there is one; finds the ids that end a text. Raises UserError."""
        ours = _json(self.directory / "trivium.json")
        if ours is not None:
            for name, found in (("sha256", self.sha256), ("vocab_size", self.vocab_size)):
                if ours.get(name) != found:
                    raise UserError(
                        f"{self.directory}/trivium.json: {name} is {ours.get(name)} but tokenizer.json "
                        f"has {found}; the two files are not of one tokenizer: copy both from the same place"
                    )
        config = _json(self.directory / "tokenizer_config.json") or {}
        generation = _json(self.directory / "generation_config.json") or {}
        model = _json(self.directory / "config.json") or {}
        eos_token = config.get("eos_token")
        if isinstance(eos_token, dict):
            eos_token = eos_token.get("content")
        names = [(ours or {}).get("eos"), eos_token]
        eos = [self.special[name] for name in names if name in self.special]
        for ids in (generation.get("eos_token_id"), model.get("eos_token_id")):
            eos += ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []
        if not eos:
            eos = [self.special[name] for name in EOS_GUESSES if name in self.special][:1]
        if not eos:
            raise UserError(
                f"{self.directory}: no end-of-text token; name one of its added_tokens as eos_token in "
                f"tokenizer_config.json"
            )
        return tuple(dict.fromkeys(eos))


def _read(directory: Path) -> bytes:
    path = directory / "tokenizer.json"
    if not directory.is_dir():
        raise UserError(f"tokenizer {directory}: no such directory; give one that holds tokenizer.json")
    if not path.is_file():
        raise UserError(f"tokenizer {directory}: no tokenizer.json in it; give a directory that has one")
    return path.read_bytes()


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        spec = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); the file is cut off or no tokenizer") from None
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise UserError(f"{path}: no tokenizer (no model.vocab); expected Hugging Face's tokenizer.json form")
    # Unigram and WordPiece may build the name of a special token out of ordinary text: it could be forged.
    if model.get("type", "BPE") != "BPE" or not isinstance(model["vocab"], dict):
        raise UserError(f"{path}: model.type={model.get('type')}: only BPE tokenizers are supported")
    return spec


def _build_hf(directory: Path, spec: dict[str, Any]) -> tokenizers.Tokenizer:
    # `tokenizers` raises exactly `Exception` for a bad file: nothing narrower can be caught. Its text names
    # the fault.
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise UserError(f"{directory}/tokenizer.json: {error}; the file is damaged or too new") from None


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}; restore the file")
    return value


def _clean(text: str) -> str:
    """Text that UTF-8 can hold: paired surrogates are joined, lone ones become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
