"""The language model: a decoder-only transformer of the Llama 3 / Qwen 3 family, with no parallelism inside.

Shapes: B batch, T tokens, D hidden width, N query heads, K key/value heads, H head width, F = H/2, M MLP
width, V vocabulary. An engine compiles, checkpoints and shards `blocks` one by one; nothing here knows about
it. A block takes all it needs as arguments, and casts side inputs itself: FSDP2 hands them over in bf16,
DeepSpeed in fp32.
"""

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model import loss
from trainer.model.attention import KVCache, Mask, StoreKV, attend, build_mask
from trainer.model.config import ModelConfig
from trainer.model.rope import rope_tables, rotate

IGNORE = loss.IGNORE
Rope = tuple[Tensor, Tensor]  # (cos_BTF, sin_BTF), B may be 1


class Attention(nn.Module):
    """Grouped-query attention with RoPE; optional biases (Qwen 2) and per-head norms of q and k (Qwen 3)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, H, N, K = config.hidden_size, config.head_size, config.num_heads, config.num_kv_heads
        self.q = nn.Linear(D, N * H, bias=config.qkv_bias)
        self.k = nn.Linear(D, K * H, bias=config.qkv_bias)
        self.v = nn.Linear(D, K * H, bias=config.qkv_bias)
        self.o = nn.Linear(N * H, D, bias=False)
        self.q_norm = nn.RMSNorm(H, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(H, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.head_size = H

    def forward(self, hidden_BTD: Tensor, rope: Rope, mask: Mask, store: StoreKV | None = None) -> Tensor:
        heads = (-1, self.head_size)
        q_BTNH, k_BTKH, v_BTKH = (f(hidden_BTD).unflatten(-1, heads) for f in (self.q, self.k, self.v))
        q_BTNH, k_BTKH = rotate(self.q_norm(q_BTNH), *rope), rotate(self.k_norm(k_BTKH), *rope)
        keys, values = (k_BTKH, v_BTKH) if store is None else store(k_BTKH, v_BTKH)
        return self.o(attend(q_BTNH, keys, values, mask).flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, M = config.hidden_size, config.intermediate_size
        self.gate = nn.Linear(D, M, bias=False)
        self.up = nn.Linear(D, M, bias=False)
        self.down = nn.Linear(M, D, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden_BTD)) * self.up(hidden_BTD))


class Block(nn.Module):
    """One layer: the unit of compilation, activation checkpointing and sharding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden_BTD: Tensor, rope: Rope, mask: Mask, store: StoreKV | None = None) -> Tensor:
        hidden_BTD = hidden_BTD + self.attn(self.attn_norm(hidden_BTD), rope, mask, store)
        return hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))


class Head(nn.Module):
    """Output projection and loss in one: engines gather a parameter only inside its module's forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.chunk = config.loss_chunk_tokens

    def forward(self, hidden_BTD: Tensor, targets_BT: Tensor | None = None, reduction: str = "sum") -> Tensor:
        if targets_BT is None:
            return F.linear(hidden_BTD, self.weight).float()
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
        if reduction == "sum":
            return loss.linear_cross_entropy_sum(hidden_ND, self.weight, targets_N, self.chunk)
        if reduction == "none":
            nll_N = loss.linear_cross_entropy(hidden_ND, self.weight, targets_N, self.chunk)
            return nll_N.view_as(targets_BT)
        raise ValueError(f"reduction={reduction!r}: 'sum' or 'none'; only the engine divides")


class Transformer(nn.Module):
    """tokens -> logits or loss. May be built on the meta device; `init_weights` gives it its weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = Head(config)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.embed.weight = self.head.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Ties again what `to_empty`, which makes a new Parameter for every name, has torn apart."""
        super()._apply(fn, recurse)
        self._tie()
        return self

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        targets_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: KVCache | None = None,
        logits_at_B: Tensor | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """Logits, or the loss if there are targets.

        targets None: logits_BTV in fp32, or logits_BV of the one position per row that `logits_at_B` (int64)
        names. targets, "sum": scalar fp32 sum of -log p(target) over the targets that are not IGNORE.
        targets, "none": nll_BT in fp32, 0 where IGNORE.
        `positions_BT` ([B or 1, T], default 0..T-1) turns RoPE and, with a `cache`, names the slots to write:
        a query then attends to the slots up to its own position. `documents_BT`: attention stays within runs
        of equal ids. Raises UserError where `config.attention` cannot work on this device.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        if cache is not None and documents_BT is not None:
            raise ValueError("documents_BT and cache together: a cached row is one document")
        mask = build_mask(self.config, tokens_BT, documents_BT) if cache is None else cache.open(positions_BT)
        rope = rope_tables(self.config, positions_BT)
        hidden_BTD = self.embed(tokens_BT)
        for layer, block in enumerate(self.blocks):
            hidden_BTD = block(hidden_BTD, rope, mask, None if cache is None else partial(cache.store, layer))
        hidden_BTD = self.norm(hidden_BTD)
        if logits_at_B is not None:
            hidden_BTD = hidden_BTD[torch.arange(len(hidden_BTD), device=tokens_BT.device), logits_at_B]
        return self.head(hidden_BTD, targets_BT, reduction)
