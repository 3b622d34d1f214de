"""A user's mistake: one line that names the key or file and the fix, exit code 2, no traceback, nothing
written.
"""

import json
import shutil
from pathlib import Path

import pytest
from commands import tiny, trivium


def assert_one_line(result, *parts: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0], lines[0]


MISTAKES = {
    "unknown key": (["stepz=3"], ["stepz", "did you mean steps?"]),
    "unknown nested key": (["optim.lrr=3"], ["optim.lrr", "did you mean optim.lr?"]),
    "wrong type": (["steps=many"], ["steps", "many"]),
    "not key=value": (["--steps=3"], ["--steps=3"]),
    "unknown model": (["model=gpt9"], ["model/gpt9", "tiny"]),
    "unknown engine": (["engine=zero7"], ["engine/zero7", "zero3"]),
    "batch": (["global_batch=7"], ["global_batch=7", "micro_batch=2"]),
    "heads": (["model.num_heads=5"], ["model.num_heads=5"]),
    "seq_len beyond the model": (["seq_len=4096"], ["seq_len=4096", "model.max_seq_len"]),
    "seq_len that does not divide": (["seq_len=48"], ["seq_len=48", "2048"]),
    "vocabulary too small": (["model.vocab_size=64"], ["the model has 64", "set model.vocab_size=320"]),
    "schedule": (["schedule.kind=cosinus"], ["schedule.kind=cosinus", "cosine"]),
    "warm-up": (["schedule.warmup_steps=6"], ["schedule.warmup_steps=6", "steps=6"]),
    "device": (["engine.device=tpu"], ["engine.device=tpu"]),
    "missing data": (["data.train=/no/such/place"], ["/no/such/place"]),
    "init_from": (["init_from=/no/such/run"], ["/no/such/run"]),
    "sampling": (["sample.temperature=-1"], ["sample.temperature=-1"]),
    "retention": (["checkpoint.keep_last=1"], ["checkpoint.keep_last=1"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_on_the_command_line(dataset, tmp_path, name):
    overrides, parts = MISTAKES[name]
    result = trivium("pretrain", *tiny(dataset, tmp_path / "run"), *overrides)
    assert_one_line(result, *parts)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def broken(dataset, tmp_path) -> Path:
    """A copy of the data set to harm."""
    return shutil.copytree(dataset, tmp_path / "data")


def test_missing_shard(broken, tmp_path):
    shard = next((broken / "train").glob("*.tar"))
    shard.unlink()
    assert_one_line(trivium("pretrain", *tiny(broken, tmp_path / "run")), shard.name)
    assert not (tmp_path / "run").exists()


def test_truncated_shard(broken, tmp_path):
    shard = next((broken / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    assert_one_line(trivium("pretrain", *tiny(broken, tmp_path / "run")), shard.name, "bytes")


def test_index_of_another_tokenizer(broken, tmp_path):
    index = broken / "train" / "index.json"
    content = json.loads(index.read_text())
    content["tokenizer_sha256"] = "0" * 64
    index.write_text(json.dumps(content))
    assert_one_line(trivium("pretrain", *tiny(broken, tmp_path / "run")), "another tokenizer", "000000")


def test_checkpoint_without_marker(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step-00000005"
    path.mkdir(parents=True)
    (path / "ranges.json").write_text("{}")
    assert_one_line(trivium("chat", str(path), "--prompt", "x"), "step-00000005", "COMMITTED")
    assert_one_line(trivium("chat", str(tmp_path / "run"), "--prompt", "x"), "no committed checkpoint")


def test_commands(tmp_path):
    assert_one_line(trivium("pretrian"), "pretrian", "pretrain")
    overview = trivium()
    assert overview.returncode == 0
    assert "trivium pretrain" in overview.stdout
    shown = trivium("pretrain", "--help")
    assert shown.returncode == 0
    assert "micro_batch=8" in shown.stdout
    assert "llama_8b" in shown.stdout
