"""A checkpoint of any engine on any number of ranks, read by any other: all 400 pairs, bit for bit.

What is loaded is compared with what was saved exactly; what is trained from it is compared with a plain loop
that was never interrupted.
"""

import pytest
import torch
from engine_parts import Case, assert_close, make, plain_loop, steps

from trainer.engine import checkpoint, commit
from trainer.engine.storage import read_index, read_tensor

KINDS = ("fsdp", "hsdp", "zero1", "zero2", "zero3")
WORLDS = (1, 2, 3, 4)
LAYOUTS = [(kind, world) for kind in KINDS for world in WORLDS]
HSDP_SHARD = {1: 1, 2: 2, 3: 1, 4: 2}  # whole, one group, replicas only, two groups of two
SAVED_AT, MORE = 3, 2


def case_of(kind: str, world: int) -> Case:
    options = {"shard_size": HSDP_SHARD[world]} if kind == "hsdp" else {}
    return Case(kind, split=3, options=options)


def train_and_save(world, case, root):
    engine = make(world, case)
    curve = steps(engine, world, case, 0, SAVED_AT)
    checkpoint.save(root, SAVED_AT, engine, {})
    engine.close()
    return curve


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """(engine, world) -> a checkpoint that it wrote after three steps of the plain loop."""
    found = {}
    for kind, world in LAYOUTS:
        root = tmp_path_factory.mktemp(f"{kind}-{world}")
        curve = pool.run(world, train_and_save, case_of(kind, world), root)[0]
        assert_close(curve, plain_loop(SAVED_AT))
        found[kind, world] = commit.directory_of(root, SAVED_AT)
    return found


def load_all(world, case, paths):
    """One engine reads them one after the other: for each (differing ranges, updates, the next steps)."""
    engine = make(world, case, seed=1)  # other weights than those in the checkpoints
    found = []
    for path in paths:
        checkpoint.load(path, engine)
        index = read_index(path)
        wrong = []
        for name, shard in engine.shards().items():
            whole = read_tensor(path, index[name])
            if not torch.equal(shard.local, whole[shard.start : shard.start + shard.local.numel()]):
                wrong.append(name)
        found.append((wrong, engine.updates, steps(engine, world, case, SAVED_AT, MORE)))
    engine.close()
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda pair: f"{pair[0]}x{pair[1]}")
def test_reads_what_every_other_wrote(pool, saved, layout):
    kind, world = layout
    reference = plain_loop(SAVED_AT + MORE)[SAVED_AT:]
    for rank in pool.run(world, load_all, case_of(kind, world), list(saved.values())):
        for wrong, updates, curve in rank:
            assert wrong == []
            assert updates == SAVED_AT
            assert_close(curve, reference)


def test_every_rank_wrote_its_part(saved):
    """Also where ranks hold equal copies, each writes a part: no rank alone writes for the others."""
    for (_, world), path in saved.items():
        sizes = [file.stat().st_size for file in path.glob("rank-*.bin")]
        assert len(sizes) == world
        assert max(sizes) < 1.6 * sum(sizes) / world


def go_on(world, case, source, root, first, count):
    engine = make(world, case, seed=1 if source else 0)
    if source is not None:
        checkpoint.load(source, engine)
    curve = steps(engine, world, case, first, count)
    checkpoint.save(root, first + count, engine, {})
    engine.close()
    return curve


def test_zero2_on_one_rank_to_three_fsdp_ranks_and_back_for_twenty_steps_each(pool, tmp_path):
    reference = plain_loop(45)
    legs = [("zero2", 1, 0, 5), ("fsdp", 3, 5, 20), ("zero2", 1, 25, 20)]
    source = None
    for kind, world, first, count in legs:
        curve = pool.run(world, go_on, Case(kind, split=2), source, tmp_path, first, count)[0]
        assert_close(curve, reference[first : first + count])
        source = commit.directory_of(tmp_path, first + count)


def take_weights(world, case, path):
    engine = make(world, case, seed=1)
    engine.load_weights(checkpoint.read_weights(path))
    index, wrong = read_index(path), []
    for name, shard in engine.shards().items():
        if name.endswith("/param"):
            expected = read_tensor(path, index[name])[shard.start : shard.start + shard.local.numel()]
        else:
            expected = torch.zeros(shard.local.numel())
        if not torch.equal(shard.local, expected):
            wrong.append(name)
    updates, curve = engine.updates, steps(engine, world, case, SAVED_AT, MORE)
    engine.close()
    return wrong, updates, curve


def test_weights_alone_start_a_new_run_the_same_way_everywhere(pool, saved):
    """`init_from`: weights of a checkpoint, moments and counters fresh."""
    path, curves = saved["zero3", 3], []
    for kind, world in (
        ("ddp", 2),
        ("fsdp", 1),
        ("fsdp", 3),
        ("hsdp", 4),
        ("zero0", 2),
        ("zero2", 3),
        ("zero3", 2),
    ):
        wrong, updates, curve = pool.run(world, take_weights, case_of(kind, world), path)[-1]
        assert (wrong, updates) == ([], 0)
        curves.append(curve)
    for curve in curves[1:]:
        assert_close(curve, curves[0])
