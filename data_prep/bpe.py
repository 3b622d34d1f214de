"""Stage 3: train a byte-level BPE on the documents, and report how well it compresses, by language."""

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.config import TokenizerConfig
from data_prep.files import disk_errors, read_jsonl
from trainer.chat.save import ranks_from_spec, save_tokenizer
from trainer.chat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from trainer.errors import UserError

REPORT_BYTES = 200_000  # of text per language: enough for two digits


def in_split(sha256: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a function of its text alone, so copies never straddle the
    split.
    """
    return int(hashlib.blake2b(f"val:{sha256}".encode(), digest_size=8).hexdigest(), 16) < fraction * 2**64


def training_texts(
    files: list[Path], total_bytes: int, config: TokenizerConfig, val_fraction: float
) -> Iterator[str]:
    """Training documents, thinned to about `train_mb` by the hash of their text (never validation
    documents).
    """
    share = min(1.0, config.train_mb * 1e6 / max(1, total_bytes))
    for file in files:
        for row in read_jsonl(file):
            chosen = int(row["sha256"][-8:], 16) < share * 2**32
            if chosen and not in_split(row["sha256"], val_fraction):
                yield row["text"]


def train_ranks(texts: Iterator[str], num_ranks: int, trainer: str) -> dict[bytes, int]:
    """Merges learned from `texts`: bytes -> rank, at most `num_ranks` of them (256 bytes included)."""
    if trainer == "rustbpe":
        import rustbpe

        learner = rustbpe.Tokenizer()
        learner.train_from_iterator(texts, num_ranks, pattern=SPLIT_PATTERN)
        return {bytes(token): rank for token, rank in learner.get_mergeable_ranks()}
    import json

    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = trainers.BpeTrainer(vocab_size=num_ranks, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, options)
    return ranks_from_spec(json.loads(model.to_str()))


def make_tokenizer(
    files: list[Path], total_bytes: int, config: TokenizerConfig, val_fraction: float, directory: Path
) -> dict[str, Any]:
    """Train (or copy, with `config.path`) the tokenizer into `directory`; returns vocab_size and sha256."""
    if config.path is not None:
        source = Tokenizer.load(Path(config.path).expanduser())
        with disk_errors(directory):
            directory.mkdir(parents=True)
            for name in ("tokenizer.json", "tokenizer_config.json", "trivium.json"):
                if (source.directory / name).exists():
                    shutil.copyfile(source.directory / name, directory / name)
        tokenizer = Tokenizer.load(directory)
        return {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256, "from": config.path}
    wanted = config.vocab_size - len(SPECIAL_TOKENS)
    ranks = train_ranks(training_texts(files, total_bytes, config, val_fraction), wanted, config.trainer)
    if len(ranks) < wanted:
        raise UserError(
            f"tokenizer.vocab_size={config.vocab_size}: the documents have only {len(ranks) - 256} merges in "
            f"them: use tokenizer.vocab_size={len(ranks) + len(SPECIAL_TOKENS)} or less, or more text"
        )
    with disk_errors(directory):
        tokenizer = save_tokenizer(directory, ranks)
    return {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256, "from": config.trainer}


def compression(tokenizer: Tokenizer, samples: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Language -> {"bytes", "tokens", "bytes_per_token"} of sample texts."""
    report = {}
    for language, texts in sorted(samples.items()):
        num_bytes = sum(len(text.encode()) for text in texts)
        num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
        if num_tokens:
            ratio = round(num_bytes / num_tokens, 3)
            report[language] = {"bytes": num_bytes, "tokens": num_tokens, "bytes_per_token": ratio}
    return report


def sample_texts(files: list[Path], ledgers: list[Path]) -> dict[str, list[str]]:
    """Texts by language: documents first, and the beginnings of pages that the language filter dropped."""
    texts: dict[str, list[str]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    for file in [*files, *ledgers]:
        for row in read_jsonl(file):
            language, text = row.get("language"), row.get("text")
            if language and text and sizes[language] < REPORT_BYTES:
                texts[language].append(text)
                sizes[language] += len(text.encode())
    return texts
