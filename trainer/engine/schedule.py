"""AdamW's numbers and the learning-rate schedules: pure functions of the step, without torch.

The learning rate of a step depends on the step alone, so a resumed run cannot drift.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

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
    """Learning rate over the run: linear warm-up, then `cosine`, `linear`, `wsd` (warm-up, stable, decay) or
    `constant`.

    `wsd` (MiniCPM, Hu et al. 2024) holds the peak until the last `decay_fraction` of the run and then falls
    by 1 - sqrt(t) (Hägele et al. 2024).
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
    """Rate of 0-based `step` of `steps`. Warm-up reaches the peak at step `warmup_steps`; the last step has
    the final rate.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    t = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    return peak * SCHEDULES[config.kind](min(t, 1.0), config)
