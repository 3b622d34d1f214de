import json
import math

import pytest

from trainer.observe.files import LineFile, mend_lines, read_lines, replace_text, to_line
from trainer.observe.loggers import read_metrics
from trainer.observe.secrets import REDACTED, redact


def test_a_file_cut_at_any_byte_gives_its_whole_lines_and_can_be_appended_to(tmp_path):
    file = tmp_path / "metrics.jsonl"
    records = [{"step": step, "text": 'ä{"x"}\n'} for step in range(1, 4)]
    content = "".join(map(to_line, records)).encode()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        file.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        assert read_lines(file) == records[:whole]
        lines = LineFile(file)
        lines.append({"step": 99})
        lines.close()
        assert read_lines(file) == [*records[:whole], {"step": 99}]


def test_a_tail_of_zeros_from_a_lost_machine_is_cut_off(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for tail in (b"\0" * 100, b"\0" * 100 + b"\n"):
        file.write_bytes(b'{"step": 1}\n' + tail)
        assert read_lines(file) == [{"step": 1}]
        assert mend_lines(file) == len(tail)
        assert file.read_bytes() == b'{"step": 1}\n'


def test_mending_a_sound_file_changes_nothing(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert mend_lines(file) == 0
    for content in (b"", b'{"step": 1}\n', b'{"step": 1}\n{"step": 2}\n'):
        file.write_bytes(content)
        assert mend_lines(file) == 0
        assert file.read_bytes() == content


def test_numbers_that_json_lacks_survive(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = LineFile(file)
    lines.append({"step": 1, "train/loss": math.nan, "train/grad_norm": math.inf, "val/loss": -math.inf,
                  "data/batch_hash": "00ff"})  # fmt: skip
    lines.close()
    json.loads(file.read_text(), parse_constant=pytest.fail)  # strict JSON
    (record,) = read_metrics(file)
    assert math.isnan(record["train/loss"])
    assert record["train/grad_norm"] == math.inf
    assert record["val/loss"] == -math.inf
    assert record["data/batch_hash"] == "00ff"
    assert record["step"] == 1


def test_keep_moves_the_rest_aside_and_goes_on_appending(tmp_path):
    lines = LineFile(tmp_path / "metrics.jsonl")
    for step in range(1, 7):
        lines.append({"step": step})
    assert lines.keep(4, tmp_path / "replaced.jsonl") == 2
    lines.append({"step": 5, "again": True})
    assert lines.keep(4, tmp_path / "replaced.jsonl") == 1
    lines.close()
    assert [record["step"] for record in read_lines(lines.path)] == [1, 2, 3, 4]
    assert read_lines(tmp_path / "replaced.jsonl") == [{"step": 5}, {"step": 6}, {"step": 5, "again": True}]


def test_replacing_a_file_keeps_one_of_the_two_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    replace_text(file, "old")
    replace_text(file, "neu: ü")
    assert file.read_text(encoding="utf-8") == "neu: ü"

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_text(file, "newer")
    assert file.read_text(encoding="utf-8") == "neu: ü"
    assert [f.name for f in tmp_path.iterdir()] == ["run.json"]


def test_secrets_are_found_by_key_by_value_and_in_urls(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("MONKEY", "not-a-secret")
    config = {
        "api_key": "x1", "aws_secret_access_key": "x2", "password": "x3", "hf_token": "x4",
        "credentials": "x5", "block_tokens": 5, "max_new_tokens": "many", "eos_token": "</s>",
        "note": "see hf_abcdefgh", "monkey": "not-a-secret",
        "paths": ["s3://user:pw@host/x", "https://host/a@b"], "none": None, "password_file": "/etc/x",
    }  # fmt: skip
    clean = redact(config)
    for key in ("api_key", "aws_secret_access_key", "password", "hf_token", "credentials"):
        assert clean[key] == REDACTED, key
    assert clean["note"] == f"see {REDACTED}"
    assert clean["paths"] == [f"s3://{REDACTED}@host/x", "https://host/a@b"]
    for key in ("block_tokens", "max_new_tokens", "eos_token", "monkey", "none", "password_file"):
        assert clean[key] == config[key], key
