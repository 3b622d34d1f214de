"""Keys of `trivium data`: typed dataclasses, composed by Hydra from `configs/data.yaml` and the command
line.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.quality_names import QUALITY
from trainer.errors import UserError

SAMPLE = Path(__file__).parent / "sample" / "sample.warc.gz"
MIN_VOCAB = 256
UINT16_VOCAB = 1 << 16
MAX_VOCAB = 1 << 20
TRAINERS = ("rustbpe", "tokenizers")


@dataclass
class UrlConfig:
    """Block lists on the address alone. `allowed_domains` are never blocked, `extra_domains` always."""

    enabled: bool = True
    extra_domains: list[str] = field(default_factory=list)
    allowed_domains: list[str] = field(default_factory=list)
    soft_threshold: int = 2


@dataclass
class LanguageConfig:
    """Languages to keep (ISO 639; empty keeps all) and the least probability of the detection."""

    keep: list[str] = field(default_factory=lambda: ["en"])
    threshold: float = 0.65


@dataclass
class TokenizerConfig:
    """`path`: use this tokenizer; null: train one of `vocab_size` (special tokens included) on the
    documents.
    """

    path: str | None = None
    vocab_size: int = 4096
    trainer: str = "rustbpe"
    train_mb: int = 2000  # of text at most: a keyed choice of documents, the same whatever their order


@dataclass
class ShardsConfig:
    """Token shards. dtype "auto": uint16 up to 65,536 ids, else uint32."""

    dtype: str = "auto"
    block_tokens: int = 1 << 18
    blocks_per_shard: int = 2000
    val_fraction: float = 0.05  # of documents, chosen by the hash of their text


@dataclass
class DataPrepConfig:
    """The whole job. input: "sample", a .warc or .warc.gz file, a directory of them, or a glob pattern."""

    input: str = "sample"
    output: str = "data/sample"
    name: str = "sample"
    seed: int = 0
    workers: int | None = None  # processes; null: one per CPU that this process may use
    tasks: int | None = None  # pieces of work; null: by the size of the input
    min_chars: int = 50  # of main text in a page
    memory_mb: int = 256  # per cell of the two-pass sorts
    url: UrlConfig = field(default_factory=UrlConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    quality: list[str] = field(default_factory=lambda: list(QUALITY))
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)

    def num_workers(self) -> int:
        """Worker processes to start."""
        return self.workers if self.workers is not None else len(os.sched_getaffinity(0))

    def validate(self) -> None:
        """Raise UserError naming the key, the value and the fix."""
        from trainer.chat.tokenizer import SPECIAL_TOKENS

        for key, value, low in (
            ("workers", self.workers, 1),
            ("tasks", self.tasks, 1),
            ("min_chars", self.min_chars, 1),
            ("memory_mb", self.memory_mb, 1),
            ("tokenizer.train_mb", self.tokenizer.train_mb, 1),
        ):
            if value is not None and value < low:
                raise UserError(f"{key}={value}: must be at least {low}")
        for key, part in (
            ("language.threshold", self.language.threshold),
            ("shards.val_fraction", self.shards.val_fraction),
        ):
            if not 0 <= part < 1:
                raise UserError(f"{key}={part}: must be in [0, 1)")
        if not re.fullmatch(r"[A-Za-z0-9_+-]+", self.name):
            raise UserError(
                f"name={self.name}: it names the shard files: use letters, digits, '-', '_' and '+'"
            )
        if unknown := set(self.quality) - set(QUALITY):
            raise UserError(f"quality={sorted(unknown)}: unknown; choose from {', '.join(QUALITY)}")
        if self.tokenizer.trainer not in TRAINERS:
            raise UserError(f"tokenizer.trainer={self.tokenizer.trainer}: choose from {', '.join(TRAINERS)}")
        if self.shards.dtype not in ("auto", "uint16", "uint32"):
            raise UserError(f"shards.dtype={self.shards.dtype}: choose auto, uint16 or uint32")
        vocab, least = self.tokenizer.vocab_size, MIN_VOCAB + len(SPECIAL_TOKENS)
        if self.tokenizer.path is None and not least <= vocab <= MAX_VOCAB:
            raise UserError(
                f"tokenizer.vocab_size={vocab}: must be in [{least}, {MAX_VOCAB}] "
                f"(256 bytes + {len(SPECIAL_TOKENS)} special tokens at least)"
            )
        if self.tokenizer.path is None:
            self.check_dtype(vocab)
        block = self.shards.block_tokens
        if block < 256 or block & (block - 1):
            raise UserError(
                f"shards.block_tokens={block}: must be a power of two, at least 256, so that windows tile it"
            )

    def check_dtype(self, vocab_size: int) -> None:
        """Refuse a vocabulary whose ids the chosen dtype cannot hold."""
        if self.shards.dtype == "uint16" and vocab_size > UINT16_VOCAB:
            raise UserError(
                f"tokenizer.vocab_size={vocab_size}: ids above 65,535 do not fit shards.dtype=uint16; "
                "set shards.dtype=auto, or a vocabulary of at most 65,536"
            )


def find_archives(pattern: str) -> list[Path]:
    """The archives that `input=` names, sorted by name. Raises UserError when there are none."""
    if pattern == "sample":
        return [SAMPLE]
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith((".warc", ".warc.gz")) and p.is_file())
    elif path.is_file():
        found = [path]
    elif any(mark in pattern for mark in "*?["):
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(p for p in anchor.glob(str(path.relative_to(anchor))) if p.is_file())
    else:
        raise UserError(f"input={pattern}: no such file or directory")
    if not found:
        raise UserError(f"input={pattern}: no .warc or .warc.gz file there")
    return found
