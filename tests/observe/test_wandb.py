"""Real W&B runs, offline, read back with W&B's own reader. Each run in a process of its own, as in life."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.observe.loggers import LoggerConfig, read_metrics
from trainer.observe.metrics import METRICS, for_stage
from trainer.observe.wandb_logger import Spared, choose_mode, has_api_key

ROOT = Path(__file__).parents[2]

# trains FIRST+1 .. LAST of the run at argv[1]; argv[4] = "kill": W&B's service dies half way
TRAIN = """
import json, os, signal, sys
from pathlib import Path
from trainer.observe import wandb_logger
from trainer.observe.loggers import LoggerConfig, make_loggers
from trainer.run import RunDirectory

path, first, last, what, mode = *sys.argv[1:5], sys.argv[6]
first, last, metrics = int(first), int(last), json.loads(sys.argv[5])
wandb_logger.INIT_TIMEOUT_S = 1.0
config = {"steps": 20, "store": {"api_key": "sesame"}}
run = RunDirectory.open(path, config, "pretrain", lineage={"data": "f00d"})
run.resume_from(first)
config = LoggerConfig(wandb=mode, project="test", group="g", tags=["t"], console="plain", every=100)
loggers = make_loggers(config, run, 20, first)
for step in range(first + 1, last + 1):
    if what == "kill" and step == (first + last) // 2:
        for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
            for pid in child.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
    values = {name: step + 0.5 for name in metrics} | {"data/batch_hash": f"{step:016x}"}
    loggers.log(step, step * 4096, values)
    if step % 5 == 0:
        loggers.text(step, "fixed", [{"prompt": "p", "completion": f"c{step}"}])
    if what == "rewind" and step == 8:
        loggers.rewind(5)
        for again in range(6, 9):
            loggers.log(again, again * 4096, {"train/loss": 0.0})
loggers.close(0)
"""


def train(path, first, last, what="", metrics=("train/loss",), mode="offline", **environment):
    keep = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    keep |= {"PYTHONPATH": str(ROOT), "HOME": str(path.parent)}
    return subprocess.run(
        [sys.executable, "-c", TRAIN, str(path), str(first), str(last), what, json.dumps([*metrics]), mode],
        env=keep | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def inspect(directory):
    """All records of an offline run, as `wandb leet inspect --json` tells them."""
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [str(wandb), "leet", "inspect", "--json", str(directory)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def history(records):
    return [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run of two attempts: steps 1-8, then, from the checkpoint of step 5, steps 6-10."""
    path = tmp_path_factory.mktemp("wandb") / "run"
    names = [metric.name.replace("*", "x") for metric in for_stage("pretrain") if metric.chart]
    for first, last in ((0, 8), (5, 10)):
        done = train(path, first, last, metrics=names)
        assert done.returncode == 0, done.stderr
    attempts = [inspect(d) for d in sorted((path / "wandb").glob("offline-run-*"))]
    return path, names, attempts


def test_every_metric_is_there_once_per_step_with_step_and_tokens(resumed):
    path, names, attempts = resumed
    for records, steps in zip(attempts, (range(1, 9), range(6, 11)), strict=True):
        rows = history(records)
        assert [row["_step"] for row in rows] == list(steps)
        for row in rows:
            assert row["tokens"] == row["_step"] * 4096
            for name in names:
                assert row[name] == row["_step"] + 0.5, name
            assert "data/batch_hash" not in row
    assert [record["step"] for record in read_metrics(path / "metrics.jsonl")] == list(range(1, 11))


def test_all_attempts_are_one_run_and_its_config_has_no_secrets(resumed):
    path, _, attempts = resumed
    state = json.loads((path / "run.json").read_text())
    assert len(attempts) == 2
    for records in attempts:
        (opened,) = [record["run"] for record in records if record["type"] == "run"]
        assert opened["run_id"] == state["wandb_id"]
        assert (opened["project"], opened["run_group"], opened["job_type"]) == ("test", "g", "pretrain")
        assert opened["display_name"] == "run"
        assert opened["tags"] == ["t"]
        text = json.dumps(records)
        assert state["run_id"] in text
        assert "f00d" in text  # the lineage
        assert "sesame" not in text
        assert not list(path.rglob("diff.patch"))
        assert records[-1]["exit"].get("exit_code") == 0


def test_tokens_are_the_x_axis_of_everything(resumed):
    _, _, attempts = resumed
    defined = {
        record["metric"].get("name") or record["metric"]["glob_name"]: record["metric"]
        for record in attempts[0]
        if record["type"] == "metric"
    }
    for metric in METRICS:
        if metric.chart and "pretrain" in metric.stages:
            assert defined[metric.name]["step_metric"] == "tokens", metric.name
            assert defined[metric.name].get("summary", {}).get(metric.best), metric.name


def test_samples_are_tables(resumed):
    path, _, attempts = resumed
    rows = [row for row in history(attempts[1]) if "samples/fixed._type" in row or "samples/fixed" in row]
    assert [row["_step"] for row in rows] == [10]
    tables = list(path.glob("wandb/offline-run-*/files/media/table/samples/*.table.json"))
    contents = [json.loads(table.read_text()) for table in tables]
    assert {"columns": ["prompt", "completion"], "data": [["p", "c10"]]}.items() <= max(
        contents, key=lambda table: table["data"][0][1] == "c10"
    ).items()


def test_when_the_service_dies_it_is_told_once_and_training_goes_on(tmp_path):
    done = train(tmp_path / "run", 0, 200, "kill")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = [line for line in done.stdout.splitlines() if "stopped logging" in line]
    assert len(told) == 1
    assert "metrics.jsonl has every step" in told[0]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 200


def test_without_a_connection_an_online_run_goes_on_offline(tmp_path):
    key = "0" * 40
    done = train(tmp_path / "run", 0, 5, mode="auto", WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "no connection" in done.stdout
    assert key not in done.stdout + done.stderr
    (directory,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert [row["_step"] for row in history(inspect(directory))] == [1, 2, 3, 4, 5]


def test_after_going_back_replayed_steps_are_not_sent_twice(tmp_path):
    done = train(tmp_path / "run", 0, 10, "rewind")
    assert done.returncode == 0, done.stderr
    (directory,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert [row["_step"] for row in history(inspect(directory))] == list(range(1, 11))
    assert [r["train/loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")][4:9] == [
        5.5,
        0.0,
        0.0,
        0.0,
        9.5,
    ]


def test_auto_is_online_only_with_a_key(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (has_api_key(), choose_mode(LoggerConfig())) == (False, "offline")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert (has_api_key(), choose_mode(LoggerConfig())) == (True, "online")
    assert choose_mode(LoggerConfig(wandb="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode(LoggerConfig()) == "disabled"
    (tmp_path / ".netrc").write_text("rubbish {")
    monkeypatch.delenv("WANDB_MODE")
    assert choose_mode(LoggerConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert choose_mode(LoggerConfig()) == "online"


def test_our_own_mistakes_are_not_taken_for_those_of_wandb():
    told = []
    with pytest.raises(KeyError), Spared(told.append):
        raise KeyError("ours")
    assert told == []
    with Spared(told.append):
        raise BrokenPipeError("theirs")
    assert len(told) == 1
