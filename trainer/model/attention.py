"""Who attends to whom, and the kernel that does it.

Shapes: B batch, T query tokens, S key tokens or cache slots, N query heads, K key/value heads, H head width.

A mask is built once per forward, outside the compiled blocks, in the form that its kernel wants; `attend`
picks the kernel by the mask's type, so the choice of back end lives in `build_mask` alone:
- `sdpa`: everywhere. None (plain causal, the fast path) or a bool tensor: B*T*T bytes, dense work under the
  mask.
- `flex`: skips masked blocks. torch has no backward for it on a CPU, so training there is refused.
- `varlen`: flash attention over the packed documents, for CUDA in bf16 or fp16.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from trainer.errors import UserError
from trainer.model.config import ModelConfig


class Varlen(NamedTuple):
    """The batch as one line of B*T tokens, cut into documents."""

    cu_seqlens: Tensor  # int32: document starts, then B*T repeated up to a fixed size
    max_len: int  # the row length: the true maximum would cost a host sync and recompiles
    window: tuple[int, int]  # tokens visible to the left (-1: all) and to the right (0: causal)


Mask = Tensor | BlockMask | Varlen | None
StoreKV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def require_backend(config: ModelConfig, device_type: str, training: bool) -> None:
    """Raise UserError if `config.attention` cannot work there; a stage asks before it writes anything."""
    if config.attention == "varlen" and device_type != "cuda":
        raise UserError(
            f"model.attention=varlen: needs a CUDA device, not {device_type}; use model.attention=sdpa"
        )
    if config.attention == "flex" and device_type == "cpu" and training:
        raise UserError(
            "model.attention=flex: torch has no backward for it on a CPU, only evaluation works; "
            "use model.attention=sdpa"
        )


def build_mask(config: ModelConfig, tokens_BT: Tensor, documents_BT: Tensor | None) -> Mask:
    """The mask of a forward without cache: causal, in `sliding_window`, in equal ids of `documents_BT`.

    A document is a run of equal ids in a row; ids must not come back later in the row (`varlen` only sees the
    runs). Raises UserError where the chosen back end cannot work on this device.
    """
    device, (batch, length) = tokens_BT.device, tokens_BT.shape
    require_backend(config, device.type, training=torch.is_grad_enabled())
    window = config.sliding_window if (config.sliding_window or length) < length else None
    if config.attention == "varlen":
        return varlen_mask(batch, length, documents_BT, window, device)
    if config.attention == "flex":
        return flex_mask(batch, length, documents_BT, window, device)
    if documents_BT is None and window is None:
        return None
    index_T = torch.arange(length, device=device)
    visible = sees(index_T[:, None], index_T[None, :], window)
    if documents_BT is None:
        return visible[None, None]
    return (visible & (documents_BT[:, :, None] == documents_BT[:, None, :]))[:, None]


def sees(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Bool: may the token at index `query` see the one at `key`? Itself and `window - 1` tokens before it."""
    return query >= key if window is None else (query >= key) & (query - key < window)


def flex_mask(
    batch: int, length: int, documents_BT: Tensor | None, window: int | None, device: torch.device
) -> BlockMask:
    """BlockMask for flex_attention; on CUDA built compiled, since eager holds B*T*T booleans."""

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = sees(query, key, window)
        return inside if documents_BT is None else inside & (documents_BT[b, query] == documents_BT[b, key])

    rows = None if documents_BT is None else batch
    create: Callable[..., Any] = create_block_mask if device.type == "cpu" else _compiled(create_block_mask)
    return create(visible, rows, None, length, length, device=str(device))


def varlen_mask(
    batch: int, length: int, documents_BT: Tensor | None, window: int | None, device: torch.device
) -> Varlen:
    """Cuts the batch at row starts and where the document id changes.

    The number of documents varies from batch to batch: it is padded with empty ones to a power of two, so
    that compiled blocks see few shapes. Counting them is one host sync a forward.
    """
    left_right = (-1 if window is None else window - 1, 0)
    total = batch * length
    if documents_BT is None:
        cu_seqlens = torch.arange(0, total + 1, length, dtype=torch.int32, device=device)
        return Varlen(cu_seqlens, length, left_right)
    first_BT = torch.ones(batch, length, dtype=torch.bool, device=device)
    first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = first_BT.flatten().nonzero().squeeze(1)
    padded = 1 << (len(starts) - 1).bit_length()
    cu_seqlens = torch.full((padded + 1,), total, dtype=torch.int32, device=device)
    cu_seqlens[: len(starts)] = starts
    return Varlen(cu_seqlens, length, left_right)


def attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(H)) v as out_BTNH; N/K query heads share each key/value head.

    Grouped heads go to the kernels as they are: on a CPU that took 5 % less time than repeating them, and no
    memory.
    """
    grouped = q_BTNH.shape[2] != k_BSKH.shape[2]
    if isinstance(mask, Varlen):
        return _varlen_attention(q_BTNH, k_BSKH, v_BSKH, mask, grouped)
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    if isinstance(mask, BlockMask):
        # A compiled block inlines the call; eager CUDA must compile it, or it materialises the scores.
        as_is = q.device.type == "cpu" or torch.compiler.is_compiling()
        kernel = flex_attention if as_is else _compiled(flex_attention)
        return kernel(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)  # type: ignore[operator]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def _varlen_attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, mask: Varlen, grouped: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # registers CUDA operators: only where they are used

    if q_BTNH.dtype not in (torch.bfloat16, torch.float16):
        raise UserError(
            f"model.attention=varlen: needs bf16 or fp16, not {q_BTNH.dtype}; lower the precision or use sdpa"
        )
    q, k, v = (x.flatten(0, 1) for x in (q_BTNH, k_BTKH, v_BTKH))
    cu, longest = mask.cu_seqlens, mask.max_len
    out = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=mask.window, enable_gqa=grouped)
    assert isinstance(out, Tensor)  # a tuple only if it is asked for more
    return out.view_as(q_BTNH)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


class KVCache:
    """Keys and values of every layer for decoding; slot == position, so ragged rows need no bookkeeping.

    A query at position p attends to slots 0..p (within the sliding window), which must all have been written.
    Padding written beyond a row's end does no harm: it is overwritten before any query can see it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        shape = (config.num_layers, batch, max_len, config.num_kv_heads, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.batch, self.max_len, self.window = batch, max_len, config.sliding_window
        self._rows = torch.arange(batch, device=device)[:, None]
        self._positions_BT = torch.empty(0)
        self._slots = 0

    def open(self, positions_BT: Tensor) -> Tensor:
        """Begin one forward at these positions ([B or 1, T]); returns its mask, bool [B or 1, 1, T, S].

        On a CPU only the slots in use are attended to; on other devices all of them, which costs no host
        sync. Raises ValueError if a position does not fit (CPU; elsewhere the kernel asserts).
        """
        self._slots = int(positions_BT.max()) + 1 if positions_BT.device.type == "cpu" else self.max_len
        if self._slots > self.max_len:
            raise ValueError(f"position {self._slots - 1} is outside a KV cache of {self.max_len} slots")
        self._positions_BT = positions_BT
        slots_S = torch.arange(self._slots, device=positions_BT.device)
        return sees(positions_BT[:, :, None], slots_S, self.window)[:, None]

    def store(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Write at the open positions; returns (keys_BSKH, values_BSKH) of that layer."""
        self.keys[layer][self._rows, self._positions_BT] = k_BTKH
        self.values[layer][self._rows, self._positions_BT] = v_BTKH
        return self.keys[layer, :, : self._slots], self.values[layer, :, : self._slots]
