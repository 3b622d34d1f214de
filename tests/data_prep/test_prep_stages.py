"""Manifests: what is finished is skipped, whatever changed is done again, what is half written does not
count.
"""

import errno
import json
import os
from pathlib import Path

import pytest

from data_prep.files import atomic_file, disk_errors, fingerprint, jsonl_writer, read_jsonl, require_space
from data_prep.stages import Stage, input_prints
from trainer.errors import UserError


class Counted:
    """A stage's work that counts its calls and writes one file."""

    def __init__(self, target: Path):
        self.target = target
        self.calls = 0

    def __call__(self) -> dict:
        self.calls += 1
        self.target.write_text(f"result {self.calls}")
        return {"value": self.calls}


def make(tmp_path: Path, key: dict) -> Stage:
    return Stage("step", tmp_path / "work", key, [tmp_path / "out.txt"])


def test_a_finished_stage_is_skipped_and_a_changed_one_is_not(tmp_path: Path) -> None:
    work = Counted(tmp_path / "out.txt")
    assert make(tmp_path, {"a": 1}).run(work)["value"] == 1
    again = make(tmp_path, {"a": 1}).run(work)
    assert again["skipped"]
    assert (again["value"], work.calls) == (1, 1)
    assert make(tmp_path, {"a": 2}).why_again() == "a"
    assert make(tmp_path, {"a": 2}).run(work)["value"] == 2
    assert make(tmp_path, {"a": 1}).finished() is None


def test_a_copied_output_is_the_same_output(tmp_path: Path) -> None:
    work = Counted(tmp_path / "out.txt")
    make(tmp_path, {}).run(work)
    os.utime(tmp_path / "out.txt", (1, 1))
    assert make(tmp_path, {}).run(work)["skipped"]


def test_changed_or_missing_output_is_made_again(tmp_path: Path) -> None:
    work = Counted(tmp_path / "out.txt")
    make(tmp_path, {}).run(work)
    (tmp_path / "out.txt").write_text("touched by hand")
    assert make(tmp_path, {}).why_again() == "outputs missing or changed"
    make(tmp_path, {}).run(work)
    (tmp_path / "out.txt").unlink()
    make(tmp_path, {}).run(work)
    assert work.calls == 3


def test_a_stage_that_fails_leaves_no_manifest(tmp_path: Path) -> None:
    def fail() -> dict:
        (tmp_path / "out.txt").write_text("half")
        raise RuntimeError("killed")

    work = Counted(tmp_path / "out.txt")
    make(tmp_path, {}).run(work)
    with pytest.raises(RuntimeError):
        make(tmp_path, {"a": 3}).run(fail)
    assert make(tmp_path, {"a": 3}).finished() is None
    assert make(tmp_path, {}).finished() is None  # its output is gone as well
    assert make(tmp_path, {"a": 3}).run(work)["value"] == 2


def test_inputs_are_known_by_content_not_by_name(tmp_path: Path) -> None:
    path, cache = tmp_path / "in.warc", tmp_path / "work" / "inputs.json"
    path.write_bytes(b"one")
    first = input_prints([path], cache)
    assert input_prints([path], cache) == first
    path.write_bytes(b"two")
    assert input_prints([path], cache) != first


def test_the_hash_is_not_read_again_while_size_and_time_agree(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    known = fingerprint(path) | {"xxh3": "remembered"}
    assert fingerprint(path, known)["xxh3"] == "remembered"
    assert fingerprint(path, known | {"bytes": 9})["xxh3"] != "remembered"


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"

    def half(path: Path) -> None:
        with jsonl_writer(path) as out:
            out.write({"a": 1})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half(path)
    assert list(tmp_path.iterdir()) == []
    rows = [{"a": "line\nbreak"}, {"b": "\ud800 lone"}, {"c": "中文" * 9999}]
    with jsonl_writer(path) as out:
        for row in rows:
            out.write(row)
    assert [list(row) for row in read_jsonl(path)] == [["a"], ["b"], ["c"]]
    assert next(read_jsonl(path)) == rows[0]


def test_a_full_disk_is_one_line_that_names_path_and_need(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"rows.*no space left.*1.5 MB needed"),
        disk_errors(tmp_path / "rows", 1_500_000),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match="not writable"), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file")
    with pytest.raises(UserError, match="needed"):
        require_space(tmp_path, 10**18)


def test_a_really_full_device_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "big"
    (tmp_path / "big.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="no space left"), atomic_file(target) as file:
        file.write(b"x" * (1 << 20))
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
