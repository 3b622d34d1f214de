"""Build `sample.warc.gz` from Debian's documentation packages: real pages, copies of them, and things to
throw away.

    mkdir debs && cd debs && apt-get download PACKAGE...      (`python -m data_prep.sample.build` prints the
    line) for deb in *.deb; do dpkg -x "$deb" "${deb%.deb}"; done python -m data_prep.sample.build debs

`pages.tsv` names the pages. The bytes of the archive depend on the packages and this file alone: no clock,
no global randomness, no file system order. Licences of the manuals: `LICENSES.md`.
"""

import gzip
import hashlib
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.sample.packages import BY_NAME, PACKAGES, unpacked
from trainer.errors import UserError

HERE = Path(__file__).parent
DATE = "2024-01-01T00:00:00Z"
MAX_BYTES = 8_000_000
EXACT_COPIES = 24
NEAR_COPIES = 24
HTML = "text/html; charset=utf-8"
MIRROR_NOTE = "<p>This copy of the page was made by a mirror and may be older than the original.</p>"
LOREM = (
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore. "
)


@dataclass(frozen=True)
class Page:
    """One HTTP response of the archive. content_type None: the header is missing."""

    url: str
    body: bytes
    content_type: str | None = HTML
    status: str = "200 OK"


def record_bytes(kind: str, uri: str | None, content_type: str, block: bytes) -> bytes:
    """A WARC/1.1 record as one gzip member, its id derived from its content."""
    digest = hashlib.sha256(kind.encode() + (uri or "").encode() + block).hexdigest()
    identity = f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"
    target = f"WARC-Target-URI: {uri}\r\n" if uri else ""
    head = (
        f"WARC/1.1\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{identity}>\r\n"
        f"WARC-Date: {DATE}\r\n{target}"
        f"Content-Type: {content_type}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return gzip.compress(head.encode() + block + b"\r\n\r\n", compresslevel=9, mtime=0)


def response(page: Page) -> bytes:
    """The archive record of one page."""
    kind = f"Content-Type: {page.content_type}\r\n" if page.content_type else ""
    head = f"HTTP/1.1 {page.status}\r\n{kind}Content-Length: {len(page.body)}\r\n\r\n"
    return record_bytes("response", page.url, "application/http; msgtype=response", head.encode() + page.body)


def manual_pages(roots: dict[str, Path]) -> list[Page]:
    """The pages that `pages.tsv` lists, as the manuals' own sites serve them."""
    pages = []
    for line in (HERE / "pages.tsv").read_text().splitlines():
        name, path = line.split("\t")
        package = BY_NAME[name]
        if name not in roots:
            raise UserError(
                f"{name}: not among the unpacked packages; run without arguments to see how to get it"
            )
        pages.append(Page(package.url + path, (roots[name] / package.pages / path).read_bytes()))
    return pages


def copies(pages: list[Page], rng: random.Random) -> Iterator[Page]:
    """Exact copies under other addresses, and near copies: another version, a banner, a changed footer."""
    english = [
        page
        for page in pages
        if not re.search(r"[./](de|fr|it|ja|ru|zh-cn)\.html|browse/(?!en-US)", page.url)
    ]
    some = rng.sample(english, EXACT_COPIES + NEAR_COPIES)
    for number, page in enumerate(some[:EXACT_COPIES]):
        address = page.url.split("://", 1)[1]
        url = f"http://{address}" if number % 2 else f"https://mirror.example.org/{address}"
        yield Page(url, page.body)
    for page in some[EXACT_COPIES:]:
        text = page.body.decode("utf-8", "replace")
        text = re.sub(r"\b(3\.11|3\.40|2\.39|15|3\.2)\b", lambda match: match[0] + ".1", text)
        text = re.sub(r"<p\b", MIRROR_NOTE + "<p", text, count=1)
        yield Page(f"https://docs-mirror.example.net/{page.url.split('://', 1)[1]}", text.encode())


def with_charset(body: bytes, charset: str | None) -> bytes:
    """`body` (UTF-8) without its own declarations of a character set, encoded as `charset`."""
    text = re.sub(r"<\?xml[^>]*\?>|<meta[^>]*charset[^>]*>", "", body.decode("utf-8"), flags=re.IGNORECASE)
    return text.encode(charset or "utf-8", "xmlcharrefreplace")


def other_charsets(pages: list[Page]) -> Iterator[Page]:
    """Pages that are not UTF-8: rightly declared, not declared, and declared wrongly."""
    cases = (
        (r"\.de\.html", "iso-8859-1", ("iso-8859-1", None, "utf-8")),
        (r"browse/ru-RU/|\.ru\.html", "koi8-r", ("koi8-r", None, "iso-8859-1")),
        (r"browse/zh-CN/|\.zh-cn\.html", "gb18030", ("gb18030", None, "utf-8")),
        (r"\.ja\.html", "shift_jis", ("shift_jis", None, "iso-8859-1")),
        (r"postgresql\.org/docs/15/", "cp1252", ("windows-1252", None, "utf-8", "iso-8859-1")),
    )
    for pattern, charset, headers in cases:
        found = [page for page in pages if re.search(pattern, page.url) and not page.body.isascii()]
        for page, header in zip(found, headers, strict=False):
            content_type = f"text/html; charset={header}" if header else "text/html"
            body = with_charset(page.body, charset)
            yield Page(page.url.replace("https://", "http://legacy.example.org/"), body, content_type)


def article(title: str, paragraphs: list[str]) -> bytes:
    """A plain page."""
    body = "".join(f"<p>{paragraph}</p>\n" for paragraph in paragraphs)
    head = f'<head><meta charset="utf-8"><title>{title}</title></head>'
    main = f"<main><h1>{title}</h1>\n{body}</main>"
    return f"<!DOCTYPE html><html lang=en>{head}<body>{main}</body></html>".encode()


def junk(pages: list[Page], rng: random.Random) -> Iterator[Page]:
    """Pages that a crawl is full of and a corpus should not be."""
    site = "https://www.example.com/"
    english = [page for page in pages if "/docs/15/" in page.url or "docs.python.org" in page.url]
    text = re.sub(
        r"<[^>]*>", " ", " ".join(page.body.decode("utf-8", "replace") for page in rng.sample(english, 12))
    )
    words = re.findall(r"[a-z]{2,12}", text)
    for number in range(8):
        links = "".join(f'<li><a href="/{word}">{word.title()}</a></li>' for word in rng.sample(words, 60))
        yield Page(
            f"{site}sitemap/{number}", f"<html><body><nav><ul>{links}</ul></nav></body></html>".encode()
        )
        salad = [" ".join(rng.choices(words, k=90)) for _ in range(6)]
        yield Page(f"{site}salad/{number}", article("Results", salad))
        stuffing = [f"Buy the best {words[number]} online, cheap {words[number]} for everyone."] * 40
        yield Page(f"{site}offers/{number}", article("Offers", stuffing))
        draft = english[number].body.decode("utf-8", "replace")
        draft = re.sub(r"<p\b", f"<p>{LOREM}</p><p", draft, count=1)
        yield Page(f"{site}draft/{number}", draft.encode())
        yield Page(
            f"{site}missing/{number}",
            article("Page not found", ["Sorry, the page that you asked for is gone."]),
        )
        tags = " ".join(f"#{word}" for word in rng.sample(words, 90))
        yield Page(
            f"{site}tags/{number}",
            article("Tags", [f"These are the tags that you have with us to be of use: {tags}"]),
        )
        numbers = [" ".join(str(rng.randrange(10**5)) for _ in range(80)) for _ in range(4)]
        yield Page(f"{site}table/{number}", article("Measurements", numbers))
        teaser = [" ".join(rng.choices(words, k=12)) + " ..." for _ in range(20)]
        yield Page(f"{site}news/{number}", article("News", teaser))
    condemned = re.sub(
        rb"<title>.*?</title>", b"<title>A page that only its address condemns</title>", english[0].body
    )
    for url in (
        "https://www.casino.com/guide",
        "http://888casino.com/help",
        "https://shop.example.com/Buy-CIALIS-now",
        "https://shop.example.com/offer/CIALIS",
        "https://chat.example.com/webcam/Escort",
    ):
        yield Page(url, condemned)


def not_pages(pages: list[Page]) -> Iterator[Page]:
    """Responses without a page in them."""
    site = "https://files.example.com/"
    yield Page(f"{site}manual.pdf", b"%PDF-1.4\n" + bytes(range(256)) * 8, "application/pdf")
    yield Page(f"{site}style.css", b"body { color: black }\n" * 50, "text/css")
    yield Page(f"{site}data.json", b'{"rows": [1, 2, 3]}', "application/json")
    yield Page(f"{site}logo.png", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "image/png")
    gone = article("404 Not Found", ["The requested address was not found on this server."])
    for number in range(6):
        yield Page(f"{site}gone/{number}", gone, status="404 Not Found")
    yield Page(f"{site}moved", b"", status="301 Moved Permanently")
    yield Page(
        f"{site}broken", article("500", ["Internal server error."]), status="500 Internal Server Error"
    )
    for number, body in enumerate((b"", b"", b" \r\n ", b"\n")):
        yield Page(f"{site}empty/{number}", body)


def build(directory: Path, target: Path) -> list[Page]:
    """Write the archive; returns its pages in order."""
    roots = unpacked(directory)
    rng = random.Random(2024)
    pages = manual_pages(roots)
    everything = [*pages, *copies(pages, rng), *other_charsets(pages), *junk(pages, rng), *not_pages(pages)]
    rng.shuffle(
        everything
    )  # a crawl has no order; and every byte range of the archive gets its share of everything
    info = record_bytes(
        "warcinfo", None, "application/warc-fields", b"software: trivium data_prep/sample/build.py\r\n"
    )
    data = info + b"".join(map(response, everything))
    if len(data) > MAX_BYTES:
        raise UserError(f"{target}: {len(data)} bytes, more than {MAX_BYTES}: list fewer pages in pages.tsv")
    target.write_bytes(data)
    return everything


def how_to_fetch() -> str:
    """The shell lines that get the packages."""
    names = " ".join(package.name for package in PACKAGES)
    return (
        f"mkdir debs && cd debs && apt-get download {names}\n"
        'for deb in *.deb; do dpkg -x "$deb" "${deb%.deb}"; done && cd ..\n'
        "python -m data_prep.sample.build debs"
    )


def main(argv: list[str]) -> int:
    if not argv:
        print(how_to_fetch())
        return 0
    directory = Path(argv[0])
    for deb in sorted(directory.glob("*.deb")):
        if not deb.with_suffix("").is_dir():
            subprocess.run(["dpkg", "-x", deb, deb.with_suffix("")], check=True)
    target = HERE / "sample.warc.gz"
    pages = build(directory, target)
    print(f"{target}: {len(pages)} responses, {target.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
