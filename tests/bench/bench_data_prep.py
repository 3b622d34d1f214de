"""Where the time of `trivium data` goes: each step of the pipeline alone over the sample, in one process.

    python tests/bench/bench_data_prep.py

Prints documents and megabytes per CPU second, and ratios against datatrove's own blocks doing the same work.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)

from data_prep.bpe import train_ranks
from data_prep.config import SAMPLE
from data_prep.language import detect, model_path
from data_prep.quality import quality_filters
from data_prep.quality_names import QUALITY
from data_prep.text import decode, extract
from data_prep.urls import UrlRules, blocklist, cache_directory, load_blocklist
from data_prep.warc import Range, read_range
from trainer.chat.save import save_tokenizer


def timed(name: str, count: int, num_bytes: int, work: Callable[[], object]) -> float:
    """Run `work` once and print its rate; returns CPU seconds."""
    begin = time.process_time()
    work()
    seconds = max(1e-9, time.process_time() - begin)
    print(f"{name:<34} {seconds:7.2f} s {count / seconds:9.0f} docs/s {num_bytes / seconds / 1e6:8.2f} MB/s")
    return seconds


def survivors(filters: list, texts: list[str]) -> list[str]:
    """The texts that pass all filters, each text going only as far as it is kept."""
    kept = []
    for text in texts:
        document = Document(text=text, id="")
        if all(rule.filter(document) is True for rule in filters):
            kept.append(document.text)
    return kept


def main() -> None:
    share = Range(str(SAMPLE), 0, SAMPLE.stat().st_size, True)
    pages = [
        (item.headers["WARC-Target-URI"], data, item.http_charset) for item, data, _ in read_range(share, [])
    ]
    raw = sum(len(data) for _, data, _ in pages)
    timed("read (fastwarc)", len(pages), raw, lambda: list(read_range(share, [])))

    rules = UrlRules(
        load_blocklist(str(blocklist(cache_directory(), Path(tempfile.gettempdir())))), [], [], 2
    )
    timed("url", len(pages), raw, lambda: [rules.refuse(url) for url, _, _ in pages])
    html = [decode(data, charset)[0] for _, data, charset in pages]
    timed("extract (resiliparse)", len(pages), raw, lambda: [extract(text) for text in html])

    texts = [text for text in map(extract, html) if len(text) > 50]
    size = sum(len(text.encode()) for text in texts)
    model = str(model_path())
    timed("language (lid.176.ftz)", len(texts), size, lambda: [detect(text, model) for text in texts])

    english = [text for text in texts if detect(text, model)[0] == "en"]
    size = sum(len(text.encode()) for text in english)
    ours = quality_filters(list(QUALITY), dict.fromkeys(QUALITY))  # type: ignore[arg-type]
    theirs = [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]
    fast = timed("quality, ours", len(english), size, lambda: survivors(ours, english))
    slow = timed("quality, datatrove as it is", len(english), size, lambda: survivors(theirs, english))
    equal = survivors(ours, english) == survivors(theirs, english)
    print(f"{'':<34} ratio {slow / fast:.2f}, decisions equal: {equal}")

    kept = survivors(ours, english)
    size = sum(len(text.encode()) for text in kept)
    for trainer in ("rustbpe", "tokenizers"):
        timed(
            f"train BPE 4,096 ({trainer})",
            len(kept),
            size,
            lambda name=trainer: train_ranks(iter(kept), 4086, name),
        )  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = save_tokenizer(directory, train_ranks(iter(kept), 4086, "rustbpe"))
        timed("encode (tiktoken)", len(kept), size, lambda: tokenizer.encode_batch(kept))


if __name__ == "__main__":
    main()
