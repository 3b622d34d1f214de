"""Small corpora whose tokens tell where they stand, so that a row read back names its place."""

from pathlib import Path

import numpy as np

from trainer.stream.index import Index
from trainer.stream.shards import ShardWriter

EOS = 9
FIRST = 10  # token at place p of the row is FIRST + p, except where a document ends


def numbered_row(tokens: int, document: int) -> np.ndarray:
    """`tokens` ids FIRST, FIRST + 1, ... with an EOS at the end of every `document` tokens."""
    row = np.arange(FIRST, FIRST + tokens)
    row[document - 1 :: document] = EOS
    return row


def write_corpus(
    directory: Path,
    tokens: int,
    document: int = 37,
    name: str = "web",
    offset: int = 0,
    **options: object,
) -> Index:
    """One finished data set of small blocks, every id above EOS raised by `offset`; `options` go to
    ShardWriter.
    """
    defaults: dict = {"vocab_size": 1 << 20, "eos_id": EOS, "tokenizer_sha256": "sha-of-tokenizer"}
    defaults |= {"block_tokens": 64, "blocks_per_shard": 7}
    writer = ShardWriter(directory, name=name, **(defaults | options))
    row = numbered_row(tokens, document)
    writer.add(np.where(row == EOS, EOS, row + offset))
    return writer.close()
