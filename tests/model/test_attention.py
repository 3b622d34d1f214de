"""Masks, back ends and the KV cache."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import UserError
from trainer.model.attention import KVCache, attend, build_mask, flex_mask, varlen_mask
from trainer.model.config import ModelConfig
from trainer.model.init import init_weights
from trainer.model.transformer import Transformer

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

B, T, N, K, H = 2, 37, 4, 2, 16
CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 20 + [2] * 12, [7] * 36 + [3]], dtype=torch.int32)
CASES = {
    "causal": (None, None),
    "window": (None, 6),
    "documents": (DOCUMENTS, None),
    "documents+window": (DOCUMENTS, 6),
}


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, H, generator=generator) for heads in (N, K, K))
    return q, k, v


def by_hand(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, documents: Tensor | None, window: int | None
) -> Tensor:
    """Loops over queries and keys: slow, and nothing to get wrong."""
    out = torch.zeros_like(q_BTNH)
    for b in range(B):
        for n in range(N):
            k, v = k_BTKH[b, :, n // (N // K)], v_BTKH[b, :, n // (N // K)]
            for t in range(T):
                seen = [
                    s
                    for s in range(t + 1)
                    if (window is None or t - s < window)
                    and (documents is None or documents[b, s] == documents[b, t])
                ]
                weights = (k[seen] @ q_BTNH[b, t, n] / H**0.5).softmax(0)
                out[b, t, n] = weights @ v[seen]
    return out


@pytest.mark.parametrize("case", CASES)
def test_sdpa_equals_attention_by_hand(case: str):
    documents, window = CASES[case]
    config = ModelConfig(sliding_window=window)
    mask = build_mask(config, torch.zeros(B, T, dtype=torch.int64), documents)
    assert (mask is None) == (case == "causal")  # plain causal takes the kernel's own fast path
    q, k, v = qkv()
    torch.testing.assert_close(
        attend(q, k, v, mask), by_hand(q, k, v, documents, window), rtol=1e-5, atol=1e-6
    )


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_flex_equals_attention_by_hand(case: str):
    documents, window = CASES[case]
    q, k, v = qkv()
    mask = flex_mask(B, T, documents, window, CPU)
    torch.testing.assert_close(
        attend(q, k, v, mask), by_hand(q, k, v, documents, window), rtol=1e-5, atol=1e-6
    )


def varlen_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size,
    enable_gqa,
) -> Tensor:
    """What torch's varlen_attn documents, one document at a time; the kernel itself needs a GPU."""
    assert torch.equal(cu_q, cu_k)
    assert cu_q.dtype == torch.int32
    assert (cu_q.diff() <= max_q).all()
    left, right = window_size
    assert right == 0
    out = torch.zeros_like(q)
    for begin, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist()):
        index = torch.arange(end - begin)
        distance = index[:, None] - index
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        one = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
        out[begin:end] = F.scaled_dot_product_attention(
            *one, attn_mask=seen, enable_gqa=enable_gqa
        ).transpose(0, 1)
    return out


@pytest.mark.parametrize("case", CASES)
def test_varlen_cuts_the_batch_as_the_other_back_ends_mask_it(case: str, monkeypatch: pytest.MonkeyPatch):
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_reference)
    documents, window = CASES[case]
    mask = varlen_mask(B, T, documents, window, CPU)
    q, k, v = (x.bfloat16() for x in qkv())
    expected = by_hand(*(x.float() for x in (q, k, v)), documents, window)
    torch.testing.assert_close(attend(q, k, v, mask).float(), expected, rtol=0.02, atol=0.02)


def test_varlen_pads_the_number_of_documents():
    """So that compiled blocks see few shapes: 5 documents become 8, the last 3 empty."""
    mask = varlen_mask(B, T, DOCUMENTS, None, CPU)
    assert mask.cu_seqlens.tolist() == [0, 5, 25, 37, 73, 74, 74, 74, 74]
    rows = varlen_mask(B, T, None, 4, CPU)
    assert (rows.cu_seqlens.tolist(), rows.window) == ([0, 37, 74], (3, 0))


SHAPE = {
    "vocab_size": 131,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": N,
    "num_kv_heads": K,
    "intermediate_size": 48,
    "init_std": 0.2,
}


def model_of(**options: object) -> Transformer:
    model = Transformer(ModelConfig(**SHAPE | options))
    init_weights(model, seed=0)
    return model


