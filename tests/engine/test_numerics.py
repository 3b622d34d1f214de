"""The numerics matrix: every back end, world size and accumulation split has the loss and norm of one plain
loop, and that loop has those of the golden curve in this directory.

    python tests/engine/test_numerics.py     writes the golden curve anew: only when the numbers should change
"""

import itertools
import json
import platform
from pathlib import Path

import pytest
import torch
from engine_parts import Case, assert_close, make, pieces, plain_loop, steps

KINDS = ("ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3")
SPLITS = {1: (12, 5), 2: (6, 2), 4: (3, 2)}  # rows per micro-batch; 5, and 2 of 3, leave a ragged last one
GOLDEN = Path(__file__).with_name("golden_curve.json")


def train(world, case):
    engine = make(world, case)
    try:
        return steps(engine, world, case, 0, case.steps)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def reference():
    return {tied: plain_loop(4, tied) for tied in (True, False)}


def test_the_plain_loop_has_the_golden_curve(reference):
    """Change of torch, machine or model code: one place where the numbers themselves are held."""
    golden = json.loads(GOLDEN.read_text())
    for tied, name in ((True, "tied"), (False, "untied")):
        assert_close(reference[tied], golden[name])


def test_the_batches_are_ragged_and_leave_ranks_without_a_supervised_token():
    for world, idle in ((2, [0]), (4, [0, 1])):
        counts = [sum(p.num_items for p in pieces(0, rank, world, 3)) for rank in range(world)]
        assert [rank for rank, count in enumerate(counts) if count == 0] == idle
        assert len(set(counts)) > 1


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_plain_loop(pool, reference, kind, world):
    for split in SPLITS[world]:
        for curve in pool.run(world, train, Case(kind, split)):
            assert_close(curve, reference[True])


@pytest.mark.parametrize("kind", ["fsdp", "zero2", "zero3"])
def test_untied_embeddings(pool, reference, kind):
    assert_close(pool.run(2, train, Case(kind, 3, tied=False))[0], reference[False])


# Every back end with checkpointing alone and with both; each alone on one of each family.
WRAPPED = [
    *(({"activation_checkpoint": "full"}, kind) for kind in KINDS),
    *(({"compile": True, "activation_checkpoint": "full"}, kind) for kind in KINDS),
    *(({"activation_checkpoint": "selective"}, kind) for kind in ("fsdp", "zero3")),
    *(({"compile": True}, kind) for kind in ("fsdp", "zero2", "zero3")),
]


@pytest.mark.parametrize("case", WRAPPED, ids=lambda case: "-".join(map(str, [case[1], *case[0].values()])))
def test_checkpointing_and_compiling_change_nothing(pool, reference, case):
    options, kind = case
    assert_close(pool.run(2, train, Case(kind, 6, options=options))[0], reference[True])


@pytest.mark.parametrize("kind", ["fsdp", "zero2", "zero3"])
def test_cpu_offload_changes_nothing(pool, reference, kind):
    assert_close(pool.run(2, train, Case(kind, 3, options={"offload": "cpu"}))[0], reference[True])


def test_bf16_agrees_between_back_ends_and_worlds(pool, reference):
    """Masters and reductions are fp32 everywhere, so bf16 back ends differ from each other as little as fp32
    ones do; from the fp32 loop they differ by what bf16 can hold (8 bits of mantissa).
    """
    layouts = [(kind, world) for kind in ("ddp", "fsdp", "zero1", "zero2", "zero3") for world in (1, 2, 4)]
    curves = [pool.run(w, train, Case(k, 3, options={"dtype": "bfloat16"}))[0] for k, w in layouts]
    for one, other in itertools.pairwise(curves):
        assert_close(one, other, relative=2e-4)
    assert_close(curves[0], reference[True], relative=5e-3)


def test_the_norm_of_a_million_weights_does_not_show_the_sharding(pool):
    """torch's fp32 norm of so many elements is off by 1e-5 on a CPU, by another 1e-5 for half of them."""
    layouts = [("fsdp", 1), ("fsdp", 2), ("zero0", 2), ("zero2", 2), ("zero3", 2)]
    curves = [pool.run(world, train, Case(kind, 6, steps=2, vocab=32768))[0] for kind, world in layouts]
    for curve in curves[1:]:
        assert_close(curve, curves[0], relative=1e-6)


def test_sharded_groups_that_are_replicated(pool, reference):
    """Four ranks: weights sharded over two, replicated twice; the gradient crosses both mesh dimensions."""
    assert_close(pool.run(4, train, Case("hsdp", 1, options={"shard_size": 2}))[3], reference[True])


def test_persistent_small_parameters_of_zero3(pool, reference):
    assert_close(
        pool.run(2, train, Case("zero3", 3, options={"persistence_threshold": 100}))[0], reference[True]
    )


def write_golden() -> None:
    made = {"torch": torch.__version__, "machine": platform.machine()}
    curves = {name: plain_loop(4, tied) for tied, name in ((True, "tied"), (False, "untied"))}
    GOLDEN.write_text(
        json.dumps({"made with": made, "what": "[loss, gradient norm] per step", **curves}, indent=1)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_golden()
