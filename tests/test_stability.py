"""Spikes and non-finite steps: left out by all, recorded; after too many the run returns and jumps over."""

import json
import math
import shutil
import subprocess
import sys

import pytest
from commands import assert_same_curve, curve, environment, metrics, tiny, trivium
from hypothesis import given
from hypothesis import strategies as st
from ranks import free_port

from trainer.errors import EXIT_UNSTABLE, UserError
from trainer.loop import Progress
from trainer.stability import Stability, StabilityConfig


def calm(stability, count=64, level=3.0):
    for number in range(count):
        stability.record(level + 0.01 * (number % 7), 1.0 + 0.02 * (number % 5), False)


def test_a_spike_is_far_above_the_last_good_steps():
    stability = Stability(StabilityConfig(window=64))
    assert stability.why_not(1e9, 1e9) == ""  # nothing to compare with yet
    calm(stability)
    assert stability.why_not(3.05, 1.05) == ""
    assert stability.why_not(1.0, 0.1) == ""  # below is fine
    assert "loss 9 is above" in stability.why_not(9.0, 1.0)
    assert "gradient norm 40 is above" in stability.why_not(3.0, 40.0)
    assert stability.why_not(math.nan, 1.0) == "loss is not finite"
    assert stability.why_not(3.0, math.inf) == "gradient norm is not finite"


def test_a_calm_window_does_not_make_ordinary_steps_spikes():
    stability = Stability(StabilityConfig(window=64))
    for _ in range(64):
        stability.record(3.0, 1.0, False)
    assert stability.why_not(3.1, 1.05) == ""


def test_without_sigma_only_non_finite_steps_are_left_out():
    stability = Stability(StabilityConfig(sigma=0))
    calm(stability, 128)
    assert stability.why_not(1e9, 1e9) == ""
    assert stability.why_not(math.inf, 1.0) != ""


def test_steps_left_out_do_not_enter_the_window_and_count_in_a_row():
    stability = Stability(StabilityConfig(window=64, patience=3))
    calm(stability)
    for _ in range(2):
        stability.record(50.0, 50.0, True)
    assert not stability.must_return
    stability.record(3.0, 1.0, False)
    for _ in range(3):
        stability.record(50.0, 50.0, True)
    assert stability.must_return
    assert "loss 9" in stability.why_not(9.0, 1.0)


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=200), st.floats(0.1, 1000))
def test_a_resumed_window_judges_like_the_old_one(values, value):
    one, other = Stability(StabilityConfig(window=32)), Stability(StabilityConfig(window=32))
    for loss in values:
        one.record(loss, 2 * loss, False)
    other.restore(json.loads(json.dumps(one.state())))
    assert one.why_not(value, value) == other.why_not(value, value)
    assert one.state() == other.state()


def test_jumps_are_a_function_of_the_step():
    progress = Progress(jumps=[[10, 5], [20, 3]])
    assert [progress.data_step(step) for step in (0, 9, 10, 19, 20, 25)] == [0, 9, 15, 24, 28, 33]


