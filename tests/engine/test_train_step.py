"""What the engine promises besides its numbers: skipping, agreement, evaluation, initial weights, whole
tensors.
"""

import math
from dataclasses import replace

import pytest
import torch
from engine_parts import (
    OPTIM,
    Case,
    LossSum,
    assert_close,
    loss,
    make,
    model_config,
    pieces,
    plain_loop,
    steps,
)

from trainer.engine.config import EngineConfig
from trainer.engine.schedule import OptimConfig, ScheduleConfig, learning_rate
from trainer.engine.world import engine_of_launcher, launch_from_env
from trainer.errors import UserError
from trainer.model.init import init_weights
from trainer.model.transformer import Transformer

BACK_ENDS = ["fsdp", "zero0", "zero1", "zero2", "zero3"]


def whole(world, case, count):
    engine = make(world, case)
    steps(engine, world, case, 0, count)
    found = {name: tensor.clone() for name, tensor in engine.full_tensors()}
    engine.close()
    return found


@pytest.mark.parametrize("kind", BACK_ENDS)
@pytest.mark.parametrize("world", [1, 2])
def test_initial_weights_do_not_depend_on_sharding(pool, kind, world):
    model = Transformer(model_config())
    init_weights(model, 0)
    found = pool.run(world, whole, Case(kind), 0)[-1]
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name


def train_with_poison(world, case, poison):
    """Step 1 of 4 is poisoned on the last rank only: `loss` an infinite loss, `gradient` a NaN behind a
    finite loss.
    """
    engine = make(world, case)
    results = []

    def poisoned(model, piece):
        clean = loss(model, piece)
        if poison == "loss":
            return LossSum(clean.total * math.inf, clean.metrics)
        return LossSum(clean.total + NanGradient.apply(clean.total), clean.metrics)

    for step in range(4):
        bad = step == 1 and world.rank == world.size - 1
        micros = pieces(step, world.rank, world.size, case.split)
        results.append(engine.train_step(micros, poisoned if bad else loss, 1e-3))
    found = ([r.skipped for r in results], [r.grad_norm for r in results], engine.updates)
    weights = torch.cat([t.flatten() for _, t in engine.full_tensors()])
    engine.close()
    return *found, bool(weights.isfinite().all())


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 0.0

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((k, "float32") for k in BACK_ENDS), ("zero1", "bfloat16"), ("zero2", "bfloat16")]
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(pool, kind, dtype, poison):
    for skipped, norms, updates, finite in pool.run(
        2, train_with_poison, Case(kind, options={"dtype": dtype}), poison
    ):
        assert skipped == [False, True, False, False]
        assert norms[1] == math.inf
        assert all(math.isfinite(n) for i, n in enumerate(norms) if i != 1)
        assert updates == 3  # AdamW's bias correction must not count the skipped one
        assert finite


def train_with_refusal(world, case):
    """The last rank refuses step 1 for a reason of its own; then a fifth step repeats it."""
    engine = make(world, case)
    results = []
    for step in (0, 1, 1, 2, 3):
        refuse = len(results) == 1 and world.rank == world.size - 1
        micros = pieces(step, world.rank, world.size, case.split)
        results.append(engine.train_step(micros, loss, OPTIM.lr, lambda *_, bad=refuse: not bad))
    updates = engine.updates
    engine.close()
    return [(r.loss, r.grad_norm) for r in results], [r.skipped for r in results], updates


@pytest.mark.parametrize(("kind", "dtype"), [*((k, "float32") for k in BACK_ENDS), ("zero2", "bfloat16")])
def test_a_refused_step_leaves_no_trace(pool, kind, dtype):
    """What follows is what would have followed without it: weights, moments and counters are untouched."""
    for curve, skipped, updates in pool.run(
        2, train_with_refusal, Case(kind, options={"dtype": dtype, "offload": "none"})
    ):
        assert skipped == [False, True, False, False, False]
        assert curve[1] == pytest.approx(curve[2], rel=1e-7)  # finite, and the same when it is done again
        assert updates == 4
        if dtype == "float32":
            assert_close([c for i, c in enumerate(curve) if i != 1], plain_loop(4))


