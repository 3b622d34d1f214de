"""Initial weights: a pure function of (seed, name, index), with the statistics of GPT-2."""

import math
from itertools import pairwise

import pytest
import torch

from trainer.model.config import ModelConfig
from trainer.model.init import init_range, init_std, init_weights
from trainer.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=500, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, qk_norm=True, qkv_bias=True
)


def whole(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return init_range(CONFIG, name, shape, 0, math.prod(shape), seed)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_draw_together_what_one_rank_draws_alone(ranks: int):
    name, shape = "blocks.1.mlp.up.weight", (64, 33)
    total = math.prod(shape)
    cuts = [total * rank // ranks for rank in range(ranks + 1)]
    parts = [init_range(CONFIG, name, shape, a, b - a, seed=5) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole(name, shape, seed=5))


def test_a_slice_does_not_depend_on_the_chunks_it_is_drawn_in():
    shape = (3, 1 << 20)  # keyed draws 2^20 elements at a time
    start = (1 << 20) - 5
    part = init_range(CONFIG, "embed.weight", shape, start, 10, seed=0)
    assert torch.equal(part, whole("embed.weight", shape)[start : start + 10])


def test_seeds_and_names_give_other_numbers():
    a = whole("blocks.0.mlp.up.weight", (64, 64))
    assert not torch.equal(a, whole("blocks.1.mlp.up.weight", (64, 64)))
    assert not torch.equal(a, whole("blocks.0.mlp.gate.weight", (64, 64)))
    assert not torch.equal(a, whole("blocks.0.mlp.up.weight", (64, 64), seed=1))


def test_the_statistics_of_every_parameter():
    model = Transformer(CONFIG)
    init_weights(model, seed=0)
    seen = set()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(6) if residual else 0.02
            assert init_std(CONFIG, name) == std
            count = parameter.numel()
            assert abs(parameter.std().item() / std - 1) < 5 / math.sqrt(2 * count), name
            assert abs(parameter.mean().item() / std) < 5 / math.sqrt(count), name
        seen.add(name.rsplit(".", 2)[-2])
    assert seen >= {"embed", "head", "q", "k", "v", "o", "q_norm", "attn_norm", "norm", "gate", "up", "down"}


def test_a_tied_head_is_the_embedding_under_either_name():
    tied = ModelConfig(vocab_size=50, hidden_size=8, tie_embeddings=True)
    a, b = (init_range(tied, name, (50, 8), 7, 9, seed=0) for name in ("embed.weight", "head.weight"))
    assert torch.equal(a, b)
    assert not torch.equal(whole("embed.weight", (500, 64)), whole("head.weight", (500, 64)))


def test_a_slice_outside_the_tensor_is_refused():
    with pytest.raises(ValueError, match=r"slice 9\+2 is outside a tensor of shape \(2, 5\)"):
        init_range(CONFIG, "embed.weight", (2, 5), 9, 2, seed=0)


def test_the_first_loss_is_that_of_guessing():
    model = Transformer(CONFIG)
    init_weights(model, seed=0)
    tokens = torch.randint(0, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    loss = model(tokens, targets_BT=tokens.roll(-1, 1)).item() / tokens.numel()
    assert loss == pytest.approx(math.log(500), rel=0.01)
