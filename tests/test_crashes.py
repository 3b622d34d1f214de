"""No crash can spoil a run: killed at every point where it could hurt, it goes on elsewhere as if nothing had
been.

Each trial kills a real run (one rank, or all at once), looks at what lies on the disk, starts the same run
again on another engine and another number of ranks, and compares every loss, gradient norm and batch with the
run that was never killed.
"""

import itertools
import json
import re
from pathlib import Path

import pytest
from commands import REPOSITORY, assert_same_curve, curve, metrics, tiny
from crashes import CrashServer, Kill

from trainer import faults
from trainer.engine import commit
from trainer.observe.goodput import summarize

EVERY, STEPS = 2, 10
SETTINGS = [f"steps={STEPS}", f"checkpoint.every={EVERY}"]
LAYOUTS = [("fsdp", 2), ("zero2", 1), ("zero3", 2), ("hsdp", 2), ("zero1", 3), ("fsdp", 1), ("zero3", 3)]
# The how-many-th reach kills, and which rank: points of rank 0 alone, and points that every rank reaches.
WHERE = {
    "step/updated": (5, 1), "data/prefetch": (6, 1), "save/staged": (3, 1), "save/shard": (50, 1),
    "save/manifest": (3, 0), "save/rename": (3, 0), "save/marker": (2, 0), "save/committed": (2, 0),
    "save/prune": (1, 0), "wandb/start": (1, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    return CrashServer()


@pytest.fixture(scope="module")
def unbroken(server, dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    result = server.attempt(tiny(dataset, run, *SETTINGS), 1, run.with_suffix(".log"))
    assert result.codes == [0], result.output
    return curve(run)


def look_at_the_disk(run: Path) -> None:
    """What was committed verifies, and nothing that had been committed is lost."""
    root = run / "checkpoints"
    steps = commit.list_steps(root)
    for step in steps:
        assert commit.check(commit.directory_of(root, step)) == ""
    logged = metrics(run)[-1]["step"] if (run / "metrics.jsonl").exists() and metrics(run) else 0
    # A save is ordered when the one before it is done: at most the last two may be missing.
    assert max(steps, default=0) >= logged // EVERY * EVERY - 2 * EVERY


def finish_and_compare(server, arguments, run, layout, reference) -> str:
    engine, world = layout
    result = server.attempt([*arguments, f"engine={engine}"], world, run.with_suffix(".again.log"))
    assert set(result.codes) == {0}, result.output
    assert_same_curve(curve(run), reference)
    assert json.loads((run / "DONE").read_text())["step"] == STEPS
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (STEPS - EVERY, STEPS)]
    assert len(json.loads((run / "run.json").read_text())["attempts"]) == 2
    assert summarize(run / "goodput.jsonl").steps == STEPS
    return result.output


TRIALS = list(itertools.product(WHERE, (False, True)))


@pytest.mark.parametrize("number", range(len(TRIALS)), ids=lambda n: "-".join(map(str, TRIALS[n])))
def test_killed_at_a_point(server, dataset, unbroken, tmp_path, number):
    point, everyone = TRIALS[number]
    count, rank = WHERE[point]
    engine, world = LAYOUTS[number % 4] if number % 4 != 1 else ("zero2", 2)
    run = tmp_path / "run"
    wandb = ["logger.wandb=offline"] if point == "wandb/start" else []
    arguments = [*tiny(dataset, run, *SETTINGS), *wandb]
    result = server.attempt(
        [*arguments, f"engine={engine}"], world, tmp_path / "killed.log", Kill(point, count, rank, everyone)
    )
    assert result.killed, result.output
    assert result.codes[rank] == -9
    assert not (run / "DONE").exists()
    look_at_the_disk(run)
    finish_and_compare(server, arguments, run, LAYOUTS[(number + 3) % len(LAYOUTS)], unbroken)


@pytest.mark.parametrize("trial", range(2))
def test_killed_at_any_moment(server, dataset, unbroken, tmp_path, trial):
    """Moments that nobody chose; `make soak` tries hundreds."""
    run = tmp_path / "run"
    arguments = tiny(dataset, run, *SETTINGS)
    engine, world = LAYOUTS[trial]
    kill = Kill(after=1.1 + 0.6 * trial, everyone=bool(trial % 2))
    server.attempt([*arguments, f"engine={engine}"], world, tmp_path / "killed.log", kill)
    if (run / "run.json").exists():
        look_at_the_disk(run)
    engine, world = LAYOUTS[(trial + 2) % len(LAYOUTS)]
    again = server.attempt([*arguments, f"engine={engine}"], world, tmp_path / "again.log")
    assert set(again.codes) == {0}, again.output
    assert_same_curve(curve(run), unbroken)


def test_every_point_is_in_the_code_and_is_tried():
    source = "".join(path.read_text() for path in (REPOSITORY / "trainer").rglob("*.py"))
    assert set(re.findall(r'\breach\("([^"]+)"\)', source)) == set(faults.POINTS) == set(WHERE)
