"""A small data set of real English text (docstrings of the standard library) in the form that `trivium data`
writes.
"""

import argparse
import inspect
import logging
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import rustbpe

from trainer.chat.save import save_tokenizer
from trainer.chat.tokenizer import SPLIT_PATTERN
from trainer.stream.shards import ShardWriter

VOCAB = 320
MODULES = (argparse, inspect, logging, subprocess, textwrap)


def documents() -> list[str]:
    """One document per function of a few modules."""
    found = []
    for module in MODULES:
        source = inspect.getsource(module)
        found += [part for part in source.split("\n    def ") if len(part) > 200]
    return found


def write_dataset(directory: Path) -> Path:
    trainer = rustbpe.Tokenizer()
    texts = documents()
    trainer.train_from_iterator(iter(texts), VOCAB - 10, pattern=SPLIT_PATTERN)
    tokenizer = save_tokenizer(directory / "tokenizer", trainer.get_mergeable_ranks())
    assert tokenizer.vocab_size == VOCAB
    for split, part in (("val", texts[::10]), ("train", [t for i, t in enumerate(texts) if i % 10])):
        writer = ShardWriter(
            directory / split,
            name="code",
            vocab_size=VOCAB,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=tokenizer.sha256,
            block_tokens=2048,
            blocks_per_shard=8,
        )
        for text in part:
            writer.add(np.array([*tokenizer.encode(text), tokenizer.eos_id]))
        writer.close()
    return directory
