"""The commands that let a user check the promises: verify, parity, replay, checkpoints; in real processes."""

import json
import shutil

import pytest
from commands import metrics, tiny, trivium
from crashes import CrashServer
from test_mistakes import assert_one_line

from trainer import trials
from trainer.run import RunDirectory
from trainer.trials import Point


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A finished run with checkpoints at steps 2, 4 and 6 kept."""
    directory = tmp_path_factory.mktemp("proofs") / "run"
    arguments = tiny(dataset, directory, "checkpoint.every=2", "checkpoint.keep_last=3")
    result = CrashServer().attempt(arguments, 1, directory.with_suffix(".log"))
    assert result.codes == [0], result.output
    return directory


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_verify_kills_a_run_and_resumes_it_on_the_other_engine(run, tmp_path):
    before = sorted(path.name for path in run.rglob("*"))
    result = trivium("verify", str(run), "--steps", "4", "--keep", str(tmp_path / "kept"), COLUMNS="200")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "SAME: fsdp x1, killed after step 2, resumed from step" in result.stdout
    assert "zero3 x2" in result.stdout
    assert json.loads((tmp_path / "kept" / "verify.json").read_text())["same"]
    lines = metrics(tmp_path / "kept" / "killed")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["run/attempt"] == 2
    # The learning rates are those of the run itself: its schedule was not shortened to four steps.
    assert [line["train/lr"] for line in lines] == [line["train/lr"] for line in metrics(run)[:4]]
    assert sorted(path.name for path in run.rglob("*")) == before


def test_verify_says_where_two_curves_part():
    one = [Point(1, 5.0, 1.0, "a"), Point(2, 4.0, 1.0, "b")]
    assert trials.first_difference(one, one, 1e-5) == ""
    assert "2 of them" in trials.first_difference(one[:1], one, 1e-5)
    assert (
        trials.first_difference([one[0], Point(2, 4.0, 1.0, "c")], one, 1e-5)
        == "step 2: another batch (c, b)"
    )
    assert "step 2: loss 4.001 and 4, 2.5e-04" in trials.first_difference(
        [one[0], Point(2, 4.001, 1, "b")], one, 1e-5
    )
    assert "gradient norm" in trials.first_difference([Point(1, 5.0, float("nan"), "a"), one[1]], one, 1e-5)


def test_verify_fails_when_the_resumed_run_is_another_one(run, tmp_path, monkeypatch):
    """The comparison is not a formality: the resumed part gets another learning rate."""
    from trainer import verify

    original = verify.run_trial

    def meddle(stage, values, ranks, kill_at=0, tick=lambda n: None):
        if values["run_dir"].endswith("killed") and not kill_at:
            values = trials.with_changes(values, {"optim.lr": 1e-2})
        return original(stage, values, ranks, kill_at, tick)

    monkeypatch.setattr(verify, "run_trial", meddle)
    arguments = [str(run), "--steps", "4", "--resume-ranks", "1", "--resume-engine", "fsdp"]
    assert verify.main([*arguments, "--keep", str(tmp_path)]) == 1
    assert ": loss " in json.loads((tmp_path / "verify.json").read_text())["problem"]


def test_parity_compares_engines_with_a_plain_loop(dataset, tmp_path):
    arguments = tiny(dataset, tmp_path / "unused", "micro_batch=3")
    options = ["--engines", "zero2", "--ranks", "2,3", "--steps", "3"]
    result = trivium("parity", *arguments, *options, COLUMNS="200")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("same") == 2  # the plain loop and two ranks
    assert result.stdout.count("cannot run: global_batch=12") == 1  # three ranks of three rows do not divide
    assert "all agree with the plain loop within 1e-05" in result.stdout
    assert not (tmp_path / "unused").exists()


def test_replay_runs_a_step_again_and_shows_its_documents(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = trivium("replay", str(run), "--step", "6", "--rows", "3", COLUMNS="200")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checkpoints/step-00000004" in result.stdout
    assert "metrics.jsonl: the same" in result.stdout
    line = metrics(run)[5]
    assert f"samples {line['data/first_sample']}..{line['data/samples'] - 1}" in result.stdout
    assert line["data/batch_hash"] in result.stdout
    assert "block" in result.stdout
    assert "9 more rows with lower loss" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_replay_of_a_line_that_does_not_fit_says_so(copy):
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["train/loss"] += 0.01
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = trivium("replay", str(copy), "--step", "6", COLUMNS="200")
    assert result.returncode == 1
    assert "metrics.jsonl: differs" in result.stdout


def test_checkpoints_are_listed_verified_and_pruned(copy):
    listed = trivium("checkpoints", str(copy), "--verify", "--json")
    content = json.loads(listed.stdout)
    assert [(c["step"], c["verdict"], c["written_by"]) for c in content["checkpoints"]] == [
        (step, "whole", "fsdp x1") for step in (2, 4, 6)
    ]
    assert content["resume_from"] == 6
    assert "a resume would go on from step 6" in trivium("checkpoints", str(copy)).stdout

    victim = copy / "checkpoints" / "step-00000006" / "rank-00000.bin"
    data = victim.read_bytes()
    victim.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    damaged = trivium("checkpoints", str(copy), "--verify", COLUMNS="200")
    assert damaged.returncode == 1
    assert "rank-00000.bin does not have the content that was committed" in damaged.stdout
    assert "a resume would go on from step 4" in damaged.stdout
    victim.write_bytes(data)

    pruned = trivium("checkpoints", str(copy), "--prune", "2", "--json")
    assert json.loads(pruned.stdout)["removed"] == [2]
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_checkpoints_of_a_run_that_goes_on_are_not_pruned(copy):
    import yaml

    config = yaml.safe_load((copy / "config.yaml").read_text())
    held = RunDirectory.open(copy, config, "pretrain")
    try:
        assert_one_line(trivium("checkpoints", str(copy), "--prune", "2"), "the run is going on")
    finally:
        held.close()


def test_mistakes(run, dataset, tmp_path):
    assert_one_line(trivium("verify", "/no/such/run"), "/no/such/run/run.json", "give a run directory")
    assert_one_line(
        trivium("verify", str(run), "--resume-ranks", "5"), "--resume-ranks 5", "use --resume-ranks 3"
    )
    assert_one_line(trivium("verify", str(run), "--steps", "1"), "--steps 1")
    assert_one_line(trivium("parity", str(run), "--engines", "zero9"), "--engines zero9", "zero3")
    assert_one_line(trivium("parity", str(run), "--ranks", "x"), "--ranks x")
    assert_one_line(trivium("replay", str(tmp_path), "--step", "3"), "run.json", "not a run directory")
    assert_one_line(trivium("replay", str(run), "--step", "0"), "--step 0")
    assert_one_line(trivium("checkpoints", str(tmp_path)), "no such directory")
    assert_one_line(trivium("checkpoints", str(run), "--prune", "1"), "--prune 1")
    assert_one_line(trivium("pretrain", *tiny(dataset, tmp_path / "r"), "stop_after=0"), "stop_after=0")


def test_stopping_again_where_a_run_stopped_changes_nothing(dataset, tmp_path):
    """Also with stop_after at or below what is done: nothing to train, nothing to save, no error."""
    server, run = CrashServer(), tmp_path / "run"
    for stop in ("stop_after=3", "stop_after=3", "stop_after=2"):
        result = server.attempt(tiny(dataset, run, stop), 1, tmp_path / "log")
        assert result.codes == [75], result.output
        assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    assert "stopped by stop_after after step 3 of 6" in result.output