def evaluate(world, case):
    engine = make(world, case)
    before = steps(engine, world, case, 0, 1)
    sums = engine.evaluate(pieces(1, world.rank, world.size, case.split), loss)
    after = steps(engine, world, case, 1, 1)
    engine.close()
    return before, sums, after


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_evaluation_sums_over_ranks_and_leaves_training_alone(pool, kind):
    (_, sums, after) = pool.run(2, evaluate, Case(kind))[0]
    (_, alone, after_alone) = pool.run(1, evaluate, Case(kind))[0]
    assert sums["items"] == alone["items"] == sum(p.num_items for p in pieces(1, 0, 1, 2))
    assert sums["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert sums["rows"] == 12
    assert after[0] == pytest.approx(after_alone[0], rel=1e-5)
    assert sums["loss"] / sums["items"] == pytest.approx(
        after[0][0], rel=1e-6
    )  # the next step's loss is the same


def masked_step(world, case):
    engine = make(world, case)
    start = torch.cat([t.flatten().clone() for _, t in engine.full_tensors()])
    micros = [
        replace(p, targets_BT=torch.full_like(p.targets_BT, -100), num_items=0)
        for p in pieces(0, world.rank, world.size, 2)
    ]
    result = engine.train_step(micros, loss, 0.0)
    end = torch.cat([t.flatten() for _, t in engine.full_tensors()])
    engine.close()
    return result.loss, result.grad_norm, result.num_items, torch.equal(start, end)


@pytest.mark.parametrize("kind", ["fsdp", "zero2", "zero3"])
def test_a_step_without_a_supervised_token_has_zero_loss_and_gradient(pool, kind):
    assert pool.run(2, masked_step, Case(kind))[0] == (0.0, 0.0, 0, True)


def words(world):
    hashes = world.sum_words([(1 << 63) + world.rank, 3])
    return world.agree(1 << world.rank), hashes, world.gather(world.rank)


def test_ranks_agree_on_words(pool):
    for agreed, hashes, gathered in pool.run(2, words):
        assert agreed == 0b11
        assert hashes == [1, 6]  # modulo 2**64
        assert gathered == [0, 1]


def test_batch_hash_does_not_depend_on_the_split(pool):
    hashes = {
        pool.run(world, batch_hash, Case(split=split))[0]
        for world, split in ((1, 12), (1, 5), (2, 6), (2, 1))
    }
    assert len(hashes) == 1


def batch_hash(world, case):
    engine = make(world, case)
    found = engine.train_step(pieces(0, world.rank, world.size, 1), loss, 0.0).batch_hash
    engine.close()
    return found


def test_launchers_are_read_from_the_environment():
    assert launch_from_env({}).world == 1
    torchrun = launch_from_env({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (torchrun.rank, torchrun.world, torchrun.local_rank, torchrun.name) == (3, 8, 1, "torchrun")
    srun = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert launch_from_env({**srun, "MASTER_ADDR": "n1"}).rank == 1
    with pytest.raises(UserError, match="MASTER_ADDR"):
        launch_from_env(srun)
    with pytest.raises(UserError, match="WORLD_SIZE"):
        launch_from_env({"RANK": "0"})


def test_the_engine_that_accelerate_names():
    assert engine_of_launcher({}) is None
    assert (
        engine_of_launcher({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})
        == "zero3"
    )
    assert engine_of_launcher({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}) == "fsdp"
    with pytest.raises(UserError, match="fsdp_version"):
        engine_of_launcher({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"kind": "zero4"}, "engine.kind"),
        ({"dtype": "float16"}, "engine.dtype"),
        ({"kind": "fsdp", "shard_size": 2}, "engine.shard_size"),
        ({"kind": "fsdp", "deepspeed": {"a": 1}}, "engine.deepspeed"),
        ({"kind": "ddp", "offload": "cpu"}, "engine.offload"),
        ({"kind": "zero0", "dtype": "bfloat16"}, "engine.dtype"),
    ],
)
def test_engine_configs_that_cannot_work_are_refused(changes, key):
    with pytest.raises(UserError, match=key):
        EngineConfig(**changes).validate()


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_schedules_warm_up_to_the_peak_and_end_at_the_final_rate(kind):
    config = ScheduleConfig(kind, warmup_steps=10, final_fraction=0.1, decay_fraction=0.2)
    rates = [learning_rate(step, 100, 2.0, config) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] == pytest.approx(2.0 / 11)
    assert rates[10] == 2.0
    assert rates[-1] == pytest.approx(2.0 if kind == "constant" else 0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    if kind == "wsd":
        assert rates[80] == 2.0
        assert rates[90] < 2.0


def test_optimizer_and_schedule_mistakes_name_their_key():
    with pytest.raises(UserError, match=r"optim\.lr"):
        OptimConfig(lr=0).validate()
    with pytest.raises(UserError, match=r"schedule\.warmup_steps"):
        ScheduleConfig(warmup_steps=100).validate(steps=100)
