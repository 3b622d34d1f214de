"""Activation checkpointing and compilation of the blocks, shared by both back ends.

Order, and why: checkpointing goes inside compilation (the compiler then sees one region and schedules the
recompute), and both replace a block's `forward`, not the block: the hooks by which FSDP2 and ZeRO-3 gather
weights sit on the module call and stay outside the compiled graph, and no wrapper prefix ever reaches a
parameter's name.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.engine.config import EngineConfig

# Selective checkpointing keeps what is dear to compute and cheap to keep; norms, RoPE, SwiGLU are recomputed.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(forward: Callable[..., Any], kind: str) -> Callable[..., Any]:
    context = functools.partial(create_selective_checkpoint_contexts, _policy)
    extra: dict[str, Any] = {"context_fn": context} if kind == "selective" else {}

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # No dropout anywhere in the model, so there is no RNG state to stash and restore.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **extra, **kwargs)

    return run


def wrap_blocks(blocks: nn.ModuleList, config: EngineConfig) -> None:
    """Apply checkpointing, then per-block compilation, in place; call it before sharding."""
    for block in blocks:
        if config.activation_checkpoint != "none":
            block.forward = _checkpointed(block.forward, config.activation_checkpoint)
        if config.compile:
            block.forward = torch.compile(block.forward)
