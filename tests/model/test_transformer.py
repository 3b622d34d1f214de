"""The model's own promises: what depends on what, what the loss is, how it is built."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer.model.config import ModelConfig
from trainer.model.init import init_weights
from trainer.model.transformer import IGNORE, Transformer

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "loss_chunk_tokens": 13,
}
TOKENS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(1))


def model_of(**options: object) -> Transformer:
    config = ModelConfig(**SHAPE | {"init_std": 0.2} | options)
    model = Transformer(config)
    init_weights(model, seed=0)
    return model


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_cross_entropy_of_the_logits_in_value_and_gradient(tied: bool):
    model = model_of(tie_embeddings=tied)
    targets = TARGETS.clone()
    targets[0, 5:9] = IGNORE
    plain = F.cross_entropy(
        model(TOKENS).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE
    )
    expected = gradients(model, plain)
    for reduction in ("sum", "none"):
        loss = model(TOKENS, targets_BT=targets, reduction=reduction).sum()
        torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
        for name, gradient in gradients(model, loss).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


def test_token_losses_come_in_the_shape_of_the_targets():
    model = model_of()
    nll = model(TOKENS, targets_BT=TARGETS, reduction="none")
    logp = model(TOKENS).log_softmax(-1).gather(2, TARGETS[..., None]).squeeze(2)
    torch.testing.assert_close(nll, -logp, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="only the engine divides"):
        model(TOKENS, targets_BT=TARGETS, reduction="mean")


def test_logits_at_one_position_per_row():
    model = model_of()
    at = torch.tensor([3, 20])
    torch.testing.assert_close(model(TOKENS, logits_at_B=at), model(TOKENS)[torch.arange(2), at])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qkv_bias": True}, {"head_dim": 16}])
def test_no_logit_depends_on_a_later_token(options: dict):
    model = model_of(**options)
    changed = TOKENS.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 131
    before, after = model(TOKENS), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(-1).all()


@torch.no_grad()
def test_a_sliding_window_sees_its_last_tokens_only():
    """One layer: with n layers information travels n windows."""
    model = model_of(num_layers=1, sliding_window=4)
    changed = TOKENS.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 131
    differs = (model(TOKENS) != model(changed)).any(-1).any(0)
    assert differs.nonzero().flatten().tolist() == [10, 11, 12, 13]


@torch.no_grad()
def test_positions_are_relative():
    model = model_of()
    shifted = torch.arange(24)[None] + 1000
    torch.testing.assert_close(model(TOKENS), model(TOKENS, positions_BT=shifted), rtol=1e-3, atol=1e-3)
    stretched = torch.arange(24)[None] * 2
    assert (model(TOKENS) - model(TOKENS, positions_BT=stretched)).abs().max() > 0.1


def test_a_meta_build_allocates_nothing_and_is_the_same_model():
    built = model_of(tie_embeddings=True, qk_norm=True)
    with torch.device("meta"):
        meta = Transformer(built.config)
    assert all(tensor.is_meta for tensor in [*meta.parameters(), *meta.buffers()])
    meta.to_empty(device="cpu")
    init_weights(meta, seed=0)
    assert meta.head.weight is meta.embed.weight
    assert torch.equal(built(TOKENS), meta(TOKENS))


def test_meta_forward_gives_the_shapes():
    with torch.device("meta"):
        model = Transformer(ModelConfig(**SHAPE))
        tokens = torch.empty(2, 24, dtype=torch.int64)
        assert model(tokens).shape == (2, 24, 131)


def test_nothing_but_parameters_is_stored():
    """Buffers would need care in every engine and checkpoint; there are none."""
    assert list(model_of().buffers()) == []
    names = list(model_of(tie_embeddings=True, qkv_bias=True, qk_norm=True).state_dict())
    assert "blocks.1.attn.q.bias" in names
    assert "blocks.0.attn.k_norm.weight" in names
    assert not [name for name in names if name.endswith("o.bias")]


def test_blocks_compile_one_by_one():
    model = model_of()
    expected = gradients(model, model(TOKENS, targets_BT=TARGETS))
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for name, gradient in gradients(model, model(TOKENS, targets_BT=TARGETS)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


def test_blocks_checkpoint_one_by_one():
    model = model_of()
    documents = (torch.arange(24) // 7)[None].expand(2, -1)
    expected = gradients(model, model(TOKENS, targets_BT=TARGETS, documents_BT=documents))
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    for name, gradient in gradients(model, model(TOKENS, targets_BT=TARGETS, documents_BT=documents)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


def test_bf16_weights_take_fp32_or_bf16_side_inputs():
    """FSDP2 casts a block's floating-point inputs, DeepSpeed does not: either way the block must work."""
    model = model_of().bfloat16()
    logits = model(TOKENS)
    assert logits.dtype == torch.float32
    block = model.blocks[0]
    hidden = torch.randn(2, 24, 32, dtype=torch.bfloat16)
    cos, sin = torch.rand(1, 24, 4), torch.rand(1, 24, 4)
    fp32 = block(hidden, (cos, sin), None)
    bf16 = block(hidden, (cos.bfloat16(), sin.bfloat16()), None)
    assert fp32.dtype == bf16.dtype == torch.bfloat16
    torch.testing.assert_close(fp32, bf16, rtol=0.05, atol=0.05)
    exact = model_of()
    assert (logits - exact(TOKENS)).norm() / exact(TOKENS).norm() < 0.05


def test_a_small_model_learns_a_short_text_by_heart():
    model = model_of(init_std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        (model(TOKENS[:, :-1], targets_BT=TOKENS[:, 1:]) / 46).backward()
        optimizer.step()
    assert model(TOKENS[:, :-1], targets_BT=TOKENS[:, 1:]).item() / 46 < 0.1
