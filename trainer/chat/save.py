"""Writes a trained byte-level BPE as a directory that Trivium, `tokenizers` and `transformers` read alike."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.chat import mirror
from trainer.chat.tokenizer import EOS, FORMAT, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

PAD = "<|pad|>"


def save_tokenizer(
    directory: str | Path,
    mergeable_ranks: Mapping[bytes, int] | Iterable[tuple[bytes, int]],
    pattern: str = SPLIT_PATTERN,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    eos: str = EOS,
) -> Tokenizer:
    """Writes `tokenizer.json`, `tokenizer_config.json` and, last, `trivium.json`; returns the loaded
    tokenizer.

    `mergeable_ranks`: bytes -> rank, all 256 single bytes among them, as `rustbpe`'s `get_mergeable_ranks()`
    gives them. Ids are the places in order of rank, the special tokens follow them: `vocab_size = len(ranks)
    + len(special_tokens)`. The same input gives the same files, byte for byte. ValueError when the ranks are
    no byte-level BPE.
    """
    ordered = [data for data, _ in sorted(dict(mergeable_ranks).items(), key=lambda item: item[1])]
    ranks = {data: index for index, data in enumerate(ordered)}
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"not byte-level: {len(missing)} single bytes have no rank, first {missing[0]}")
    if eos not in special_tokens or len(set(special_tokens)) != len(special_tokens):
        raise ValueError(f"special_tokens must be distinct and hold eos={eos!r}: {list(special_tokens)}")
    special = {name: len(ranks) + index for index, name in enumerate(special_tokens)}
    spell = mirror.bytes_to_token
    merges = [_last_pair(ranks, data) for data in ordered if len(data) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer_json = _dump(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": index,
                    "content": name,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for name, index in special.items()
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                    byte_level,
                ],
            },
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {spell(data): index for data, index in ranks.items()},
                "merges": [[spell(left), spell(right)] for left, right in merges],
            },
        }
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,  # True would eat the space before "." when decoding
        **({"pad_token": PAD} if PAD in special else {}),
    }
    ours = {
        "format": FORMAT,
        "eos": eos,
        "special": special,
        "vocab_size": len(ranks) + len(special),
        "sha256": hashlib.sha256(tokenizer_json).hexdigest(),
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.json", tokenizer_json)
    _write(folder / "tokenizer_config.json", _dump(config))
    _write(folder / "trivium.json", _dump(ours))
    return Tokenizer.load(folder)


def ranks_from_spec(spec: dict[str, Any]) -> dict[bytes, int]:
    """Ranks (bytes first, then merges) of a parsed byte-level `tokenizer.json` from `tokenizers`."""
    single = [bytes([byte]) for byte in range(256)]
    merged = [mirror.token_to_bytes(left + right, True) for left, right in mirror.pairs(spec["model"])]
    return {data: index for index, data in enumerate(dict.fromkeys(single + merged))}


def _last_pair(ranks: Mapping[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """The two parts that `token` is merged from: its own bytes, encoded with the ranks below its own."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], limit))
        if ranks.get(parts[best] + parts[best + 1], limit) >= limit:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    if len(parts) != 2:
        raise ValueError(f"token {token!r} (rank {limit}) cannot be merged from tokens of lower rank")
    return parts[0], parts[1]


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    """All of the file or none of it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
