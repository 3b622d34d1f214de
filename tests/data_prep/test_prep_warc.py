"""Reading archives: every record once whatever the cut into tasks; damage is survived, counted and named."""

import gzip
import hashlib
from pathlib import Path

import pytest
from prep_archives import PROSE, members, page, record

from data_prep.config import SAMPLE
from data_prep.warc import Loss, Range, ReadWarc, check_archive, plan, read_range
from trainer.errors import UserError

URLS = [f"https://example.org/{number}" for number in range(8)]
NOISE = [hashlib.shake_256(url.encode()).hexdigest(2000) for url in URLS]  # members of about 2 kB, compressed
RECORDS = [record(url, page(f"{url} {PROSE} {noise}")) for url, noise in zip(URLS, NOISE)]


def read(path: Path, task_bytes: int) -> tuple[list[str], list[Loss]]:
    """URLs in order, and losses, of an archive read in tasks of `task_bytes`."""
    losses: list[Loss] = []
    urls = []
    for share in plan([path], task_bytes):
        for item, payload, _ in read_range(share, losses):
            assert len(payload) == item.content_length
            urls.append(item.headers["WARC-Target-URI"])
    return urls, losses


def test_every_record_is_read_once_however_the_archive_is_cut() -> None:
    whole, losses = read(SAMPLE, 1 << 30)
    assert len(whole) > 1000
    assert not losses
    for task_bytes in (2_000_000, 300_001, 40_000):
        assert read(SAMPLE, task_bytes) == (whole, [])


@pytest.mark.parametrize("keep", [5, 14, 150, 400, 900])
def test_a_cut_archive_keeps_its_good_records_and_names_the_loss(tmp_path: Path, keep: int) -> None:
    parts = members(RECORDS)
    good = sum(map(len, parts[:5]))
    path = tmp_path / "cut.warc.gz"
    path.write_bytes(b"".join(parts)[: good + keep])
    for task_bytes in (1 << 30, 700):
        urls, losses = read(path, task_bytes)
        assert urls == URLS[:5]
        assert [(loss.path, loss.offset, loss.bytes) for loss in losses] == [(str(path), good, keep)]
    if keep >= 400:  # the header of the lost record is there: its page is named
        assert losses[0].url == URLS[5]


def test_a_cut_between_two_records_loses_nothing_that_can_be_known(tmp_path: Path) -> None:
    path = tmp_path / "cut.warc.gz"
    path.write_bytes(b"".join(members(RECORDS)[:3]))
    assert read(path, 1 << 30) == (URLS[:3], [])


def test_reading_goes_on_behind_a_damaged_place(tmp_path: Path) -> None:
    parts = members(RECORDS)
    data = bytearray(b"".join(parts))
    start, end = sum(map(len, parts[:2])), sum(map(len, parts[:3]))
    data[start + 100 : start + 140] = b"\xff" * 40
    path = tmp_path / "damaged.warc.gz"
    path.write_bytes(data)
    for task_bytes in (1 << 30, 900):
        urls, losses = read(path, task_bytes)
        assert urls == URLS[:2] + URLS[3:]
        assert [(loss.offset, loss.bytes) for loss in losses] == [(start, end - start)]


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress])
def test_archives_that_cannot_be_cut_are_read_as_one_task(tmp_path: Path, compress) -> None:
    path = tmp_path / "whole.warc"
    path.write_bytes(compress(b"".join(RECORDS)))
    assert len(plan([path], 500)) == 1
    assert read(path, 500) == (URLS, [])
    path.write_bytes(compress(b"".join(RECORDS))[:-200])
    urls, losses = read(path, 500)
    assert 3 < len(urls) < len(URLS)
    assert urls == URLS[: len(urls)]
    assert [loss.url for loss in losses] == [URLS[len(urls)]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"<html>no</html>", "not a WARC"),
        (gzip.compress(b"<html>"), "not a WARC"),
        (b"\x1f\x8b\x08x", "not a"),
    ],
)
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.warc.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        check_archive(path)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (record("https://a.org/", b"x", status="404 Not Found"), "status_4xx"),
        (record("https://a.org/", b"x", status="301 Moved"), "status_3xx"),
        (record("https://a.org/", b"%PDF", "application/pdf"), "not_html"),
        (record("https://a.org/", b" \r\n"), "empty_body"),
        (record("https://a.org/", page(PROSE)), None),
        (record("https://a.org/", page(PROSE), ""), None),
        (record("https://a.org/", page(PROSE), "Application/XHTML+XML"), None),
    ],
)
def test_responses_without_a_page_are_dropped_with_a_reason(
    tmp_path: Path, made: bytes, reason: str | None
) -> None:
    path = tmp_path / "one.warc.gz"
    path.write_bytes(gzip.compress(made))
    (item, payload, _), *_ = list(read_range(Range(str(path), 0, path.stat().st_size, True), []))
    assert ReadWarc.refuse(item, payload) == reason