@pytest.mark.parametrize(
    ("change", "key"),
    [({"sigma": 1.0}, "sigma"), ({"window": 2}, "window"), ({"patience": -1}, "patience"),
     ({"rollbacks": -1}, "rollbacks")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(change, key):
    with pytest.raises(UserError, match=rf"stability\.{key}"):
        StabilityConfig(**change).validate()


# Real runs over data of which some batches are poisoned: their loss is scaled, so all ranks see a spike.
# ---------------------------------------------------------------------------------------------------------

POISON = """
import sys
from trainer import pretrain
from trainer.launch import run_main

bad = {samples}

class Poisoned(pretrain.Pretrain):
    def batch(self, step):
        found = super().batch(step)
        self.first = getattr(self, "first", {{}}) | {{id(m): found.first_sample for m in found.micros}}
        return found

    def loss(self, model, micro):
        result = super().loss(model, micro)
        if self.first[id(micro)] in bad:
            result.total = result.total * {factor}
        return result

pretrain.Pretrain = Poisoned
sys.exit(run_main(pretrain.main))
"""
BATCH = 12
STEADY = [
    "steps=30",
    "stability.window=12",
    "stability.patience=3",
    "checkpoint.every=5",
    "schedule=constant",
]
STEADY += ["schedule.warmup_steps=0", "optim.lr=1e-4"]


@pytest.fixture
def poisoned(tmp_path):
    """Runs a pretraining whose batches of these numbers are poisoned."""

    def run(batches, arguments, factor="1000.0", world=1):
        script = tmp_path / "poisoned.py"
        script.write_text(POISON.format(samples={BATCH * b for b in batches}, factor=factor))
        launcher = [sys.executable, str(script)]
        if world > 1:
            torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={world}"]
            launcher = [sys.executable, *torchrun, f"--master_port={free_port()}", str(script)]
        command = [*launcher, *arguments]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)

    return run


@pytest.mark.parametrize(("engine", "world", "factor"), [("fsdp", 1, "1000.0"), ("zero2", 2, "float('nan')")])
def test_a_bad_batch_is_left_out_and_named(dataset, tmp_path, poisoned, engine, world, factor):
    run = tmp_path / "run"
    result = poisoned([20], tiny(dataset, run, *STEADY, f"engine={engine}"), factor, world)
    assert result.returncode == 0, result.stderr
    lines = metrics(run)
    assert [m["step"] for m in lines if "event/skip" in m] == [21]
    assert (lines[20]["data/first_sample"], lines[20]["data/samples"]) == (240, 252)
    assert lines[-1]["train/skipped_steps"] == 1
    assert "update left out (samples 240..251)" in result.stdout


@pytest.mark.parametrize("every", [5, 3])
def test_after_too_many_the_run_returns_and_jumps_over_the_batches(dataset, tmp_path, poisoned, every):
    """Batches 17 to 19 spike: back to step 15, on with batch 20; also when resumed later. With a checkpoint
    every 3 steps one is saved in the middle of the trouble: it must go, or a resume would go on there.
    """
    run = tmp_path / "run"
    settings = [*STEADY, f"checkpoint.every={every}", "checkpoint.keep_last=9"]
    result = poisoned([17, 18, 19], tiny(dataset, run, *settings))
    assert result.returncode == 0, result.stderr
    lines = metrics(run)
    assert [m["step"] for m in lines] == list(range(1, 31))
    assert [m["data/first_sample"] // BATCH for m in lines] == [*range(15), *range(20, 35)]
    assert lines[15]["event/rollback"] == "from step 20 to 15: batches 15..19 left out"
    assert lines[15]["train/rollbacks"] == 1
    replaced = (run / "logs" / "attempt-1" / "replaced-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in replaced] == [16, 17, 18, 19, 20]
    assert "event/skip" in json.loads(replaced[-1])
    # What was left out can be looked at on the weights it came to, and the report draws the run.
    looked = trivium("replay", str(run), "--step", "21", "--batch", "17", "--rows", "1", COLUMNS="200")
    assert looked.returncode == 0, looked.stderr
    assert "batch 17, samples 204..215" in looked.stdout
    assert trivium("report", str(run)).returncode == 0
    for path in (run / "checkpoints").iterdir():
        state = json.loads((path / "state.json").read_text())
        assert state["jumps"] == ([[15, 5]] if state["step"] > 15 else [])
        assert state["stability"]["in_row"] == 0
    # A resume from the checkpoint before the last keeps the jump, on another engine and number of ranks.
    reference = curve(run)
    (run / "DONE").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000030")
    again = poisoned([17, 18, 19], tiny(dataset, run, *settings, "engine=zero3"), world=2)
    assert again.returncode == 0, again.stderr
    assert_same_curve(curve(run), reference)


def test_a_run_that_cannot_be_saved_by_returning_stops_with_its_own_code(dataset, tmp_path, poisoned):
    run = tmp_path / "run"
    result = poisoned(range(17, 60), tiny(dataset, run, *STEADY, "stability.rollbacks=1"))
    assert result.returncode == EXIT_UNSTABLE
    assert "after 1 returns: the run stops unsaved" in result.stdout
    assert not (run / "DONE").exists()
    nothing = poisoned(range(7, 60), tiny(dataset, tmp_path / "other", *STEADY, "checkpoint.every=0"))
    assert nothing.returncode == EXIT_UNSTABLE
    assert "there is no checkpoint to return to" in nothing.stdout
