"""Stage 2: exact duplicates out, documents in an order of their own.

Two passes through cells on disk (a cell is a range of text hashes), so memory is one cell. Of equal texts
the one with the least (url, id) stays, and documents are sorted by the hash of their text: the result does
not depend on the number of tasks, their order, or the order of the archives.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_prep.files import JsonlFile, jsonl_writer, read_jsonl

MAX_CELLS = 4096
PREFIX_DIGITS = 8  # of the hash: 32 bits decide the cell


def num_cells(total_bytes: int, cell_bytes: int) -> int:
    """A power of two, so that about `cell_bytes` of text fall into each cell."""
    cells = 1
    while cells < MAX_CELLS and cells * cell_bytes < total_bytes:
        cells *= 2
    return cells


def cell_of(sha256: str, cells: int) -> int:
    """The cell of a hash; ascending with the hash, so cells in order are documents in order."""
    return int(sha256[:PREFIX_DIGITS], 16) * cells >> (4 * PREFIX_DIGITS)


def split_into_cells(sources: list[Path], cells: int, directory: Path) -> list[Path]:
    """Pass 1: every row of the sources into the file of its cell."""
    paths = [directory / f"cell-{cell:04d}.jsonl.zst" for cell in range(cells)]
    with ExitStack() as stack:
        files: list[JsonlFile] = [stack.enter_context(jsonl_writer(path)) for path in paths]
        for source in sources:
            for row in read_jsonl(source):
                files[cell_of(row["sha256"], cells)].write(row)
    return paths


def exact_dedup(sources: list[Path], total_bytes: int, cell_bytes: int, directory: Path) -> dict[str, Any]:
    """Write `directory/documents-NNNN.jsonl.zst` and `directory/dropped.jsonl.zst`; returns the counts.

    `directory` is a fresh one; the caller renames it into its place.
    """
    cells = num_cells(total_bytes, cell_bytes)
    # One cell: the sources themselves are it, no need to write them once more.
    groups = [[path] for path in split_into_cells(sources, cells, directory)] if cells > 1 else [sources]
    documents = text_bytes = dropped = 0
    with jsonl_writer(directory / "dropped.jsonl.zst") as ledger:
        for number, group in enumerate(groups):
            rows = sorted((row for path in group for row in read_jsonl(path)), key=sort_key)
            with jsonl_writer(directory / f"documents-{number:04d}.jsonl.zst") as out:
                previous = ""
                for row in rows:
                    size = len(row["text"].encode())
                    if row["sha256"] == previous:
                        drop = {
                            "filter": "exact_dedup",
                            "reason": "same_text",
                            "id": row["id"],
                            "url": row["url"],
                        }
                        ledger.write(drop | {"bytes": size, "sha256": previous})
                        dropped += 1
                        continue
                    previous = row["sha256"]
                    out.write(row)
                    documents += 1
                    text_bytes += size
            if cells > 1:
                group[0].unlink()
    return {"documents": documents, "text_bytes": text_bytes, "dropped": dropped, "files": len(groups)}


def sort_key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """By text, then by what tells copies apart."""
    return row["sha256"], row["url"], row["id"], json.dumps(row["source"], sort_keys=True)


def document_files(directory: Path) -> list[Path]:
    """The document files of a committed directory, in order."""
    return sorted(directory.glob("documents-*.jsonl.zst"))
