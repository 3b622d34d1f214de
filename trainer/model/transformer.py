"""The language model: a decoder-only transformer of the Llama 3 / Qwen 3 family, with no parallelism inside.

Shapes: B batch, T tokens, D hidden width, N query heads, K key/value heads, H head width, M MLP width, V vocabulary,
S cache slots. The engine shards, compiles and checkpoints `blocks` one by one; this file does not know about it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model import loss
from trainer.model.attention import KVCache, allowed_BTS, attend, attention_mask
from trainer.model.config import ModelConfig
from trainer.model.rope import rope_tables, rotate

IGNORE = loss.IGNORE


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, H, N, K = config.hidden_size, config.head_size, config.num_heads, config.num_kv_heads
        self.head_size = H
        self.q = nn.Linear(D, N * H, bias=config.qkv_bias)
        self.k = nn.Linear(D, K * H, bias=config.qkv_bias)
        self.v = nn.Linear(D, K * H, bias=config.qkv_bias)
        self.o = nn.Linear(N * H, D, bias=False)
        self.q_norm = nn.RMSNorm(H, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(H, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, hidden_BTD, rope, mask, cache=None):
        q_BTNH, k_BTKH, v_BTKH = (f(hidden_BTD).unflatten(-1, (-1, self.head_size)) for f in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, *rope), rotate(k_BTKH, *rope)
        if cache is None:
            out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, mask)
        else:
            keys_BSKH, values_BSKH, slots = cache
            keys_BSKH[slots], values_BSKH[slots] = k_BTKH, v_BTKH
            out_BTNH = attend(q_BTNH, keys_BSKH, values_BSKH, mask)
        return self.o(out_BTNH.flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden_BTD)) * self.up(hidden_BTD))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden_BTD, rope, mask, cache=None):
        hidden_BTD = hidden_BTD + self.attn(self.attn_norm(hidden_BTD), rope, mask, cache)
        return hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))


class Head(nn.Module):
    """The output projection and the loss, together: engines gather a parameter only inside its module's forward."""

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
        return loss.linear_cross_entropy(hidden_ND, self.weight, targets_N, self.chunk).view_as(targets_BT)


class Transformer(nn.Module):
    """tokens -> logits or loss. Weights are uninitialised until `init_weights`; may be built under device("meta")."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

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

        targets None: logits_BTV in fp32, or logits_BV of the one position per row that `logits_at_B` (int64) names.
        targets, "sum": scalar fp32 sum of -log p(target) over targets that are not IGNORE.
        targets, "none": nll_BT in fp32, 0 where IGNORE.
        `documents_BT`: attention only between equal ids. `positions_BT`: RoPE positions (default 0..T-1), and with a
        `cache` also the slots that are written; a query attends to the slots up to its own position.
        """
        batch, length = tokens_BT.shape
        if positions_BT is None:
            positions_BT = torch.arange(length, device=tokens_BT.device)[None]
        rope = rope_tables(self.config, positions_BT)
        if cache is None:
            mask = attention_mask(self.config, batch, length, documents_BT, tokens_BT.device)
        else:
            slots = int(positions_BT.max()) + 1 if tokens_BT.device.type == "cpu" else cache.max_len
            slots_S = torch.arange(slots, device=tokens_BT.device)[None]
            mask = allowed_BTS(positions_BT, slots_S, self.config.sliding_window)[:, None]
            where = (torch.arange(batch, device=tokens_BT.device)[:, None], positions_BT)
        hidden_BTD = self.embed(tokens_BT)
        for index, block in enumerate(self.blocks):
            hidden_BTD = block(hidden_BTD, rope, mask, None if cache is None else (*cache.layer(index, slots), where))
        hidden_BTD = self.norm(hidden_BTD)
        if targets_BT is not None:
            return self.head(hidden_BTD, targets_BT, reduction)
        if logits_at_B is not None:
            hidden_BTD = hidden_BTD[torch.arange(batch, device=tokens_BT.device), logits_at_B]
        return self.head(hidden_BTD)
