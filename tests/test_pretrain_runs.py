"""Whole pretraining runs: every launcher and engine gives the same curve, and a stopped run goes on as if it
had not been.
"""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import xxhash
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


STOPS = {  # stopped after at least so many steps: (launcher, engine), then (launcher, engine)
    "fsdp1-zero3x2": (2, 1, "fsdp", 2, "zero3"),
    "zero2x2-fsdp1": (9, 2, "zero2", 1, "fsdp"),
}
LONG = ["steps=24", "optim.lr=1e-3"]


def launcher(world: int) -> list[str]:
    return ["trainer.pretrain"] if world == 1 else torchrun(world)


@pytest.fixture(scope="session")
def long_unbroken(dataset, tmp_path_factory):
    """Long enough to be stopped in its middle on a slow machine, too."""
    run = tmp_path_factory.mktemp("runs") / "long"
    result = trivium("pretrain", *tiny(dataset, run, *LONG))
    assert result.returncode == 0, result.stderr
    return run


@pytest.mark.parametrize("case", STOPS)
def test_sigterm_then_the_same_command_on_another_engine_and_world(dataset, long_unbroken, tmp_path, case):
    after, world, engine, second_world, second_engine = STOPS[case]
    run = tmp_path / "run"
    process = start(launcher(world), tiny(dataset, run, *LONG, f"engine={engine}"))
    wait_for_steps(run, after, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    done = [m["step"] for m in metrics(run)]
    assert process.returncode != 0, output
    assert not (run / "DONE").exists()
    assert after <= done[-1] < 24, output
    assert (run / "checkpoints" / f"step-{done[-1]:08d}" / "COMMITTED").exists()
    assert "the same command goes on" in output
    output = finish(start(launcher(second_world), tiny(dataset, run, *LONG, f"engine={second_engine}")))
    assert f"going on from {run}/checkpoints/step-{done[-1]:08d}" in output
    assert_same_curve(curve(run), curve(long_unbroken))


def wait_for_steps(run, count: int, process: subprocess.Popen) -> None:
    """Until `count` steps are logged."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(metrics_so_far(run)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def metrics_so_far(run) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().split("\n")[:-1] if "train/loss" in line]


def test_a_finished_run_says_so_and_goes_on_when_steps_are_raised(dataset, tmp_path):
    run = tmp_path / "run"
    constant = ["schedule=constant", "schedule.warmup_steps=0"]  # a schedule that does not depend on `steps`
    assert trivium("pretrain", *tiny(dataset, run, *constant, "steps=2")).returncode == 0
    again = trivium("pretrain", *tiny(dataset, run, *constant, "steps=2"))
    assert again.returncode == 0
    assert "2 of 2 steps are done; raise steps to go on" in again.stdout
    (run / "DONE").unlink()  # as after a kill between the last save and its mark
    assert trivium("pretrain", *tiny(dataset, run, *constant, "steps=2")).returncode == 0
    assert (run / "DONE").exists()
    assert trivium("pretrain", *tiny(dataset, run, *constant, "steps=4")).returncode == 0
    assert trivium("pretrain", *tiny(dataset, tmp_path / "whole", *constant, "steps=4")).returncode == 0
    assert_same_curve(curve(run), curve(tmp_path / "whole"))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(dataset, unbroken, tmp_path):
    run = tmp_path / "run"
    assert trivium("pretrain", *tiny(dataset, run, "checkpoint.every=4")).returncode == 0
    (run / "DONE").unlink()
    (run / "checkpoints" / "step-00000006" / "rank-00000.bin").write_bytes(b"")
    result = trivium("pretrain", *tiny(dataset, run, "checkpoint.every=4"))
    assert result.returncode == 0, result.stderr
    assert "damaged checkpoint set aside as step-00000006.damaged" in result.stdout
    assert "step-00000006/rank-00000.bin has 0 bytes" in result.stdout
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


def test_a_run_outlives_the_weights_it_started_from(dataset, unbroken, tmp_path):
    parent = shutil.copytree(unbroken, tmp_path / "parent")
    arguments = [a for a in tiny(dataset, tmp_path / "run", f"init_from={parent}") if "model" not in a]
    assert trivium("pretrain", *arguments, "steps=3").returncode == 0
    remembered = json.loads((tmp_path / "run" / "run.json").read_text())["lineage"]["parent"]
    assert remembered == (parent / "checkpoints" / "step-00000006" / "COMMITTED").read_text()
    shutil.rmtree(parent)
    result = trivium("pretrain", *arguments, "steps=4")
    assert result.returncode == 0, result.stderr


def test_weights_of_another_tokenizer_are_refused(dataset, unbroken, tmp_path):
    parent = shutil.copytree(unbroken, tmp_path / "parent")
    path = parent / "checkpoints" / "step-00000006" / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    a, b = (name for name, index in vocab.items() if index in (65, 66))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(content))
    manifest = path.parent.parent / "manifest.json"
    files = json.loads(manifest.read_text())
    (path.parent / "trivium.json").unlink()  # it would notice the change itself
    del files["tokenizer/trivium.json"]
    files["tokenizer/tokenizer.json"] = [path.stat().st_size, xxhash.xxh3_128_hexdigest(path.read_bytes())]
    manifest.write_text(json.dumps(files))
    (manifest.parent / "COMMITTED").write_text(xxhash.xxh3_128_hexdigest(manifest.read_bytes()))
    arguments = [a for a in tiny(dataset, tmp_path / "run", f"init_from={parent}") if "model" not in a]
    result = trivium("pretrain", *arguments)
    assert result.returncode == 2
    assert "its tokenizer has other ids" in result.stderr
    assert not (tmp_path / "run").exists()


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
