import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.changes import compare, refuse
from trainer.errors import UserError
from trainer.observe.files import explained, read_lines, replace_text, to_line
from trainer.observe.loggers import read_metrics
from trainer.run import RunDirectory, config_hash

CONFIG = {
    "run_dir": "runs/a", "steps": 100, "seed": 7, "seq_len": 128, "global_batch": 8, "micro_batch": 2,
    "init_from": None,
    "model": {"hidden_size": 64, "rope_scaling": None, "attention": "sdpa"},
    "optim": {"lr": 1e-05, "betas": [0.9, 0.95]},
    "data": {"sources": {"web": {"path": "/w", "weight": 0.7}}, "shuffle_blocks": 16, "weight_schedule": []},
}  # fmt: skip


def changed(**values):
    """CONFIG with dotted keys replaced: changed(model__hidden_size=128)."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in values.items():
        *parents, leaf = key.split("__")
        room = config
        for parent in parents:
            room = room[parent]
        room[leaf] = value
    return config


def launch(path, config=CONFIG, **options):
    run = RunDirectory.open(path, config, options.pop("stage", "pretrain"), **options)
    run.close()
    return run


def write_metrics(run, steps):
    run.metrics_file.write_text(
        "".join(to_line({"step": s, "tokens": s * 10, "train/loss": 1.0 / s}) for s in steps)
    )


def test_a_new_run_has_its_config_its_identity_and_its_first_attempt(tmp_path):
    run = launch(tmp_path / "runs" / "a", lineage={"data": "f00"}, world=4)
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
    state = json.loads((run.path / "run.json").read_text())
    assert state == run.state
    assert (run.attempt, run.resumed, run.is_done, run.stage, run.name) == (1, False, False, "pretrain", "a")
    assert state["lineage"] == {"data": "f00"}
    assert state["attempts"][0]["world"] == 4
    assert state["attempts"][0]["versions"]["torch"]
    assert run.log_dir.is_dir()
    assert run.checkpoints.is_dir()
    assert not list(run.path.glob("*.tmp")) + list(run.path.glob(".*.tmp"))


def test_the_second_start_is_a_resume_with_the_same_ids(tmp_path):
    first = launch(tmp_path / "a")
    second = launch(tmp_path / "a")
    assert (second.attempt, second.resumed, second.changes) == (2, True, [])
    assert (second.run_id, second.wandb_id) == (first.run_id, first.wandb_id)
    assert second.log_dir.name == "attempt-2"
    assert not list(second.path.glob("config-attempt-*"))
    other = launch(tmp_path / "b")
    assert other.run_id != first.run_id
    assert other.wandb_id != first.wandb_id


def test_allowed_changes_are_announced_and_the_older_configs_kept(tmp_path):
    launch(tmp_path / "a")
    launch(tmp_path / "a")
    third = launch(tmp_path / "a", changed(steps=200, optim__lr=2e-5, model__attention="flex"))
    assert third.describe()[1:] == [
        "  changed  steps: 100 -> 200",
        "  changed  model.attention: sdpa -> flex",
        "  changed  optim.lr: 1e-05 -> 2e-05",
    ]
    assert third.state["attempts"][2]["changes"][0] == "steps: 100 -> 200"
    assert yaml.safe_load((third.path / "config.yaml").read_text())["steps"] == 200
    assert yaml.safe_load((third.path / "config-attempt-2.yaml").read_text()) == CONFIG
    launch(tmp_path / "a", changed(steps=300))
    assert yaml.safe_load((third.path / "config-attempt-3.yaml").read_text())["optim"]["lr"] == 2e-5


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("seed", "7", 8),
        ("seq_len", "128", 256),
        ("global_batch", "8", 16),
        ("model__hidden_size", "64", 128),
        ("data__shuffle_blocks", "16", 32),
        ("data__sources__web__weight", "0.7", 0.5),
        ("model__rope_scaling", "null", {"kind": "llama3", "factor": 8.0}),
    ],
)
def test_a_change_that_would_make_it_another_run_is_refused_and_nothing_is_touched(tmp_path, key, old, new):
    run = launch(tmp_path / "a")
    before = {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()}
    with pytest.raises(UserError) as error:
        launch(tmp_path / "a", changed(**{key: new}))
    text = str(error.value)
    assert key.replace("__", ".") in text
    assert f"was started with {old} " in text or isinstance(new, dict)
    assert "put the value back, or choose another run_dir" in text
    assert {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()} == before


def test_keys_that_a_newer_version_of_the_code_added_or_dropped_are_announced_not_refused(tmp_path):
    launch(tmp_path / "a")
    config = changed(model__qk_norm=False)
    del config["model"]["hidden_size"]
    assert [str(c) for c in launch(tmp_path / "a", config).changes] == [
        "model.qk_norm: (not set) -> false",
        "model.hidden_size: 64 -> (not set)",
    ]


def test_equal_configs_have_no_changes_whatever_their_number_type():
    assert compare({"a": 1, "b": [1, 2], "c": float("nan")}, {"a": 1.0, "b": [1, 2], "c": float("nan")}) == []
    refuse("runs/a", [])


def test_a_run_directory_belongs_to_one_stage(tmp_path):
    launch(tmp_path / "a")
    with pytest.raises(UserError, match=r"holds a pretrain run, not sft.*init_from="):
        launch(tmp_path / "a", stage="sft")


def test_other_inputs_are_refused_by_digest_and_new_digests_added(tmp_path):
    launch(tmp_path / "a", lineage={"data": "f00"})
    run = launch(tmp_path / "a", lineage={"data": "f00", "tokenizer": "aa"})
    assert run.lineage == {"data": "f00", "tokenizer": "aa"}
    with pytest.raises(UserError, match=r"training data is not what this run has read.*f00.*is bad"):
        launch(tmp_path / "a", lineage={"data": "bad"})
    with pytest.raises(UserError, match="same text would become other ids"):
        run.add_lineage(tokenizer="bb")
    assert launch(tmp_path / "a").lineage == {"data": "f00", "tokenizer": "aa"}


def test_all_ranks_get_the_outcome_of_rank_0_be_it_a_state_or_an_error(tmp_path):
    sent = []

    def from_rank_0(value):
        sent.append(json.loads(json.dumps(value)))  # what a broadcast can carry
        return value

    first = RunDirectory.open(tmp_path / "a", CONFIG, "pretrain", 0, {}, share=from_rank_0)
    other = RunDirectory.open(tmp_path / "a", CONFIG, "pretrain", 1, {}, share=lambda _: sent[-1])
    assert (other.run_id, other.attempt, other.log_dir) == (first.run_id, 1, first.log_dir)
    RunDirectory.open(tmp_path / "a", changed(steps=7), "pretrain", 0, {}, share=from_rank_0).close()
    other = RunDirectory.open(tmp_path / "a", changed(steps=7), "pretrain", 1, {}, share=lambda _: sent[-1])
    assert [str(change) for change in other.changes] == ["steps: 100 -> 7"]
    with pytest.raises(UserError) as on_0:
        RunDirectory.open(tmp_path / "a", changed(seed=8), "pretrain", 0, {}, share=from_rank_0)
    with pytest.raises(UserError) as on_1:
        RunDirectory.open(tmp_path / "a", changed(seed=8), "pretrain", 1, {}, share=lambda _: sent[-1])
    assert str(on_0.value) == str(on_1.value)


def test_other_ranks_write_nothing(tmp_path):
    run = launch(tmp_path / "a")
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    other = RunDirectory.open(tmp_path / "a", changed(steps=5), "pretrain", 3)
    other.resume_from(10)
    other.mark_done(5)
    other.add_lineage(data="x")
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before


def test_steps_that_will_be_trained_again_leave_the_metrics_and_are_kept_aside(tmp_path):
    run = launch(tmp_path / "a")
    write_metrics(run, range(1, 16))
    run.samples_file.write_text(
        to_line({"step": 5, "name": "s", "row": {}}) + to_line({"step": 15, "name": "s", "row": {}})
    )
    run = launch(tmp_path / "a")
    assert run.resume_from(10) == 5
    assert [record["step"] for record in read_metrics(run.metrics_file)] == list(range(1, 11))
    assert [record["step"] for record in read_metrics(run.log_dir / "replaced-metrics.jsonl")] == list(
        range(11, 16)
    )
    assert [record["step"] for record in read_lines(run.samples_file)] == [5]
    assert json.loads((run.path / "run.json").read_text())["attempts"][1]["from_step"] == 10
    assert run.truncate_metrics(10) == 0


def test_a_line_torn_by_a_kill_is_cut_off_when_the_run_goes_on(tmp_path):
    run = launch(tmp_path / "a")
    write_metrics(run, range(1, 4))
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 4, "tok')
    assert len(read_metrics(run.metrics_file)) == 3
    run.truncate_metrics(3)
    assert run.metrics_file.read_text().endswith("}\n")
    assert [record["step"] for record in read_metrics(run.metrics_file)] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named_not_dropped(tmp_path):
    run = launch(tmp_path / "a")
    run.metrics_file.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not JSON"):
        run.truncate_metrics(1)


def test_done_is_for_the_steps_asked_for_and_more_steps_reopen_the_run(tmp_path):
    run = launch(tmp_path / "a")
    assert not run.is_done
    run.mark_done(100)
    assert run.is_done
    assert launch(tmp_path / "a").is_done
    longer = launch(tmp_path / "a", changed(steps=200))
    assert not longer.is_done
    assert not (longer.path / "DONE").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', '{"format": "trivium-run-1"}'])
def test_an_unreadable_or_foreign_run_json_is_one_line(tmp_path, content):
    run = launch(tmp_path / "a")
    (run.path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json: .*choose another run_dir"):
        launch(tmp_path / "a")
    assert (run.path / "run.json").read_text() == content


@pytest.mark.parametrize("content", ["a: [", "42", "\x00"])
def test_an_unreadable_config_is_one_line(tmp_path, content):
    run = launch(tmp_path / "a")
    (run.path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml: .*choose another run_dir"):
        launch(tmp_path / "a")


def test_a_directory_with_other_things_in_it_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not empty.*thesis\.tex"):
        launch(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["thesis.tex"]


def test_a_directory_prepared_by_a_submit_script_is_taken(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert launch(tmp_path).attempt == 1


@pytest.mark.parametrize("lost", ["config.yaml", "checkpoints", "logs"])
def test_a_start_cut_short_can_be_started_again(tmp_path, lost):
    run = launch(tmp_path / "a")
    state = json.loads((run.path / "run.json").read_text()) | {"attempts": []}
    (run.path / "run.json").write_text(json.dumps(state))
    target = run.path / lost
    if target.is_dir():
        for child in target.iterdir():
            child.rmdir()
        target.rmdir()
    else:
        target.unlink()
    again = launch(tmp_path / "a")
    assert (again.attempt, again.run_id) == (1, run.run_id)


def test_a_path_through_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match="choose another run_dir"):
            launch(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_no_space_or_permission_is_one_line_and_leaves_the_old_file_whole(tmp_path, monkeypatch, number):
    file = tmp_path / "run.json"
    replace_text(file, "old")

    def refuse_write(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse_write)
    with pytest.raises(UserError, match=r"run\.json: .*run_dir"):
        replace_text(file, "new")
    assert file.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_is_one_line():
    full = open("/dev/full", "w")  # noqa: SIM115
    full.write("x")
    with pytest.raises(UserError, match=r"no space left.*choose another run_dir"), explained("/dev/full"):
        full.flush()
    with contextlib.suppress(OSError):  # the text that could not be written is still in the buffer
        full.close()


HOLD = """
import sys; from trainer.run import RunDirectory; import json
run = RunDirectory.open(sys.argv[1], json.loads(sys.argv[2]), "pretrain")
print("open", flush=True); sys.stdin.readline()
"""


def test_a_second_launch_of_a_running_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "a"), json.dumps(CONFIG)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=rf"in use by pid {holder.pid} on"):
            launch(tmp_path / "a")
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    assert launch(tmp_path / "a").attempt == 2


def test_secrets_do_not_reach_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    config = changed() | {
        "store": {"url": "s3://me:hunter22@host/bucket", "api_key": "k-123", "block_tokens": 5},
        "note": "key is 0123456789abcdef0123",
    }
    run = launch(tmp_path / "a", config)
    written = "".join(file.read_text() for file in run.path.rglob("*") if file.is_file())
    assert "hunter22" not in written
    assert "k-123" not in written
    assert "0123456789abcdef0123" not in written
    assert yaml.safe_load((run.path / "config.yaml").read_text())["store"]["block_tokens"] == 5
    assert launch(tmp_path / "a", config).changes == []


def test_the_config_hash_sees_every_value_and_no_order():
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert config_hash(CONFIG) != config_hash(changed(optim__lr=1.0001e-05))
