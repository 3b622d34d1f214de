"""What every filter dropped and why: one line per page, kept beside the documents.

Each filter of a task writes its own file `DIR/task-NNNNN.tmp/dropped-FILTER.jsonl.zst`; the report is
counted from these lines alone, so "read = kept + dropped" holds by construction.
"""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from datatrove.data import Document

from data_prep.files import JsonlFile, jsonl_writer

EXCERPT_CHARS = 300


class Ledger:
    """The exclusion writer of one filter, as datatrove's `BaseFilter` uses it: a context manager with
    `write`.
    """

    def __init__(self, directory: Path, filter_name: str):
        self.directory = directory
        self.filter_name = filter_name
        self._stack = ExitStack()
        self._file: JsonlFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._file = None
        return self._stack.__exit__(kind, error, trace)

    def _open(self, rank: int) -> JsonlFile:
        # Opened on the first drop: most tasks drop nothing in most filters, and files are not free on shared
        # disks.
        if self._file is None:
            path = task_directory(self.directory, rank) / f"dropped-{self.filter_name}.jsonl.zst"
            self._file = self._stack.enter_context(jsonl_writer(path))
        return self._file

    def write(self, document: Document, rank: int = 0) -> None:
        """Note that `document` was dropped; the reason is in `metadata["filter_reason"]` when the filter
        gave one.
        """
        row: dict[str, Any] = {
            "filter": self.filter_name,
            "reason": document.metadata.get("filter_reason", self.filter_name),
            "id": document.id,
            "url": document.metadata["url"],
            "bytes": len(document.metadata.get("payload", b""))
            or len(document.text.encode("utf-8", "replace")),
        }
        if "language" in document.metadata:
            row["language"] = document.metadata["language"]
        if document.text:
            row["text"] = document.text[:EXCERPT_CHARS]
        self._open(rank).write(row)

    def write_loss(self, loss: dict[str, Any], rank: int) -> None:
        """Note a part of an archive that could not be read."""
        row = {"filter": self.filter_name, "reason": "lost", "id": f"{loss['path']}:{loss['offset']}"}
        self._open(rank).write(row | {"url": loss["url"] or "", "bytes": loss["bytes"], "loss": loss})


def task_directory(directory: Path, rank: int) -> Path:
    """Where task `rank` writes until it is committed."""
    return directory / f"task-{rank:05d}.tmp"
