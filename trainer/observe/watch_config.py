"""When a run counts as hung, and a rank as slow."""

from dataclasses import dataclass

from trainer.errors import UserError


@dataclass
class WatchConfig:
    """The config group `watch`, see trainer/observe/watch.py."""

    enabled: bool = True
    limit_s: float = 600.0  # no rank makes progress for so long: the run is hung, is reported and ends
    startup_limit_s: float = 3600.0  # the same until the first step is done, which may compile for long
    window_steps: int = 20  # the pace of the ranks is compared over so many steps
    slow_factor: float = 1.2  # a rank whose own time per step is above this multiple of the median is slow
    slow_windows: int = 3  # and is named after so many such windows in a row

    def validate(self) -> None:
        if self.limit_s < 1:
            raise UserError(
                f"watch.limit_s={self.limit_s}: must be at least 1 second (watch.enabled=false: off)"
            )
        if self.startup_limit_s < self.limit_s:
            raise UserError(f"watch.startup_limit_s={self.startup_limit_s}: must be at least watch.limit_s")
        if self.slow_factor <= 1:
            raise UserError(f"watch.slow_factor={self.slow_factor}: must be above 1, e.g. 1.2")
        for key in ("window_steps", "slow_windows"):
            if getattr(self, key) < 1:
                raise UserError(f"watch.{key}={getattr(self, key)}: must be at least 1")
