"""The whole command: from real HTML to shards, resumed, killed, repeated, and refused."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import OPTIONS
from prep_archives import PROSE, members, page, record

from data_prep.files import read_jsonl
from data_prep.run import main
from trainer.stream.index import Index

RESULTS = ("train", "val", "tokenizer", "documents")
ROOT = Path(__file__).resolve().parents[2]


def result_bytes(out: Path) -> dict[str, bytes]:
    files = [path for name in RESULTS for path in sorted((out / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def run(*arguments: object) -> int:
    return main([*map(str, arguments), *OPTIONS])


def test_what_was_read_is_what_was_kept_and_dropped(prepared: Path, archive: Path) -> None:
    report = report_of(prepared)
    assert report["read"] == 159  # 160 records, the first one describes the archive
    assert report["documents"] + sum(drop["pages"] for drop in report["drops"]) == report["read"]
    assert report["documents"] > 80
    assert report["losses"] == []
    for split in ("train", "val"):
        index = Index.load(prepared / split)
        assert index.tokens == report["tokens"][split]["tokens"] > 1000
        assert index.tokenizer_sha256 == report["tokenizer"]["sha256"]
    rows = list(read_jsonl(prepared / "documents" / "documents-0000.jsonl.zst"))
    assert len(rows) == report["documents"]
    assert {"id", "url", "language", "language_score", "source", "sha256", "text"} <= set(rows[0])
    assert {row["source"]["file"] for row in rows} == {archive.name}
    text = (prepared / "report.md").read_text()
    assert "bytes per token" in text
    assert "https://" in text


def test_a_second_run_does_nothing_and_a_changed_key_only_what_depends_on_it(
    prepared: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    expected = result_bytes(out)
    assert run(f"input={archive}", f"output={out}", "tasks=5") == 0
    assert capsys.readouterr().out.count("done before") == 4
    assert run(f"input={archive}", f"output={out}", "tasks=5", "seed=1") == 0
    said = capsys.readouterr().out
    assert said.count("done before") == 3
    assert "tokens: again, because of a change in seed" in said
    changed = result_bytes(out)
    assert {name for name in expected if expected[name] != changed[name]} <= {
        name for name in expected if name.startswith(("train/", "val/"))
    }
    assert (
        run(f"input={archive}", f"output={out}", "tasks=3") == 0
    )  # another number of tasks: read again, same result
    assert "clean: again, because of a change in task_bytes" in capsys.readouterr().out
    assert result_bytes(out) == expected


def test_the_result_does_not_depend_on_workers_tasks_or_the_order_of_files(
    prepared: Path, archive: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    data = archive.read_bytes()
    cut = data.index(b"\x1f\x8b\x08\x00\x00\x00\x00\x00", len(data) // 2)
    (parts / "b.warc.gz").write_bytes(data[:cut])
    (parts / "a.warc.gz").write_bytes(data[cut:])
    assert main([f"input={parts}", f"output={tmp_path / 'out'}", "tasks=7", *OPTIONS[:-1], "workers=2"]) == 0
    made, expected = result_bytes(tmp_path / "out"), result_bytes(prepared)
    for name in expected:
        if name.startswith("tokenizer/") or name.endswith(
            ".tar"
        ):  # the others name the file they were read from
            assert made[name] == expected[name], name


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_bytes(
    prepared: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [f"input={archive}", f"output={out}", "tasks=16", *OPTIONS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-m", "data_prep.run", *arguments], env=environment)
    while len(committed := [p for p in out.glob("work/pages-*/task-*") if p.suffix != ".tmp"]) < 3:
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    times = {path: path.stat().st_mtime_ns for path in committed}
    assert len(committed) < 16
    assert not (out / "train").exists()
    assert main(arguments) == 0
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())  # not done a second time
    assert result_bytes(out) == result_bytes(prepared)


@pytest.mark.parametrize("leftover", ["documents.tmp", "tokenizer.tmp", "work/tokens.tmp"])
def test_what_a_kill_between_stages_leaves_is_swept_up(
    prepared: Path, archive: Path, tmp_path: Path, leftover: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    expected = result_bytes(out)
    stage = {"documents.tmp": "dedup", "tokenizer.tmp": "tokenizer", "work/tokens.tmp": "tokens"}[leftover]
    (out / "work" / f"{stage}.json").unlink()
    (out / leftover).mkdir()
    (out / leftover / "half").write_text("half")
    assert run(f"input={archive}", f"output={out}", "tasks=5") == 0
    assert result_bytes(out) == expected
    assert not (out / leftover).exists()


def test_an_archive_cut_in_half_keeps_its_good_pages_and_says_what_is_lost(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half.warc.gz"
    half.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    out = tmp_path / "out"
    assert run(f"input={half}", f"output={out}") == 0
    report = report_of(out)
    assert 40 < report["read"] < 140
    (loss,) = report["losses"]
    assert loss["offset"] + loss["bytes"] == half.stat().st_size
    said = capsys.readouterr().out
    assert f"lost {half}: cut short at byte {loss['offset']}" in said
    assert "bytes lost" in (out / "report.md").read_text()


def test_without_a_network_nothing_is_missed(
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepared: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert run(f"input={archive}", f"output={tmp_path / 'out'}", "tasks=5") == 0
    assert result_bytes(tmp_path / "out") == result_bytes(prepared)
    assert "Traceback" not in "".join(capfd.readouterr())


def write_archive(path: Path, pages: list[bytes]) -> Path:
    records = [record(f"https://example.org/{number}", content) for number, content in enumerate(pages)]
    path.write_bytes(b"".join(members(records)))
    return path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["input=/no/such/file.warc.gz"], "input=/no/such/file.warc.gz: no such file"),
        (["input=EMPTY"], "empty file"),
        (["input=TEXT"], "not a WARC file"),
        (["input=DIRECTORY"], "no .warc or .warc.gz file"),
        (["input=*.nothing"], "no .warc"),
        (["imput=sample"], "imput: no such key; did you mean input?"),
        (["tokenizer.vocab=9"], "tokenizer.vocab: no such key; did you mean tokenizer.vocab_size?"),
        (["workers=many"], "workers"),
        (["workers=0"], "workers=0: must be at least 1"),
        (["sample"], "sample: not KEY=VALUE"),
        (["tokenizer.vocab_size=100"], "tokenizer.vocab_size=100: must be in [266"),
        (["tokenizer.vocab_size=65537", "shards.dtype=uint16"], "do not fit shards.dtype=uint16"),
        (["shards.dtype=int8"], "shards.dtype=int8"),
        (["shards.block_tokens=1000"], "power of two"),
        (["shards.val_fraction=1.5"], "shards.val_fraction=1.5"),
        (["quality=[gopher]"], "quality=['gopher']: unknown"),
        (["tokenizer.path=/no/where"], "/no/where"),
        (["name=a.b"], "name="),
        (["input=NOTHING"], "none of 5 pages survived; the filter gopher_repetition took most"),
        (["input=GERMAN", "quality=[]"], "the filter language took most"),
        (["input=DRY"], "0 pages in it"),
        (["output=FILE"], "a file is in the way"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    (tmp_path / "DIRECTORY").mkdir()
    (tmp_path / "EMPTY").touch()
    (tmp_path / "TEXT").write_text("hello")
    (tmp_path / "FILE").write_text("in the way")
    write_archive(tmp_path / "NOTHING", [page(PROSE[: 90 + i]) for i in range(5)])
    write_archive(
        tmp_path / "GERMAN", [page("Die Übersicht über die Änderungen ist für alle Leser wichtig. " * 9)]
    )
    info = b"WARC/1.1\r\nWARC-Type: warcinfo\r\nContent-Length: 2\r\n\r\nab\r\n\r\n"
    (tmp_path / "DRY").write_bytes(gzip.compress(info))
    places = {p.name: str(p) for p in tmp_path.iterdir()}
    real = [
        f"{key}={places.get(value, value)}" if eq else key
        for key, eq, value in (a.partition("=") for a in arguments)
    ]
    if not any(a.startswith("output=") for a in real):
        real.append(f"output={tmp_path / 'out'}")
    if not any(a.startswith(("input=", "imput=")) for a in real):
        texts = [page(f"Number {i} of them all. " + PROSE) for i in range(30)]
        real.append(f"input={write_archive(tmp_path / 'GOOD', texts)}")
    if not any(a.startswith("workers=") for a in real):
        real.append("workers=1")
    assert main(real) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("trivium: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out" / "train").exists()


def test_a_full_disk_stops_it_in_one_line_and_the_rest_is_kept(
    prepared: Path,
    archive: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    expected = result_bytes(out)
    (out / "work" / "dedup.json").unlink()
    real = os.fsync

    def full(handle: int) -> None:
        if "documents.tmp" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run(f"input={archive}", f"output={out}", "tasks=5") == 2
    said = capsys.readouterr().err
    assert "documents.tmp" in said
    assert "no space left" in said
    assert said.count("\n") == 1
    assert not (out / "work" / "dedup.json").exists()
    assert result_bytes(out) == expected  # the old result is still whole
    assert run(f"input={archive}", f"output={out}", "tasks=5") == 0
    assert result_bytes(out) == expected


def test_two_commands_do_not_write_into_one_directory(
    prepared: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    (tmp_path / "out" / "work").mkdir(parents=True)
    with open(tmp_path / "out" / "work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(f"input={archive}", f"output={tmp_path / 'out'}") == 2
    assert "another `trivium data` is writing there" in capsys.readouterr().err


def test_an_existing_tokenizer_can_be_used(prepared: Path, archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    assert (
        run(f"input={archive}", f"output={out}", "tasks=5", f"tokenizer.path={prepared / 'tokenizer'}") == 0
    )
    assert result_bytes(out) == result_bytes(prepared)


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "tokenizer.vocab_size=4096" in said
    assert "workers=null" in said
