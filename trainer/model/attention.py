"""Who attends to whom, and the kernel that does it.

Shapes: B batch, T query tokens, S key tokens or cache slots, N query heads, K key/value heads, H head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model.config import ModelConfig


class KVCache:
    """Keys and values of every layer for decoding; slot index == position, so ragged rows need no bookkeeping.

    A row may be written in any order; a query at position p attends to slots 0..p, which must all have been written.
    Padding written beyond a row's end does no harm: it is overwritten before any query can see it.
    """

    def __init__(
        self, config: ModelConfig, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        shape = (config.num_layers, batch, max_len, config.num_kv_heads, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.batch, self.max_len = batch, max_len

    def layer(self, index: int, slots: int) -> tuple[Tensor, Tensor]:
        """(keys_BSKH, values_BSKH) of one layer, the first `slots` positions; views, to be written in place."""
        return self.keys[index, :, :slots], self.values[index, :, :slots]


def allowed_BTS(
    query_T: Tensor, key_S: Tensor, window: int | None, query_docs: Tensor | None = None, key_docs: Tensor | None = None
) -> Tensor:
    """True where the query position may see the key position; inputs broadcast as [.., T, 1] against [.., 1, S]."""
    distance = query_T[..., :, None] - key_S[..., None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    if query_docs is not None and key_docs is not None:
        allowed = allowed & (query_docs[..., :, None] == key_docs[..., None, :])
    return allowed


def attention_mask(config: ModelConfig, batch: int, length: int, documents_BT: Tensor | None, device: torch.device) -> Tensor | None:
    """What `attend` needs to know, built once per forward for all layers; None is plain causal."""
    window = config.sliding_window if config.sliding_window is not None and config.sliding_window < length else None
    if documents_BT is None and window is None:
        return None
    index_T = torch.arange(length, device=device)[None]
    return allowed_BTS(index_T, index_T, window, documents_BT, documents_BT)[:, None]


def attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(H)) v, grouped heads, as out_BTNH."""
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1)
    return out.transpose(1, 2)
