"""Bytes to text: character sets that are declared rightly, wrongly or not at all; main content of HTML."""

import pytest

from data_prep.text import decode, extract

GERMAN = (
    "<p>Die Übersicht über die größten Änderungen enthält auch die häufigsten Fragen für Anfänger.</p>" * 6
)
CHINESE = "<p>这是一个关于数据库系统的简短说明。我们将介绍如何安装和使用它，以及常见的问题。</p>" * 6
JAPANESE = "<p>このページは日本語で書かれた文書です。データベースの使い方を説明します。</p>" * 6
RUSSIAN = "<p>Это простой русский текст о том, как установить систему и как её настроить.</p>" * 6


@pytest.mark.parametrize(
    ("text", "encoding", "declared", "how"),
    [
        (GERMAN, "utf-8", None, "utf-8"),
        (GERMAN, "utf-8", "iso-8859-1", "utf-8"),  # the commonest lie
        (GERMAN, "utf-8-sig", "utf-8", "utf-8"),
        (GERMAN, "latin-1", "iso-8859-1", "declared"),
        (GERMAN, "latin-1", "utf-8", "detected"),
        (GERMAN, "latin-1", None, "detected"),
        (GERMAN, "utf-16", None, "detected"),
        (CHINESE, "gb18030", "gb18030", "declared"),
        (CHINESE, "gb18030", "gb2312", "declared"),
        (CHINESE, "gb18030", "utf-8", "detected"),
        (
            CHINESE,
            "gb18030",
            "iso-8859-1",
            "detected",
        ),  # every byte is valid latin-1: the text would be rubbish
        (JAPANESE, "shift_jis", "shift_jis", "declared"),
        (JAPANESE, "shift_jis", "windows-1252", "detected"),
        (JAPANESE, "euc_jp", "no-such-charset", "detected"),
        (RUSSIAN, "koi8-r", "koi8-r", "declared"),
    ],
)
def test_decode_finds_the_real_character_set(
    text: str, encoding: str, declared: str | None, how: str
) -> None:
    decoded, _, found = decode(text.encode(encoding), declared)
    assert decoded == text
    assert found == how


def test_the_pages_own_meta_counts_when_the_server_says_nothing() -> None:
    text = '<meta charset="iso-8859-2">' + "<p>Zażółć gęślą jaźń</p>" * 9
    assert decode(text.encode("iso-8859-2"), None) == (text, "iso8859-2", "meta")


def test_bytes_of_no_character_set_become_replacement_characters() -> None:
    text, _, how = decode(b"\x81\x8d\x8f\x90\x9d\xfe\xff\x00 plain words behind it", "utf-8")
    assert how in ("replaced", "detected")
    assert "plain words" in text


def test_extract_keeps_the_article_and_drops_the_navigation() -> None:
    html = """<html><head><title>t</title><style>p {color: red}</style></head><body>
    <nav><a href=/>Home page link</a><a href=/x>Another menu entry</a></nav>
    <main><h1>On bridges</h1><p>First paragraph of the text.</p><script>var x = 1;</script>
    <ol><li>one item of a list</li></ol></main><footer>Imprint and cookies</footer></body></html>"""
    text = extract(html)
    assert "First paragraph of the text." in text
    assert "1. one item of a list" in text
    for noise in ("menu entry", "var x", "color", "Imprint"):
        assert noise not in text


def test_extract_survives_broken_html_and_control_characters() -> None:
    text = extract("<main><p>one\x00two\x07 <b>three <table><td>four</main></body></b>" + "<div>" * 500)
    assert "\x00" not in text
    assert "\x07" not in text
    assert "three" in text
    assert extract("") == ""
