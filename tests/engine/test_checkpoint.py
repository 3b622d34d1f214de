"""Checkpoints: any engine and world goes on from any other's; only whole ones exist; mistakes are one
line.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from engine_parts import Case, assert_close, make, plain_loop, steps

from trainer.engine import checkpoint, commit, storage
from trainer.engine.checkpoint_config import CheckpointConfig
from trainer.errors import UserError

SAVERS = [("fsdp", 2), ("zero3", 2), ("zero2", 2), ("zero1", 1), ("hsdp", 2), ("zero0", 2)]
LOADERS = [
    ("fsdp", 1),
    ("fsdp", 2),
    ("zero3", 2),
    ("zero3", 1),
    ("zero2", 2),
    ("zero1", 1),
    ("ddp", 2),
    ("zero0", 1),
    ("hsdp", 4),
]


def save_at_3(world, case, root):
    engine = make(world, case)
    steps(engine, world, case, 0, 3)
    checkpoint.save(root, 3, engine, {"note": "kept"})
    rest = steps(engine, world, case, 3, 3)
    engine.close()
    return rest


def go_on(world, case, path):
    engine = make(world, case, seed=1)  # other weights than those in the checkpoint
    state = checkpoint.load(path, engine)
    rest = steps(engine, world, case, 3, 3)
    updates = engine.updates
    engine.close()
    return rest, state["note"], updates


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """(engine, world) -> a checkpoint at step 3 that it wrote."""
    found = {}
    for kind, world in SAVERS:
        root = tmp_path_factory.mktemp(f"{kind}-{world}")
        assert_close(pool.run(world, save_at_3, Case(kind), root)[0], plain_loop(6)[3:])
        found[kind, world] = commit.directory_of(root, 3)
    return found


@pytest.mark.parametrize("loader", LOADERS, ids=lambda pair: f"{pair[0]}x{pair[1]}")
def test_any_engine_goes_on_from_any_other(pool, saved, loader):
    kind, world = loader
    options = {"shard_size": 2} if kind == "hsdp" else {}
    for path in saved.values():
        rest, note, updates = pool.run(world, go_on, Case(kind, options=options), path)[0]
        assert_close(rest, plain_loop(6)[3:])
        assert (note, updates) == ("kept", 6)


def test_weights_are_read_without_a_process_group(saved):
    reference = None
    for path in saved.values():
        found = dict(checkpoint.read_weights(path))
        reference = reference or found
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=1e-6)


def test_no_pickle_of_ours(saved):
    for path in saved.values():
        suffixes = {p.suffix for p in path.rglob("*") if p.is_file()}
        assert suffixes == {".bin", ".json", ""}  # "" is COMMITTED
        assert not (path / ".metadata").exists()


@pytest.fixture
def copy(saved, tmp_path):
    """A checkpoint that the test may break."""
    path = tmp_path / "checkpoints" / "step-00000003"
    shutil.copytree(saved["fsdp", 2], path)
    return path


def test_a_directory_without_its_marker_does_not_exist(copy):
    (copy / "COMMITTED").unlink()
    assert commit.list_steps(copy.parent) == []
    with pytest.raises(UserError, match="no COMMITTED marker: its save did not finish"):
        commit.find(copy)
    with pytest.raises(UserError, match="no committed checkpoint"):
        commit.find(copy.parent.parent)


def newest(world, root):
    return commit.newest_whole(root, world)


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "manifest"])
@pytest.mark.parametrize("world", [1, 2])
def test_damage_is_named_and_the_previous_one_is_used(pool, copy, harm, world):
    shutil.copytree(copy, newer := commit.directory_of(copy.parent, 4))
    victim = newer / ("manifest.json" if harm == "manifest" else "rank-00001.bin")
    data = victim.read_bytes()
    if harm == "remove":
        victim.unlink()
    elif harm == "truncate":
        victim.write_bytes(data[:-1])
    else:
        victim.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    path, problems = pool.run(world, newest, copy.parent)[-1]
    assert path == copy
    assert list(problems) == [newer]
    assert victim.name in problems[newer]
    assert commit.find(copy.parent.parent) == copy  # chat, export and init_from leave it out, too
    commit.set_aside(newer)
    assert commit.list_steps(copy.parent) == [3]


def test_another_model_is_refused(pool, saved):
    with pytest.raises(AssertionError, match=r"UserError: .*head\.weight.*has shape"):
        pool.run(1, go_on, Case("fsdp", tied=False), saved["fsdp", 2])


def test_retention_keeps_the_last_and_every_nth(copy):
    for step in (4, 6, 7, 8):
        shutil.copytree(copy, commit.directory_of(copy.parent, step))
    assert commit.prune(copy.parent, CheckpointConfig(keep_last=2, keep_every=3)) == [4]
    assert commit.list_steps(copy.parent) == [3, 6, 7, 8]
    (commit.directory_of(copy.parent, 8) / "rank-00000.bin").write_bytes(b"")
    assert (
        commit.prune(copy.parent, CheckpointConfig(keep_last=2)) == []
    )  # the newest does not verify: keep all


def test_what_a_killed_save_left_behind_goes_with_the_next_save(copy):
    shutil.copytree(copy, copy.parent / "step-00000004.tmp")
    shutil.copytree(copy, unmarked := commit.directory_of(copy.parent, 5))
    (unmarked / "COMMITTED").unlink()
    commit.prune(copy.parent, CheckpointConfig())
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


def full_disk(world, case, root, where):
    """A disk that is full at one point of the save, on rank 0 only."""
    engine = make(world, case)
    checkpoint.save(root, 1, engine, {})

    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module, name = {
        "shard": (storage, "_bytes_of"),
        "state": (checkpoint, "write_durably"),
        "rename": (os, "rename"),
    }[where]
    original = getattr(module, name)
    if world.rank == 0:
        setattr(module, name, refuse)
    try:
        checkpoint.save(root, 2, engine, {})
    except UserError as error:
        return str(error), commit.list_steps(root), sorted(p.name for p in root.iterdir())
    finally:
        setattr(module, name, original)
        engine.close()
    return "saved"


@pytest.mark.parametrize("where", ["shard", "state", "rename"])
def test_a_full_disk_fails_on_all_ranks_and_leaves_the_older_one(pool, tmp_path, where):
    for text, kept, names in pool.run(2, full_disk, Case("fsdp"), tmp_path / "checkpoints", where):
        assert "No space left on device" in text
        assert "\n" not in text
        assert kept == [1]
        assert names == ["step-00000001"]


def test_state_is_readable_json(saved):
    state = json.loads((saved["zero3", 2] / "state.json").read_text())
    assert (state["step"], state["updates"], state["engine"], state["world"]) == (3, 3, "zero3", 2)
    assert state["shapes"]["embed.weight" if "embed.weight" in state["shapes"] else "head.weight"] == [
        256,
        32,
    ]


def test_paths_that_hold_no_checkpoint(tmp_path: Path):
    with pytest.raises(UserError, match="no committed checkpoint"):
        commit.find(tmp_path)
