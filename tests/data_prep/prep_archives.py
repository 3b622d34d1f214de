"""Small archives for the tests, and a slice of the built-in sample."""

import gzip
import zlib
from pathlib import Path

from data_prep.config import SAMPLE
from data_prep.warc import member_end

PROSE = (
    "The committee met in the morning and talked about the plan that it had made for the bridge. "
    "Most of the people who live near the river have waited for a long time, and were glad to hear it. "
    "The engineer said that the work would be done with care, and that nobody should expect it to be quick. "
    "After the meeting a few of the members went down to the water to look at the place for themselves. "
    "They found that the old stones could be used again, which will save money for the town next year. "
    "In the evening the mayor wrote a letter to those who could not come, so that all of them would know. "
)


def record(
    url: str, body: bytes, content_type: str = "text/html; charset=utf-8", status: str = "200 OK"
) -> bytes:
    """One response record, not compressed."""
    kind = f"Content-Type: {content_type}\r\n" if content_type else ""
    http = f"HTTP/1.1 {status}\r\nServer: test\r\n{kind}\r\n".encode() + body
    head = (
        f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{zlib.crc32(url.encode()):032x}>\r\n"
        f"WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Target-URI: {url}\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
    )
    return head.encode() + http + b"\r\n\r\n"


def page(text: str, title: str = "A page") -> bytes:
    """A plain HTML page."""
    body = f"<main><h1>{title}</h1><p>{text}</p></main>"
    return f"<html><head><title>{title}</title></head><body>{body}</body></html>".encode()


def members(records: list[bytes]) -> list[bytes]:
    """One gzip member per record."""
    return [gzip.compress(item, mtime=0) for item in records]


def sample_slice(target: Path, num_records: int) -> Path:
    """The first records of the sample as an archive of its own."""
    with open(SAMPLE, "rb") as file:
        end = 0
        for _ in range(num_records):
            found = member_end(file, end)
            assert found is not None
            end = found
        file.seek(0)
        target.write_bytes(file.read(end))
    return target
