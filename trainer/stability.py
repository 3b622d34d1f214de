"""When a step is not trusted: not finite, or far above what the last steps were.

A step whose loss or gradient norm is not finite is always left out: the update is dropped on every rank, the
weights stay. So is a spike: a loss or norm more than `sigma` standard deviations above the mean of the last
`window` good steps (OLMo 2 trains with 6 deviations of 128 steps, arXiv 2501.00656). If `patience` steps in
a row were left out, the weights themselves are suspect: the run returns to its last checkpoint and leaves
out the batches it had trained on since (as PaLM did by hand, arXiv 2204.02311, section 5.1). After
`rollbacks` returns it stops: what then helps is a person.

All ranks see the same numbers and vote (`Engine.train_step`); the window is in the checkpoint, so a resumed
run judges as the unbroken one would.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from trainer.errors import UserError


@dataclass
class StabilityConfig:
    """The config group `stability`."""

    sigma: float = (
        6.0  # a spike is so many standard deviations above the mean. 0: only non-finite steps count
    )
    window: int = 128  # good steps that are looked back on; judging begins when half of them are there
    patience: int = 5  # steps left out in a row before the run returns to its last checkpoint. 0: never
    rollbacks: int = 3  # returns in one run before it stops

    def validate(self) -> None:
        if self.sigma < 0 or 0 < self.sigma < 2:
            raise UserError(
                f"stability.sigma={self.sigma}: below 2 ordinary steps are spikes; use 4 to 8, or 0 for none"
            )
        if self.window < 8:
            raise UserError(f"stability.window={self.window}: must be at least 8 steps")
        if self.patience < 0:
            raise UserError(f"stability.patience={self.patience}: must be >= 0 steps (0: never return)")
        if self.rollbacks < 0:
            raise UserError(f"stability.rollbacks={self.rollbacks}: must be >= 0")


# Below this part of the mean a deviation is no spike, however calm the window: 6 sigma of it are 6 %.
CALM = 0.01


class Stability:
    """The window of one run and what follows from it."""

    def __init__(self, config: StabilityConfig):
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.norms: deque[float] = deque(maxlen=config.window)
        self.in_row = 0  # steps left out since the last good one
        self.rollbacks = 0

    def why_not(self, loss: float, norm: float) -> str:
        """Why this step should be left out, in words; "" if it is good."""
        for name, value, window in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if not math.isfinite(value):
                return f"{name} is not finite"
            limit = self._limit(window)
            if value > limit:
                return (
                    f"{name} {value:.4g} is above {limit:.4g}, {self.config.sigma:g} sigma of {len(window)}"
                )
        return ""

    def _limit(self, window: deque[float]) -> float:
        if not self.config.sigma or len(window) < self.config.window // 2:
            return math.inf
        mean = math.fsum(window) / len(window)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in window) / len(window))
        return mean + self.config.sigma * max(deviation, CALM * abs(mean))

    def record(self, loss: float, norm: float, skipped: bool) -> None:
        """Take note of a step that was done or left out."""
        if skipped:
            self.in_row += 1
            return
        self.in_row = 0
        self.losses.append(loss)
        self.norms.append(norm)

    @property
    def must_return(self) -> bool:
        """So many steps in a row were left out that the run should go back to its last checkpoint."""
        return bool(self.config.patience) and self.in_row >= self.config.patience

    def state(self) -> dict[str, Any]:
        """JSON for the checkpoint; floats come back exactly."""
        return {
            "losses": list(self.losses), "norms": list(self.norms), "in_row": self.in_row,
            "rollbacks": self.rollbacks,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """What `state()` said when the checkpoint was saved."""
        self.losses = deque(state["losses"], maxlen=self.config.window)
        self.norms = deque(state["norms"], maxlen=self.config.window)
        self.in_row = state["in_row"]
        self.rollbacks = state["rollbacks"]
