"""Bytes of a page -> text: which character set it is really in, and the main content without navigation."""

from collections.abc import Iterator

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

from data_prep.ledger import Ledger

SINGLE_BYTE = ("cp125", "iso8859", "iso-8859", "windows-125", "latin", "ascii", "us-ascii")
META_BYTES = 4096


def decode(payload: bytes, declared: str | None) -> tuple[str, str, str]:
    """(text, character set, how it was found) of a page; never raises.

    Servers lie about character sets, most often by a default of latin-1, in which *every* byte sequence is
    valid text. So: (1) bytes that are valid UTF-8 are UTF-8, whatever is declared; (2) a declared set (HTTP
    header, then <meta>) under which the bytes decode is believed, unless it is a single-byte set and the
    bytes look like a multi-byte one; (3) else the detected set; (4) else UTF-8 with replacement characters.
    How: "utf-8", "declared", "meta", "detected" or "replaced".
    """
    if payload.startswith((b"\xff\xfe", b"\xfe\xff")):
        return payload.decode("utf-16", "replace"), "utf-16", "detected"
    try:
        return payload.decode("utf-8-sig"), "utf-8", "utf-8"
    except UnicodeDecodeError:
        pass
    # Detection sees text better without markup: ASCII tags dilute the evidence on short pages.
    detected = detect_encoding(payload)
    multi_byte = detected is not None and detected != "utf-8" and not detected.startswith(SINGLE_BYTE)
    for how, charset in (("declared", declared), ("meta", meta_charset(payload)), ("detected", detected)):
        name = map_encoding_to_html5(charset, False) if charset else None
        if (
            name is None
            or name == "utf-8"
            or (how != "detected" and multi_byte and name.startswith(SINGLE_BYTE))
        ):
            continue
        try:
            return payload.decode(name), name, how
        except (UnicodeDecodeError, LookupError):
            continue
    return payload.decode("utf-8", "replace"), "utf-8", "replaced"


def meta_charset(payload: bytes) -> str | None:
    """The character set that the page's own <meta> names, if any."""
    head = payload[:META_BYTES]
    return detect_encoding(head, from_html_meta=True) if b"charset" in head.lower() else None


def clean_lines(text: str) -> Iterator[str]:
    """Lines without trailing blanks and without control characters (a NUL in a page is a NUL in every copy
    of it).
    """
    for line in text.splitlines():
        yield (
            "".join(c for c in line if c >= " " or c == "\t").rstrip()
            if not line.isprintable()
            else line.rstrip()
        )


def extract(html: str) -> str:
    """Main content of a page as plain text, paragraphs on lines of their own."""
    text = extract_plain_text(html, main_content=True, alt_texts=False, comments=False)
    return "\n".join(clean_lines(text)).strip()


class ExtractText(PipelineStep):
    """datatrove step: decodes `metadata["payload"]` and sets the document's text; pages without text are
    dropped.
    """

    type = "EXTRACT"
    name = "extract"

    def __init__(self, min_chars: int, ledger: Ledger):
        super().__init__()
        self.min_chars = min_chars
        self.ledger = ledger

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with self.ledger as ledger:
            for document in data:
                payload = document.metadata.pop("payload")
                with self.track_time():
                    html, charset, how = decode(payload, document.metadata["charset"])
                    document.text = extract(html)
                document.metadata["charset"] = charset
                self.stat_update(f"charset-{how}")
                if len(document.text) < self.min_chars:
                    document.metadata["filter_reason"] = "no_main_text"
                    ledger.write(document, rank)
                    continue
                yield document
