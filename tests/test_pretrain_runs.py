"""Whole pretraining runs: every launcher and engine gives the same curve, and a stopped run goes on as if it
had not been.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from commands import REPOSITORY, assert_same_curve, curve, environment, metrics, tiny, trivium
from ranks import free_port

ACCELERATE = REPOSITORY / "configs" / "accelerate"


def start(launcher: list[str], arguments: list[str], **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def torchrun(world: int) -> list[str]:
    return [
        "torch.distributed.run",
        f"--nproc_per_node={world}",
        f"--master_port={free_port()}",
        "-m",
        "trainer.pretrain",
    ]


def accelerate(name: str) -> list[str]:
    return [
        "accelerate.commands.launch",
        f"--config_file={ACCELERATE / name}.yaml",
        f"--main_process_port={free_port()}",
        "-m",
        "trainer.pretrain",
    ]


@pytest.fixture(scope="session")
def unbroken(dataset, tmp_path_factory):
    """The run that all others are compared with: one plain process, engine=fsdp."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    result = trivium("pretrain", *tiny(dataset, run))
    assert result.returncode == 0, result.stderr
    return run


def test_a_run_leaves_its_whole_story(unbroken):
    assert json.loads((unbroken / "DONE").read_text())["step"] == 6
    found = metrics(unbroken)
    assert [m["step"] for m in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["tokens"] == 6 * 12 * 64
    for line in found:
        parts = sum(
            v
            for k, v in line.items()
            if k.startswith("speed/") and k.endswith("_s") and k not in ("speed/step_s", "speed/tokens_per_s")
        )
        assert parts == pytest.approx(line["speed/step_s"], rel=1e-9)
    assert (unbroken / "checkpoints" / "step-00000006" / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"])
def test_accelerate_launch_on_two_ranks(dataset, unbroken, tmp_path, name):
    run = tmp_path / name
    finish(start(accelerate(name), tiny(dataset, run)))
    assert_same_curve(curve(run), curve(unbroken))
    assert f"kind: {name}" in (run / "config.yaml").read_text()


def test_torchrun_and_python_m(dataset, unbroken, tmp_path):
    finish(start(torchrun(2), tiny(dataset, tmp_path / "torchrun", "engine=zero0")))
    assert_same_curve(curve(tmp_path / "torchrun"), curve(unbroken))
    finish(start(["trainer.pretrain"], tiny(dataset, tmp_path / "module", "micro_batch=6", "engine=zero1")))
    assert_same_curve(curve(tmp_path / "module"), curve(unbroken))


def test_accelerate_against_an_explicit_engine_is_refused(dataset, tmp_path):
    process = start(accelerate("zero3"), tiny(dataset, tmp_path / "run", "engine=fsdp"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "engine=fsdp: but accelerate's config file starts zero3" in output
    assert "trainer/" not in output.split("ChildFailedError")[0]  # no traceback of ours
    assert not (tmp_path / "run").exists()


STOPS = [  # first attempt, second attempt: other engine, other world size
    (["trainer.pretrain"], ["engine=fsdp"], lambda: torchrun(2), ["engine=zero3"]),
    (None, ["engine=zero2"], lambda: ["trainer.pretrain"], ["engine=fsdp"]),
]


@pytest.mark.parametrize(
    ("first", "first_engine", "second", "second_engine"), STOPS, ids=["fsdp1-zero3x2", "zero2x2-fsdp1"]
)
def test_sigterm_at_any_step_then_the_same_command_on_another_engine(
    dataset, unbroken, tmp_path, first, first_engine, second, second_engine
):
    run = tmp_path / "run"
    process = start(first or torchrun(2), tiny(dataset, run, *first_engine, "steps=6"))
    wait_for_steps(run, 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    done = [m["step"] for m in metrics(run)]
    assert process.returncode != 0, output
    assert not (run / "DONE").exists()
    assert 2 <= done[-1] < 6, output
    assert (run / "checkpoints" / f"step-{done[-1]:08d}" / "COMMITTED").exists()
    assert "the same command goes on" in output
    output = finish(start(second(), tiny(dataset, run, *second_engine)))
    assert f"going on from {run}/checkpoints/step-{done[-1]:08d}" in output
    assert_same_curve(curve(run), curve(unbroken))


def wait_for_steps(run, count: int, process: subprocess.Popen) -> None:
    """Until `count` steps are logged; then the process is slowed, so that the signal comes before it is
    done.
    """
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(metrics_so_far(run)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def metrics_so_far(run) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().split("\n")[:-1] if "train/loss" in line]


@pytest.mark.parametrize("world", [1, 2])
def test_kill_9_resumes_from_the_last_checkpoint_with_the_same_numbers(dataset, unbroken, tmp_path, world):
    run = tmp_path / "run"
    arguments = tiny(dataset, run, "checkpoint.every=2")
    process = start(["trainer.pretrain"], arguments, start_new_session=True)
    wait_for_steps(run, 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    output = finish(start(["trainer.pretrain"] if world == 1 else torchrun(world), arguments))
    assert "attempt 2" in output
    assert_same_curve(curve(run), curve(unbroken))


def test_a_finished_run_says_so_and_goes_on_when_steps_are_raised(dataset, tmp_path):
    run = tmp_path / "run"
    constant = ["schedule=constant", "schedule.warmup_steps=0"]  # a schedule that does not depend on `steps`
    assert trivium("pretrain", *tiny(dataset, run, *constant, "steps=2")).returncode == 0
    again = trivium("pretrain", *tiny(dataset, run, *constant, "steps=2"))
    assert again.returncode == 0
    assert "2 steps are done; raise steps to go on" in again.stdout
    assert trivium("pretrain", *tiny(dataset, run, *constant, "steps=4")).returncode == 0
    assert trivium("pretrain", *tiny(dataset, tmp_path / "whole", *constant, "steps=4")).returncode == 0
    assert_same_curve(curve(run), curve(tmp_path / "whole"))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(dataset, unbroken, tmp_path):
    run = tmp_path / "run"
    assert trivium("pretrain", *tiny(dataset, run, "checkpoint.every=4")).returncode == 0
    (run / "DONE").unlink()
    (run / "checkpoints" / "step-00000006" / "__0_0.distcp").write_bytes(b"")
    result = trivium("pretrain", *tiny(dataset, run, "checkpoint.every=4"))
    assert result.returncode == 0, result.stderr
    assert "damaged checkpoint left out" in result.stdout
    assert "step-00000006/__0_0.distcp has 0 bytes" in result.stdout
    assert_same_curve(curve(run), curve(unbroken))


def test_init_from_takes_weights_and_architecture_only(dataset, unbroken, tmp_path):
    run = tmp_path / "run"
    arguments = [
        a for a in tiny(dataset, run, f"init_from={unbroken}", "steps=3") if not a.startswith("model")
    ]
    result = trivium("pretrain", *arguments)
    assert result.returncode == 0, result.stderr
    assert curve(run)[0][1] < curve(unbroken)[2][1]  # starts from what was learnt
    assert metrics(run)[0]["step"] == 1
    refused = trivium("pretrain", *arguments, "model.num_layers=3", f"run_dir={tmp_path / 'other'}")
    assert refused.returncode == 2
    assert "model.num_layers=3, but init_from=" in refused.stderr


def test_export_and_chat(unbroken, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.load import load_model

    result = trivium("export", str(unbroken), "--out", str(tmp_path / "hf"))
    assert result.returncode == 0, result.stderr
    loaded = load_model(unbroken)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([loaded.tokenizer.encode("return the default value")])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, loaded.model(ids), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").decode(ids[0]) == "return the default value"
    chat = trivium("chat", str(unbroken), "--prompt", "return ", "--max-new-tokens", "8", "--seed", "1")
    assert chat.returncode == 0, chat.stderr
    again = trivium(
        "chat", str(tmp_path / "hf"), "--prompt", "return ", "--max-new-tokens", "8", "--seed", "1"
    )
    assert again.stdout == chat.stdout  # the exported model says the same
