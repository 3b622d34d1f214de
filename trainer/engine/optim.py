"""AdamW with decay groups, and the learning-rate schedules. Both are pure functions of names, shapes and the step.

Weights and embeddings decay; vectors (norm weights, biases) do not, as in GPT-2/3 and Llama training. The learning rate
of a step depends on the step alone, so a resumed run cannot drift.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UserError


@dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019). `lr` is the peak rate of the schedule."""

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0  # global 2-norm of the gradient is clipped to this; 0 turns clipping off
    fused: bool = True

    def validate(self) -> None:
        if not self.lr > 0:
            raise UserError(f"optim.lr={self.lr}: must be > 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)}: must be in [0, 1)")
        for name in ("weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name}={getattr(self, name)}: must be >= 0")


@dataclass
class ScheduleConfig:
    """Learning rate over the run: linear warm-up, then `cosine`, `linear`, `wsd` (warm-up, stable, decay) or `constant`.

    `wsd` (MiniCPM, Hu et al. 2024) holds the peak until the last `decay_fraction` of the run and then falls by
    1 - sqrt(t) (Hägele et al. 2024).
    """

    kind: str = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1  # of the peak rate, reached at the last step
    decay_fraction: float = 0.2  # wsd only: the share of the run that decays

    def validate(self, steps: int) -> None:
        if self.kind not in SCHEDULES:
            raise UserError(f"schedule.kind={self.kind}: choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup_steps < max(steps, 1):
            raise UserError(f"schedule.warmup_steps={self.warmup_steps}: must be in [0, steps={steps})")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"schedule.final_fraction={self.final_fraction}: must be in [0, 1]")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"schedule.decay_fraction={self.decay_fraction}: must be in (0, 1]")


def _cosine(t: float, config: ScheduleConfig) -> float:
    return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * t))


def _linear(t: float, config: ScheduleConfig) -> float:
    return 1 - (1 - config.final_fraction) * t


def _wsd(t: float, config: ScheduleConfig) -> float:
    decayed = (t - (1 - config.decay_fraction)) / config.decay_fraction
    if decayed <= 0:
        return 1.0
    return config.final_fraction + (1 - config.final_fraction) * (1 - math.sqrt(min(decayed, 1.0)))


def _constant(t: float, config: ScheduleConfig) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float, ScheduleConfig], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "constant": _constant,
}


def learning_rate(step: int, steps: int, peak: float, config: ScheduleConfig) -> float:
    """Rate of 0-based `step` of `steps`. Warm-up reaches the peak at step `warmup_steps`; the last step has the final rate."""
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    t = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    return peak * SCHEDULES[config.kind](min(t, 1.0), config)


def decays(shape: Iterable[int]) -> bool:
    """Matrices and embeddings decay; vectors do not. Judged by the full shape, never by a rank's flat slice."""
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
    """Square of the 2-norm over this rank's tensors, fp32 scalar on `device`; sum it over shards, then take the root."""
    if not tensors:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return torch.stack([norm.to(device) for norm in norms]).square().sum()
