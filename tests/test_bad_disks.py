"""Runs on bad disks: data with damaged blocks, and a disk that takes no more while a checkpoint is saved."""

import functools
import json
import resource
import shutil

import numpy as np
import pytest
from commands import assert_same_curve, curve, metrics, tiny
from crashes import CrashServer, Kill

from trainer.config import compose_stage
from trainer.stream.batches import TokenBatches

QUARANTINE = ["data.on_damage=quarantine", "steps=10", "checkpoint.every=3"]
DAMAGED_IN = 4  # the step (0-based) whose first row lies in the block that is damaged


@pytest.fixture(scope="module")
def server():
    return CrashServer()


@pytest.fixture
def damaged(dataset, tmp_path):
    """(data set with one damaged block, function that mends or damages it, name of the shard)."""
    data = shutil.copytree(dataset, tmp_path / "data")
    config = compose_stage("pretrain", tiny(data, tmp_path / "unused"))
    batches = TokenBatches(config.data, seed=0, seq_len=64, global_batch=12, micro_batch=2)
    before = {batches.mixture.locate(n)[2] // 32 for n in range(12 * DAMAGED_IN)}
    windows = (batches.mixture.locate(n)[2] for n in range(12 * DAMAGED_IN, 12 * DAMAGED_IN + 12))
    block = next(window // 32 for window in windows if window // 32 not in before)
    index = next(iter(batches.readers.values())).index
    shard = index.shards[int(np.searchsorted(index.shards.first_block, block, side="right")) - 1]

    def flip():
        with open(data / "train" / shard.file, "r+b") as file:
            file.seek(shard.base + (block - shard.first_block) * shard.stride + 100)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))

    flip()
    return data, flip, shard.file


def test_damage_halts_a_run_in_one_line_unless_told_otherwise(server, damaged, tmp_path):
    data, _, shard = damaged
    result = server.attempt(tiny(data, tmp_path / "run", "steps=10"), 1, tmp_path / "log")
    assert result.codes == [2]
    (line,) = [line for line in result.output.splitlines() if line.startswith("trivium:")]
    assert shard in line
    assert "block" in line


def test_quarantine_is_the_same_on_any_world_and_after_a_repair(server, damaged, dataset, tmp_path):
    data, flip, shard = damaged
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    for run, world, engine in ((one, 1, "fsdp"), (two, 2, "zero2")):
        arguments = tiny(data, run, *QUARANTINE, f"engine={engine}")
        result = server.attempt(arguments, world, run.with_suffix(".log"))
        assert set(result.codes) == {0}, result.output
    assert_same_curve(curve(two), curve(one))
    events = [(m["step"], m["event/damage"]) for m in metrics(one) if "event/damage" in m]
    assert len(events) == 1
    assert events[0][0] <= DAMAGED_IN + 1  # it may be found while the batch is read ahead
    assert shard in events[0][1]
    (recorded,) = json.loads((one / "quarantine.json").read_text())
    assert recorded["shard"] == shard
    assert recorded["samples"]

    whole = tmp_path / "whole"
    server.attempt(tiny(dataset, whole, *QUARANTINE), 1, tmp_path / "whole.log")
    hashes = [(a[3] == b[3]) for a, b in zip(curve(one), curve(whole))]
    assert hashes[:DAMAGED_IN] == [True] * DAMAGED_IN  # what was read before is what it always was
    assert not hashes[DAMAGED_IN]

    # Killed after the damage was found, mended, resumed: it stays out of use, or another batch would be read.
    arguments = tiny(data, killed, *QUARANTINE)
    kill = Kill("step/updated", DAMAGED_IN + 2)
    assert server.attempt(arguments, 1, tmp_path / "killed.log", kill).killed
    flip()
    again = server.attempt([*arguments, "engine=zero3"], 2, tmp_path / "again.log")
    assert set(again.codes) == {0}, again.output
    assert_same_curve(curve(killed), curve(one))


def limit_files(size: int, rank: int) -> None:
    """No file of this process may grow beyond `size`: the kernel refuses the write, as a full disk does."""
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_takes_no_checkpoint_stops_only_the_last_save(server, dataset, tmp_path):
    run = tmp_path / "run"
    arguments = tiny(dataset, run, "checkpoint.every=2")
    result = server.attempt(arguments, 2, tmp_path / "log", prepare=functools.partial(limit_files, 200_000))
    assert result.codes[0] == 2, result.output  # the other rank lingers, so that rank 0 is heard
    assert [m["step"] for m in metrics(run)] == [1, 2, 3, 4, 5, 6]  # training went on to the end
    assert any("cannot save a checkpoint" in m.get("event/save", "") for m in metrics(run))
    last = [line for line in result.output.splitlines() if line.startswith("trivium:")]
    assert len(last) == 1
    assert "File too large" in last[0]
    assert not (run / "DONE").exists()
    assert list((run / "checkpoints").iterdir()) == []
    again = server.attempt(arguments, 1, tmp_path / "again.log")
    assert again.codes == [0], again.output
    assert [m["step"] for m in metrics(run)] == [1, 2, 3, 4, 5, 6]
