"""When to save and what to keep."""

from dataclasses import dataclass

from trainer.errors import UserError


@dataclass
class CheckpointConfig:
    """Besides these, every run saves at its last step and at every agreed stop."""

    every: int = 1000  # steps; 0: only at the end and on a stop
    background: bool = True  # the step waits only for a copy in host memory, not for the disk
    keep_last: int = 2
    keep_every: int = 0  # checkpoints at multiples of this many steps are kept for good. 0: none

    def validate(self) -> None:
        if self.every < 0:
            raise UserError(f"checkpoint.every={self.every}: must be >= 0 steps (0: only at the end)")
        if self.keep_last < 2:
            raise UserError(
                f"checkpoint.keep_last={self.keep_last}: must be >= 2, or one bad disk block costs the run"
            )
        if self.keep_every < 0:
            raise UserError(f"checkpoint.keep_every={self.keep_every}: must be >= 0 steps (0: none for good)")
