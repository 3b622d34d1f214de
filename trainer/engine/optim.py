"""AdamW with decay groups: weights and embeddings decay, vectors (norm weights, biases) do not, as in GPT-3
and Llama.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainer.engine.schedule import OptimConfig


def decays(shape: Iterable[int]) -> bool:
    """Matrices and embeddings decay; vectors do not. Judged by the full shape, never by a rank's flat
    slice.
    """
    return len(tuple(shape)) >= 2


MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a tensor, under the names that a checkpoint gives them


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `groups` ({params, weight_decay}); empty groups are dropped since DeepSpeed refuses them."""
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.fused,
    )


def allocate_moments(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Create zero moments now instead of at the first step, so that a checkpoint can be read into them."""
    fused = optimizer.defaults["fused"]
    for tensor in tensors:
        step = torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu")
        optimizer.state[tensor] = {"step": step, **{name: torch.zeros_like(tensor) for name in MOMENTS}}


def updates_done(optimizer: torch.optim.Optimizer) -> int:
    """How many updates AdamW has made: its bias correction depends on it, and skipped steps do not count."""
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def set_updates_done(optimizer: torch.optim.Optimizer, count: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(count)


def squared_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Square of the 2-norm over this rank's tensors, fp64 scalar on `device`; sum over shards, then the root.

    In fp64: torch's fp32 norm of a million elements on a CPU is off by 1e-5, and by another 1e-5 for half of
    them, so sharding would show in the norm, in the clipping and, some 50 steps later, in the fifth digit of
    the loss.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64)
    return torch.stack([norm.to(device) for norm in norms]).square().sum()


def clip(tensors: list[Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients of global `norm` down to `max_norm` in place; 0 means no clipping."""
    if 0 < max_norm < norm:
        torch._foreach_mul_(tensors, max_norm / (norm + 1e-6))
