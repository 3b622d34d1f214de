"""The built-in sample: every filter has something to do, and it can be built again from its list."""

import json
from collections import Counter
from pathlib import Path

import pytest

from data_prep.config import SAMPLE
from data_prep.report import ORDER
from data_prep.run import main
from data_prep.sample.build import article, build, record_bytes, with_charset
from data_prep.sample.packages import BY_NAME
from trainer.errors import UserError


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("sample") / "out"
    assert main([f"output={out}", "workers=1"]) == 0
    return json.loads((out / "report.json").read_text())


def test_it_is_small_and_about_four_megabytes_of_text_survive(report: dict) -> None:
    assert SAMPLE.stat().st_size <= 8_000_000
    assert 3_800_000 < report["text_bytes"] < 4_800_000
    assert report["tokens"]["train"]["tokens"] > 900_000
    assert report["tokens"]["val"]["documents"] >= 20


def test_every_filter_drops_something(report: dict) -> None:
    dropped = Counter[str]()
    for drop in report["drops"]:
        dropped[drop["filter"]] += drop["pages"]
        assert drop["examples"]
    assert set(dropped) == set(ORDER)
    assert min(dropped.values()) >= 5
    reasons = {drop["reason"] for drop in report["drops"]}
    wanted = {
        "status_4xx",
        "not_html",
        "empty_body",
        "domain",
        "hard_word",
        "soft_words",
        "no_main_text",
        "lorem_ipsum",
    }
    assert wanted | {"same_text", "curly_bracket", "low_score"} <= reasons


def test_other_languages_and_character_sets_are_there(report: dict) -> None:
    languages = {d["reason"]: d["pages"] for d in report["drops"] if d["reason"].startswith("lang_")}
    assert sum(languages.values()) >= 40
    assert languages["lang_zh"] >= 5
    assert report["charsets"]["declared"] >= 5
    assert report["charsets"]["detected"] >= 5
    assert "zh" in report["compression"]


def test_the_list_names_known_packages_and_their_licences() -> None:
    directory = SAMPLE.parent
    listed = {line.split("\t")[0] for line in (directory / "pages.tsv").read_text().splitlines()}
    assert listed <= set(BY_NAME)
    licences = (directory / "LICENSES.md").read_text()
    for name in listed:
        assert name in licences or name.rsplit("-", 1)[0].removesuffix("-zh") in licences


def test_building_without_the_packages_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not among the unpacked packages"):
        build(tmp_path, tmp_path / "x.warc.gz")


def test_records_are_a_function_of_their_content() -> None:
    block = article("Title", ["One.", "Two."])
    assert record_bytes("response", "https://a.org/", "text/html", block) == record_bytes(
        "response", "https://a.org/", "text/html", block
    )
    assert with_charset('<meta charset="utf-8"><p>Größe</p>'.encode(), "latin-1") == "<p>Größe</p>".encode(
        "latin-1"
    )
