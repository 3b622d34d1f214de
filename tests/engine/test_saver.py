"""Saving in the background: training goes on unharmed, one save at a time, failures cost nothing."""

import errno
import json
import os
import threading

import pytest
import torch
from engine_parts import Case, assert_close, make, plain_loop, steps

from trainer.engine import checkpoint, commit, storage
from trainer.engine.checkpoint_config import CheckpointConfig
from trainer.engine.saver import Saver


def save_while_training(world, case, root):
    """A save after step 2 that is held back until three more steps are done."""
    engine = make(world, case)
    saver = Saver(root, engine, CheckpointConfig())
    curve = steps(engine, world, case, 0, 2)
    go, original = threading.Event(), storage._bytes_of

    def held_back(tensor):
        go.wait(60)
        return original(tensor)

    storage._bytes_of = held_back
    try:
        saver.save(2, {"note": "kept"}, {})
        assert saver.result() is None
        curve += steps(engine, world, case, 2, 3)
        assert saver.result() is None
        assert commit.list_steps(root) == []
        go.set()
        assert saver.wait() == ""
    finally:
        storage._bytes_of = original
    assert saver.committed == 2
    state = checkpoint.load(commit.directory_of(root, 2), engine)
    assert state["note"] == "kept"
    again = steps(engine, world, case, 2, 3)
    engine.close()
    return curve, again


@pytest.mark.parametrize(
    ("kind", "world"), [("fsdp", 2), ("zero2", 2), ("zero3", 2), ("ddp", 2), ("fsdp", 1)]
)
def test_a_checkpoint_holds_the_step_that_ordered_it(pool, tmp_path, kind, world):
    """Training changes the weights while the writer is held back; the checkpoint must not see that."""
    for curve, again in pool.run(world, save_while_training, Case(kind), tmp_path):
        assert_close(curve, plain_loop(5))
        assert_close(again, plain_loop(5)[2:])


def save_on_a_full_disk(world, case, root, where):
    engine = make(world, case)
    saver = Saver(root, engine, CheckpointConfig())
    saver.save(1, {}, {})
    saver.wait()

    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module, name = {"shard": (storage, "_bytes_of"), "marker": (commit, "fsync_directory")}[where]
    original = getattr(module, name)
    if world.rank == 0:
        setattr(module, name, refuse)
    try:
        saver.save(2, {}, {})
        curve = steps(engine, world, case, 0, 2)
        problem = saver.wait()
    finally:
        setattr(module, name, original)
    kept = commit.list_steps(root), sorted(path.name for path in root.iterdir())
    world.barrier()  # all ranks have looked
    saver.save(3, {}, {})
    last = saver.wait(), saver.committed, commit.list_steps(root)
    engine.close()
    return curve, problem, kept, last


@pytest.mark.parametrize("where", ["shard", "marker"])
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(pool, tmp_path, where):
    for curve, problem, kept, last in pool.run(2, save_on_a_full_disk, Case("zero2"), tmp_path, where):
        assert "No space left on device" in problem
        assert "\n" not in problem
        assert_close(curve, plain_loop(2))
        assert kept == ([1], ["step-00000001"])
        assert last == ("", 3, [1, 3])


def save_with_a_fault(world, case, root):
    engine = make(world, case)
    saver = Saver(root, engine, CheckpointConfig())
    saver.save(1, {"not JSON": object()}, {})
    try:
        saver.wait()
    except BaseException as error:
        return type(error).__name__
    finally:
        engine.close()
    return "no error"


def test_a_fault_of_ours_is_raised_on_the_training_thread(pool, tmp_path):
    assert pool.run(1, save_with_a_fault, Case("fsdp"), tmp_path) == ["TypeError"]


def count_collectives_of_a_save(world, case, root):
    """Bytes that cross between ranks while staging and writing: none of them a parameter's."""
    engine = make(world, case)
    saver = Saver(root, engine, CheckpointConfig())
    sent = []
    original = torch.distributed.all_gather_object

    def counted(target, value, group=None):
        sent.append(len(json.dumps(value, default=str)))
        return original(target, value, group=group)

    torch.distributed.all_gather_object = counted
    try:
        saver.save(1, {}, {})
        saver.wait()
    finally:
        torch.distributed.all_gather_object = original
    engine.close()
    return sum(sent)


def test_ranks_exchange_words_not_weights(pool, tmp_path):
    shard = sum(p.numel() for p in checkpoint_parameters()) * 4 * 3 // 2
    for sent in pool.run(2, count_collectives_of_a_save, Case("zero3"), tmp_path):
        assert sent < shard // 100


def checkpoint_parameters():
    from engine_parts import model_config

    from trainer.model.transformer import Transformer

    return list(Transformer(model_config()).parameters())
