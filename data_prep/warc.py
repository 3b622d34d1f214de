"""Web archives: cut them into tasks, read them with fastwarc, and say what a damaged one has lost.

A `.warc.gz` is a row of gzip members, one record each, so any byte offset can be made a starting point by
looking for the next member. That lets several workers share one archive, and it lets reading go on behind a
damaged place. fastwarc 2.0.1 ends without a word on a truncated archive (a cut record comes back short; a
cut inside a record's first bytes shows nothing at all), hence the checks here: every record's payload
against its declared length, and the last member's end against the file's.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from data_prep.ledger import Ledger
from trainer.errors import UserError

GZIP_MAGIC = b"\x1f\x8b\x08"
SCAN_BYTES = 1 << 20
PROBE_BYTES = 1 << 12
HTML_TYPES = {"text/html", "application/xhtml+xml"}
MAX_PAGE_BYTES = 16 << 20  # pages beyond are dropped: one of them would hold a worker for minutes


@dataclass(frozen=True)
class Range:
    """Records whose first byte lies in [begin, end) of the file `path`; one task's share of an archive.

    members: the archive has one gzip member per record, so offsets of records are known.
    """

    path: str
    begin: int
    end: int
    members: bool


@dataclass
class Loss:
    """What could not be read: where it starts in the compressed file, how many bytes, and the page's URL if
    known.
    """

    path: str
    offset: int
    bytes: int
    url: str | None
    why: str


def check_archive(path: Path) -> None:
    """Raise UserError unless the file starts like a WARC."""
    with open(path, "rb") as file:
        head = file.read(PROBE_BYTES)
    if not head:
        raise UserError(f"{path}: empty file: fetch the archive again")
    start = inflate_head(head) if head.startswith(GZIP_MAGIC) else head
    if not start.lstrip(b"\r\n").startswith(b"WARC/"):
        raise UserError(
            f"{path}: not a WARC file (it starts with {head[:8]!r}): input= takes .warc and .warc.gz files"
        )


def inflate_head(data: bytes) -> bytes:
    """The first bytes inside the gzip member that `data` starts with; b"" when it is none."""
    try:
        return zlib.decompressobj(31).decompress(data, 64)
    except zlib.error:
        return b""


def next_member(file: BinaryIO, begin: int) -> int | None:
    """Offset of the first gzip member at or after `begin` that holds a WARC record, or None."""
    position, window = begin, b""
    while True:
        file.seek(position + len(window))
        block = file.read(SCAN_BYTES)
        if not block and len(window) < len(GZIP_MAGIC):
            return None
        window += block
        found = window.find(GZIP_MAGIC)
        while found >= 0:
            file.seek(position + found)
            # The magic also occurs by chance inside compressed data: only a member that opens a record
            # counts.
            if inflate_head(file.read(PROBE_BYTES)).startswith(b"WARC/"):
                return position + found
            found = window.find(GZIP_MAGIC, found + 1)
        if not block:
            return None
        keep = len(GZIP_MAGIC) - 1
        position += len(window) - keep
        window = window[-keep:]


def member_end(file: BinaryIO, begin: int) -> int | None:
    """Offset just behind the gzip member that starts at `begin`; None when it is cut short or damaged."""
    file.seek(begin)
    inflater, position = zlib.decompressobj(31), begin
    while not inflater.eof:
        block = file.read(SCAN_BYTES)
        if not block:
            return None
        position += len(block)
        try:
            inflater.decompress(block)
            while inflater.unconsumed_tail:
                inflater.decompress(inflater.unconsumed_tail)
        except zlib.error:
            return None
    return position - len(inflater.unused_data)


def splittable(path: Path) -> bool:
    """Whether the archive has one gzip member per record, so that reading may start in its middle."""
    with open(path, "rb") as file:
        if not file.read(len(GZIP_MAGIC)).startswith(GZIP_MAGIC):
            return False
        end = member_end(file, 0)
        return end is not None and next_member(file, end) == end


def plan(paths: list[Path], task_bytes: int) -> list[Range]:
    """Cut archives into ranges of about `task_bytes`. Depends on the files alone, never on the number of
    workers.
    """
    ranges = []
    for path in paths:
        size = path.stat().st_size
        members = splittable(path)
        count = max(1, round(size / task_bytes)) if members else 1
        edges = [size * i // count for i in range(count)] + [size]
        ranges += [Range(str(path), begin, end, members) for begin, end in pairwise(edges)]
    return ranges


def read_range(share: Range, losses: list[Loss]) -> Iterator[tuple[WarcRecord, bytes, int]]:
    """(record, payload, offset) of every whole response of the share; damage is appended to `losses`."""
    with open(share.path, "rb") as file, open(share.path, "rb") as second:
        size = file.seek(0, 2)
        position: int | None = share.begin
        if share.begin > 0:
            position = next_member(file, share.begin)
        while position is not None and position < share.end:
            last = position
            file.seek(position)
            # any_type, not only responses: the offsets of all records are needed to name what was lost.
            iterator = ArchiveIterator(file, record_types=WarcRecordType.any_type, strict_mode=False)
            try:
                for record in iterator:
                    last = record.stream_pos
                    if last >= share.end and share.end < size:
                        return
                    payload = record.reader.read()
                    # A record can only be cut when fastwarc has read the file to its end.
                    at_end = share.members and file.tell() == size
                    if is_short(record, payload) or (at_end and member_end(second, last) is None):
                        url = record.headers.get("WARC-Target-URI")
                        losses.append(Loss(share.path, last, size - last, url, "cut short"))
                        return
                    if record.record_type == WarcRecordType.response:
                        yield record, payload, last
            except OSError as error:
                position = next_member(file, last + 1) if share.members else None
                # `last` was read whole when its member ends well: then the damage starts behind it, perhaps
                # in a member that begins well. That one is tried (by whoever owns it) before it is given up.
                start = (member_end(second, last) or last) if share.members else last
                stop = size if position is None else position
                if stop > start:
                    losses.append(Loss(share.path, start, stop - start, None, f"damaged ({error})"))
                continue
            end = member_end(second, last) if share.members else None
            if end is not None and end < size:
                losses.append(Loss(share.path, end, size - end, None, "cut short"))
            return


def is_short(record: WarcRecord, payload: bytes) -> bool:
    """Whether the archive ended inside this record, as far as the record itself tells."""
    if "Content-Length" not in record.headers:
        return True
    return len(payload) < record.content_length or (record.is_http and record.http_headers is None)


class ReadWarc(PipelineStep):
    """datatrove step: response records -> documents that hold raw bytes (`metadata["payload"]`) and no text
    yet.

    Drops, with a reason, what can never become a document: HTTP errors, other media types, empty bodies.
    """

    type = "READER"
    name = "read"

    def __init__(self, ranges: list[Range], ledger: Ledger):
        super().__init__()
        self.ranges = ranges
        self.ledger = ledger
        self.losses: list[Loss] = []

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        share = self.ranges[rank]
        with self.ledger as ledger:
            for record, payload, offset in read_range(share, self.losses):
                self.stat_update("records")
                document = self.document(record, payload, Path(share.path).name, offset)
                if reason := self.refuse(record, payload):
                    document.metadata["filter_reason"] = reason
                    ledger.write(document, rank)
                    continue
                self.stat_update("pages")
                self.stat_update("page_bytes", value=len(payload))
                yield document
            for loss in self.losses:
                ledger.write_loss(vars(loss), rank)

    @staticmethod
    def document(record: WarcRecord, payload: bytes, name: str, offset: int) -> Document:
        identity = (record.headers.get("WARC-Record-ID") or "").strip("<>").removeprefix("urn:uuid:")
        metadata: dict[str, Any] = {
            "url": (record.headers.get("WARC-Target-URI") or "").strip("<> "),
            "date": record.headers.get("WARC-Date"),
            "source": {"file": name, "offset": offset},
            "charset": record.http_charset,
            "payload": payload,
        }
        return Document(text="", id=identity or f"{name}:{offset}", metadata=metadata)

    @staticmethod
    def refuse(record: WarcRecord, payload: bytes) -> str | None:
        """Why this record holds no page, or None."""
        status = record.http_headers.status_code if record.http_headers else None
        if status != 200:
            return f"status_{status // 100}xx" if status else "no_http"
        if record.http_content_type is not None and record.http_content_type.lower() not in HTML_TYPES:
            return "not_html"
        if not payload.strip():
            return "empty_body"
        if len(payload) > MAX_PAGE_BYTES:
            return "too_large"
        if not record.headers.get("WARC-Target-URI"):
            return "no_url"
        return None