TOKENS = torch.randint(0, 131, (B, T), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_changing_one_document_changes_no_logit_of_another(backend: str, window: int | None):
    model = model_of(attention=backend, sliding_window=window)
    changed = TOKENS.clone()
    changed[0, 5:25] = (changed[0, 5:25] + 1) % 131
    before, after = (model(tokens, documents_BT=DOCUMENTS) for tokens in (TOKENS, changed))
    same = (before == after).all(-1)
    assert same[1].all()
    assert same[0].tolist() == [True] * 5 + [False] * 20 + [True] * 12


@torch.no_grad()
def test_a_packed_document_is_what_it_is_alone():
    model = model_of()
    packed = model(TOKENS, documents_BT=DOCUMENTS)
    torch.testing.assert_close(packed[0, 5:25], model(TOKENS[:1, 5:25])[0], rtol=1e-4, atol=1e-4)
    positions = torch.cat([torch.arange(5), torch.arange(20), torch.arange(12)])[None].expand(B, -1)
    again = model(TOKENS, documents_BT=DOCUMENTS, positions_BT=positions)
    torch.testing.assert_close(again[0, 5:25], model(TOKENS[:1, 5:25])[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_the_back_ends_give_one_model(documents: Tensor | None):
    sdpa, flex = model_of(attention="sdpa"), model_of(attention="flex")
    a, b = (model(TOKENS, documents_BT=documents) for model in (sdpa, flex))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_back_ends_refuse_in_words_what_they_cannot_do():
    with pytest.raises(UserError, match=r"model\.attention=varlen: needs a CUDA device, not cpu"):
        model_of(attention="varlen")(TOKENS)
    with pytest.raises(UserError, match=r"model\.attention=flex: torch has no backward for it on a CPU"):
        model_of(attention="flex")(TOKENS)
    with pytest.raises(UserError, match=r"model\.attention=varlen: needs bf16 or fp16"):
        attend(*qkv(), varlen_mask(B, T, None, None, CPU))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"sliding_window": 6}, {"attention": "flex"}, {"qk_norm": True}])
def test_decoding_token_by_token_equals_the_full_forward(options: dict):
    model = model_of(**options)
    full = model(TOKENS)
    cache = KVCache(model.config, B, 40, torch.float32)
    pieces = [model(TOKENS[:, :20], cache=cache)]
    for t in range(20, T):
        pieces.append(model(TOKENS[:, t : t + 1], positions_BT=torch.full((B, 1), t), cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_ragged_prompts_padded_on_the_right_decode_as_if_alone():
    model = model_of()
    lengths = torch.tensor([9, 20])
    prompts = TOKENS[:, :20].clone()
    prompts[0, 9:] = 0  # padding: written to slots 9..19, overwritten one by one as the row grows
    cache = KVCache(model.config, B, 40, torch.float32)
    last = model(prompts, cache=cache, logits_at_B=lengths - 1)
    step = [last]
    for i in range(8):
        positions = (lengths + i)[:, None]
        step.append(model(TOKENS.gather(1, positions), positions_BT=positions, cache=cache)[:, 0])
    decoded = torch.stack(step, 1)
    for row, length in enumerate(lengths.tolist()):
        alone = model(TOKENS[row : row + 1, : length + 8])[0, length - 1 :]
        torch.testing.assert_close(decoded[row], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_prefix_may_be_continued_in_pieces():
    model = model_of()
    cache = KVCache(model.config, B, T, torch.float32)
    model(TOKENS[:, :10], cache=cache)
    rest = model(TOKENS[:, 10:], positions_BT=torch.arange(10, T)[None], cache=cache)
    torch.testing.assert_close(rest, model(TOKENS)[:, 10:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_cache_refuses_what_does_not_fit():
    model = model_of()
    cache = KVCache(model.config, B, 8, torch.float32)
    with pytest.raises(ValueError, match="position 8 is outside a KV cache of 8 slots"):
        model(TOKENS[:, :9], cache=cache)
    with pytest.raises(ValueError, match="a cached row is one document"):
        model(TOKENS[:, :8], cache=cache, documents_BT=DOCUMENTS[:, :8])


def test_gradients_do_not_cross_documents():
    model = model_of()
    model.embed.weight.requires_grad_(True)
    targets = torch.full((B, T), -100)
    targets[0, 5:25] = TOKENS[0, 5:25]
    tokens = (
        torch.arange(B * T).view(B, T) % 131
    )  # every position its own token: its gradient is its row of embed
    (gradient,) = torch.autograd.grad(
        model(tokens, targets_BT=targets, documents_BT=DOCUMENTS), model.embed.weight
    )
    touched = (gradient != 0).any(1).nonzero().flatten().tolist()
    assert touched == tokens[0, 5:25].tolist()
