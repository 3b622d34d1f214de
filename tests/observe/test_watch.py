"""The watch names who holds a run up: ranks that are frozen, asleep, endless or slow, and no others."""

import functools
import json
import os
import signal
import time
from pathlib import Path

import pytest
from commands import metrics, tiny
from crashes import CrashServer

from trainer import pretrain
from trainer.errors import EXIT_HUNG, UserError
from trainer.observe.watch_config import WatchConfig
from trainer.observe.watch_decide import Beat, culprits, is_hung, report, slow_ranks

LIMIT = 3.0


def beat(rank, step=5, entered=3, idle=10.0, own=1.0, phase="forward", waits=True):
    where = (step, entered)
    return Beat(rank, f"n{rank // 8}", 1000 + rank, 7, idle, phase, where, waits, "48..59", 1, own, phase)


def test_the_frozen_are_named_first_then_those_least_far():
    beats = [beat(0), beat(1, entered=2), beat(2), beat(3, step=4, entered=9)]
    assert culprits(beats, [2]) == [2]
    assert culprits(beats, []) == [3]
    assert culprits(beats[:3], []) == [1]
    assert culprits([beat(0), beat(1)], []) == []
    assert culprits([beat(0), beat(1, waits=False), beat(2)], []) == [1]
    assert culprits([beat(0)], []) == [0]


def test_progress_of_one_live_rank_is_no_hang():
    assert is_hung([beat(0), beat(1)], [], 5.0)
    assert not is_hung([beat(0), beat(1, idle=1.0)], [], 5.0)
    assert is_hung([beat(0), beat(1, idle=1.0)], [1], 5.0)  # what a frozen rank last said is old


def test_a_thousand_ranks_make_a_short_report():
    text = report([*(beat(rank) for rank in range(1000)), beat(1000, entered=2, phase="data")], [], 60)
    assert len(text.splitlines()) == 3
    assert "wait for rank 1000 (host n125, pid 2000): data of step 5, samples 48..59" in text
    assert "1000 ranks are in forward of step 5" in text


def test_slow_is_above_the_factor_of_the_low_median():
    beats = [beat(0, own=1.0), beat(1, own=1.1), beat(2, own=1.5)]
    assert slow_ranks(beats, 1.2) == {2: pytest.approx(1.5 / 1.1)}
    assert slow_ranks(beats[::2], 1.2) == {2: 1.5}  # of two the faster one is the measure
    assert slow_ranks([beat(0, own=0.0), beat(1, own=0.0)], 1.2) == {}


@pytest.mark.parametrize(
    "change", [{"limit_s": 0.5}, {"startup_limit_s": 1}, {"slow_factor": 1}, {"slow_windows": 0}]
)
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(UserError, match=f"watch.{next(iter(change))}"):
        WatchConfig(**change).validate()


# Real runs. A rank misbehaves from step 6 on, as the script below says.
# --------------------------------------------------------------------------------------------------------

ODD_FROM = 7  # the step (0-based) from which a rank behaves oddly


def behave(how: str, who: int, rank: int) -> None:
    """Make the pretraining stage of this process odd."""

    class Odd(pretrain.Pretrain):
        def batch(self, step):
            self.step = step
            if step == ODD_FROM and rank == who and how == "data":
                time.sleep(1000)
            return super().batch(step)

        def loss(self, model, micro):
            if self.step >= ODD_FROM and rank == who:
                while how == "endless":
                    sum(range(1000))
                if how == "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if how == "slow":
                    time.sleep(0.04)
            return super().loss(model, micro)

        def eval_loss(self, model, micro):
            if how == "long eval":
                time.sleep(0.25)
            return super().eval_loss(model, micro)

    pretrain.Pretrain = Odd  # type: ignore[misc]


@pytest.fixture(scope="module")
def server():
    return CrashServer()


@pytest.fixture
def odd(server, dataset, tmp_path):
    """Runs ranks of which one behaves oddly; returns (result, run directory)."""

    def run(how: str, who: int, world: int, *overrides: str):
        directory = tmp_path / "run"
        limits = [f"watch.limit_s={LIMIT}", "watch.startup_limit_s=60", "data.workers=0", "micro_batch=1"]
        arguments = tiny(dataset, directory, "steps=400", *limits, *overrides)
        prepare = functools.partial(behave, how, who)
        log = tmp_path / "out.log"
        return server.attempt(arguments, world, log, prepare=prepare, notice=LIMIT), directory

    return run


ODD = [
    ("freeze", 1, 2, "fsdp", ("forward", "backward")),
    ("freeze", 0, 3, "zero3", ("forward", "backward", "data", "optimizer", "log")),  # takes the store with it
    ("data", 1, 2, "zero2", ("data",)),
    ("endless", 1, 3, "fsdp", ("forward",)),
    ("endless", 0, 1, "fsdp", ("forward",)),
]


@pytest.mark.parametrize("case", ODD, ids=lambda case: f"{case[0]}-{case[1]}of{case[2]}-{case[3]}")
def test_the_rank_that_all_wait_for_is_named_with_its_phase(odd, case):
    how, who, world, engine, phases = case
    result, run = odd(how, who, world, f"engine={engine}")
    output, live = result.output, [r for r in range(world) if not (how == "freeze" and r == who)]
    assert {result.codes[rank] for rank in live} == {EXIT_HUNG}, output
    last_step = metrics(run)[-1]["time"]
    logs = run / "logs" / "attempt-1"
    verdict = json.loads((logs / "hang.json").read_text())
    # Named within twice the limit of the last thing that happened.
    assert (logs / "hang.json").stat().st_mtime - last_step < 2 * LIMIT
    culprit = next(rank for rank in verdict["ranks"] if rank["rank"] == who)
    assert world == 1 or verdict["culprits"] == [who]
    assert culprit["phase"] in phases
    assert f"rank {who} (host {os.uname().nodename}, pid" in output
    assert "samples" in output
    stacks = {path.name for path in logs.glob("stacks-*")}
    assert stacks == {f"stacks-rank-{r}.txt" for r in range(world) if how != "freeze" or r != who}
    if how == "endless":
        assert "in loss" in (logs / f"stacks-rank-{who}.txt").read_text()
    if how == "freeze":
        assert "py-spy dump --pid" in output


def test_a_slow_rank_is_named_and_a_healthy_run_is_left_alone(odd):
    windows = ["watch.window_steps=5", "watch.slow_windows=2", "steps=40"]
    result, run = odd("slow", 1, 2, *windows)
    assert result.codes == [0, 0], result.output
    assert "rank 1 (host" in result.output
    told = [line["event/slow"] for line in metrics(run) if "event/slow" in line]
    assert told
    assert all(text.startswith("rank 1 ") and "most of it in forward" in text for text in told)


def test_a_long_evaluation_that_makes_progress_is_no_hang(odd):
    """Sixteen forwards of a quarter of a second each: longer than the limit, but never idle."""
    more = ["steps=8", "eval.every=8", "eval.sequences=32", "logger.console=off"]
    result, run = odd("long eval", 0, 2, *more)
    assert result.codes == [0, 0], result.output
    assert metrics(run)[-1]["speed/eval_s"] > LIMIT
    assert not Path(run / "logs" / "attempt-1" / "hang.json").exists()
