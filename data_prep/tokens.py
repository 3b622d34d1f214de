"""Stage 4: documents -> ids, split into train and validation, shuffled as a whole, written as token shards.

Two passes, so that memory is one cell however large the corpus: (1) encode in order and append each document
to the cell that the leading bits of its shuffle word name; (2) cell after cell, sort by the whole word and
write. The word is a keyed function of the document's hash, so the order depends on the seed and the texts,
not on cells or workers.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.bpe import in_split
from data_prep.config import ShardsConfig
from data_prep.dedup import num_cells
from data_prep.files import atomic_file, jsonl_writer, read_jsonl
from trainer.chat.tokenizer import Tokenizer
from trainer.errors import UserError
from trainer.keyed import key, mix64
from trainer.stream.shards import ShardWriter

BATCH_DOCUMENTS = 512
SPLITS = ("train", "val")


def shuffle_word(sha256: str, role: int) -> int:
    """64 bits that place a document in the shuffled order. `role` = `key(seed, "documents")`."""
    word = np.uint64(int(sha256[:16], 16)) ^ np.uint64(role)
    return int(mix64(np.array([word]))[0])


def batches(files: list[Path]) -> Iterator[list[dict[str, Any]]]:
    """Documents in order, some hundred at a time: what one call of the encoder gets."""
    rows = (row for file in files for row in read_jsonl(file))
    while batch := list(islice(rows, BATCH_DOCUMENTS)):
        yield batch


class Split:
    """Which documents are validation: by the hash of their text, but never none of them and never all."""

    def __init__(self, files: list[Path], fraction: float):
        self.fraction = fraction
        self.only = ""  # the one validation document, when the hash chooses none
        documents = chosen = 0
        least = "g"  # above every hexadecimal digit
        for batch in batches(files):
            for row in batch:
                documents += 1
                chosen += in_split(row["sha256"], fraction)
                least = min(least, row["sha256"])
        if fraction > 0 and not chosen and documents > 1:
            self.only = least
        if chosen >= documents:
            raise UserError(
                f"shards.val_fraction={fraction}: all {documents} documents fell into validation; "
                "lower it or give more input"
            )
        self.empty = not chosen and not self.only

    def of(self, sha256: str) -> str:
        """The name of a document's split."""
        return "val" if sha256 == self.only or in_split(sha256, self.fraction) else "train"


class Cells:
    """The shuffle's cells of one split: ids of documents end to end in one file, their rows in another."""

    def __init__(self, directory: Path, cells: int, stack: ExitStack):
        self.directory = directory
        self.cells = cells
        self.ids: list[BinaryIO] = []
        self.rows = []
        for cell in range(cells):
            self.ids.append(stack.enter_context(atomic_file(directory / f"{cell:04d}.ids")))
            self.rows.append(stack.enter_context(jsonl_writer(directory / f"{cell:04d}.jsonl.zst")))

    def add(self, word: int, row: dict[str, Any], ids: np.ndarray) -> None:
        cell = word * self.cells >> 64
        self.ids[cell].write(ids.tobytes())
        self.rows[cell].write(row | {"word": word, "num_tokens": len(ids)})

    @staticmethod
    def read(directory: Path, cells: int) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """(row, ids) of all documents in shuffled order, a cell in memory at a time; the cells are deleted
        behind.
        """
        for cell in range(cells):
            ids_path, rows_path = directory / f"{cell:04d}.ids", directory / f"{cell:04d}.jsonl.zst"
            ids = np.fromfile(ids_path, dtype=np.uint32)
            rows = list(read_jsonl(rows_path))
            ends = np.cumsum([row["num_tokens"] for row in rows], dtype=np.int64)
            for index in sorted(range(len(rows)), key=lambda i: (rows[i]["word"], rows[i]["id"])):
                yield rows[index], ids[ends[index] - rows[index]["num_tokens"] : ends[index]]
            ids_path.unlink()
            rows_path.unlink()


def write_shards(
    files: list[Path],
    total_bytes: int,
    tokenizer: Tokenizer,
    config: ShardsConfig,
    *,
    name: str,
    seed: int,
    cell_bytes: int,
    threads: int,
    directory: Path,
) -> dict[str, Any]:
    """Fill `directory` (fresh) with `train/` and `val/`. Returns tokens, documents and bytes of both."""
    chosen = Split(files, config.val_fraction)
    role = key(seed, "documents")
    cells = num_cells(total_bytes, cell_bytes)
    with ExitStack() as stack:
        shuffled = {}
        for split in SPLITS:
            (directory / "cells" / split).mkdir(parents=True)
            shuffled[split] = Cells(directory / "cells" / split, cells, stack)
        for batch in batches(files):
            encoded = tokenizer.encode_batch([row["text"] for row in batch], threads)
            for row, ids in zip(batch, encoded):
                split = chosen.of(row["sha256"])
                info = {name: row[name] for name in ("id", "url", "sha256", "source")}
                info["bytes"] = len(row["text"].encode())
                tokens = np.array([*ids, tokenizer.eos_id], dtype=np.uint32)
                shuffled[split].add(shuffle_word(row["sha256"], role), info, tokens)
    result = {}
    for split in SPLITS:
        documents = Cells.read(directory / "cells" / split, cells)
        if split == "val" and chosen.empty:
            continue
        result[split] = write_split(documents, tokenizer, config, name, directory / split)
    shutil.rmtree(directory / "cells")
    return result


def write_split(
    documents: Iterator[tuple[dict[str, Any], np.ndarray]],
    tokenizer: Tokenizer,
    config: ShardsConfig,
    name: str,
    directory: Path,
) -> dict[str, Any]:
    """Shards of one split, and `documents.jsonl.zst`: where each document lies (shard, block, offset,
    num_tokens).
    """
    writer = ShardWriter(
        directory,
        name=name,
        dtype=None if config.dtype == "auto" else config.dtype,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        block_tokens=config.block_tokens,
        blocks_per_shard=config.blocks_per_shard,
        meta={"split": directory.name},
    )
    position = 0
    with writer, jsonl_writer(directory / "documents.jsonl.zst") as provenance:
        for row, ids in documents:
            writer.add(ids, bytes_of_text=row["bytes"])
            block, offset = divmod(position, config.block_tokens)
            shard = f"{name}-{block // config.blocks_per_shard:06d}.tar"
            place = {"shard": shard, "block": block, "offset": offset, "num_tokens": len(ids)}
            provenance.write({k: row[k] for k in ("id", "url", "sha256", "source")} | place)
            position += len(ids)
    return {"tokens": writer.tokens, "documents": writer.documents, "text_bytes": writer.bytes_of_text}
