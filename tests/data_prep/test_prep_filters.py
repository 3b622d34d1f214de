"""URL lists, language, and FineWeb's rules: ours decide like datatrove's own."""

import socket
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.word_tokenizers import SpaCyTokenizer

from data_prep.config import SAMPLE
from data_prep.language import detect, model_path
from data_prep.quality import EnglishWords, quality_filters
from data_prep.quality_names import QUALITY
from data_prep.text import decode, extract
from data_prep.urls import UrlRules, blocklist, cache_directory, hash_strings
from data_prep.warc import Range, read_range


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Extracted text of 120 real pages of the sample."""
    found = []
    for item, payload, _ in read_range(Range(str(SAMPLE), 0, SAMPLE.stat().st_size, True), []):
        if len(found) == 120:
            break
        text = extract(decode(payload, item.http_charset)[0])
        if 50 < len(text) < 30_000:
            found.append(text)
    return found


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> UrlRules:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the URL filter asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return UrlRules(
        hash_strings([b"bad.com", b"evil.good.org", b"https://fine.net/one"]), ["Mine.example"], ["ok.com"], 2
    )


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://bad.com/", "domain"),
        ("http://WWW.Bad.COM/page", "domain"),
        ("https://evil.good.org/x", "subdomain"),
        ("https://good.org/x", None),
        ("https://fine.net/one", "url"),
        ("https://fine.net/two", None),
        ("https://mine.example/", "domain"),
        ("https://shop.org/buy-cialis-now", "hard_word"),
        ("https://shop.org/Buy-CIALIS-Now", "hard_word"),  # datatrove keeps this one
        ("https://specialist.org/", None),  # a word, not a substring
        ("https://a.org/webcam", None),
        ("https://a.org/webcam/Escort", "soft_words"),
        ("https://ok.com/cialis", None),
        ("http://127.0.0.1/x", None),
        ("no scheme at all", None),
        ("https://docs.python.org/3/library/glob.html", None),
    ],
)
def test_url_rules(rules: UrlRules, url: str, reason: str | None) -> None:
    assert rules.refuse(url) == reason


def test_the_bundled_block_list_is_complete_and_sorted(tmp_path: Path) -> None:
    path = blocklist(cache_directory(), tmp_path)  # the session's own, see conftest
    hashes = np.load(path)
    assert len(hashes) > 4_500_000
    assert (hashes[1:] > hashes[:-1]).all()
    rules = UrlRules(hashes, [], [], 2)
    assert rules.refuse("https://www.casino.com/") == "domain"
    assert rules.refuse("https://www.postgresql.org/docs/15/") is None


def test_the_block_list_goes_elsewhere_when_the_cache_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    known = tmp_path / blocklist(cache_directory(), tmp_path).name
    known.touch()  # taken as it is: building it again would cost seconds
    assert blocklist(tmp_path / "file" / "cache", tmp_path) == known


def test_language_of_real_and_of_tiny_texts() -> None:
    model = str(model_path())
    assert detect("The people who live near the river have waited for a long time.", model)[0] == "en"
    assert detect("这是一个关于数据库系统的简短说明。\n我们将介绍如何安装。", model)[0] == "zh"
    assert detect("Die Übersicht enthält auch die häufigsten Fragen.", model)[0] == "de"
    for text in ("", " ", "\n\n", "x", "\x00", "12345", "😀"):
        language, score = detect(text, model)
        assert isinstance(language, str)
        assert 0.0 <= score <= 1.0


def test_words_are_spacys_words(texts: list[str]) -> None:
    theirs, ours = SpaCyTokenizer("en"), EnglishWords()
    odd = ["IS_ALPHA and :-) don't (e.g.) U.S.A. 10km/h a…b  “q”\u00a0x\t:)\n\n--- 'tis o'clock", "", " \n "]
    for text in [*odd, *texts[:60]]:
        assert ours.word_tokenize(text) == theirs.word_tokenize(text)


def test_every_decision_is_datatroves(texts: list[str]) -> None:
    theirs = [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]
    ours = quality_filters(list(QUALITY), dict.fromkeys(QUALITY))  # type: ignore[arg-type]

    def decide(filters: list, text: str) -> tuple[object, str]:
        document = Document(text=text, id="")
        for rule in filters:
            kept = rule.filter(document)
            if kept is not True:
                return kept, ""
        return True, document.text

    edges = [
        "",
        "short",
        "word " * 60,
        "- a\n" * 80,
        "One. Two. Three. Four.",
        "Cookie policy.\n" * 9 + texts[0],
        "# " * 99,
    ]
    decisions = [(decide(ours, text), decide(theirs, text)) for text in [*edges, *texts]]
    assert all(mine == other for mine, other in decisions)
    assert len({str(mine[0]) for mine, _ in decisions}) >= 8
