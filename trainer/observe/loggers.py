"""Where a run's numbers and texts go: metrics.jsonl always, the console, W&B if wished. One call for the
loop.

    loggers = make_loggers(config.logger, run, total_steps=config.steps)
    try:
        loggers.log(step, tokens, {"train/loss": 3.2, ...})         # once per step
        loggers.text(step, "samples", [{"prompt": ..., "completion": ...}])
    finally:
        loggers.close(exit_code)

Only rank 0 has real loggers; on the others `Loggers` is empty, so that the loop needs no `if rank == 0`.
Names are checked on every rank: an unregistered one fails everywhere, not on rank 0 alone while the others
wait for it. metrics.jsonl is the truth; whatever happens to W&B, it has every step."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import UserError
from trainer.observe.files import LineFile
from trainer.observe.metrics import AXIS, Number, check
from trainer.run import RunDirectory

NOT_FINITE = ("nan", "inf", "-inf")  # how trainer.observe.files.to_line writes them
WANDB_MODES = ("auto", "online", "offline", "disabled")
CONSOLE_MODES = ("auto", "rich", "plain", "off")
Rows = Sequence[dict[str, Any]]


@dataclass
class LoggerConfig:
    """The config group `logger`."""

    wandb: str = "auto"  # auto: online if an API key is found, else offline
    project: str = "trivium"
    entity: str | None = None
    group: str | None = None  # runs shown together, e.g. one experiment's stages
    tags: list[str] = field(default_factory=list)
    wandb_every: int = 1  # steps between W&B records (a record with val/* is always sent)
    console: str = "auto"  # auto: progress bar on a terminal, plain lines in a file or pipe
    every: int = 10  # steps between plain console lines

    def validate(self) -> None:
        """UserError naming the key that is wrong."""
        if self.wandb not in WANDB_MODES:
            raise UserError(f"logger.wandb={self.wandb}: one of {', '.join(WANDB_MODES)}")
        if self.console not in CONSOLE_MODES:
            raise UserError(f"logger.console={self.console}: one of {', '.join(CONSOLE_MODES)}")
        for key in ("every", "wandb_every"):
            if getattr(self, key) < 1:
                raise UserError(f"logger.{key}={getattr(self, key)}: must be at least 1 step")
        if not self.project or set(self.project) & set("/\\#?%:"):
            raise UserError(f"logger.project={self.project}: W&B wants a name without / \\ # ? % :")
        if any(not 1 <= len(tag) <= 64 for tag in self.tags):
            raise UserError(f"logger.tags={self.tags}: W&B wants tags of 1 to 64 characters")


class Logger(Protocol):
    """What the loop may call. `step` is the number of the step just done (from 1), `tokens` those trained
    on so far."""

    def log(self, step: int, tokens: int, metrics: dict[str, Number]) -> None:
        """The numbers of one step; called once per step, steps rising."""

    def text(self, step: int, name: str, rows: Rows) -> None:
        """A table of texts, e.g. samples: one dict per row, the same keys in each."""

    def message(self, text: str) -> None:
        """One line for the user."""

    def sync(self) -> None:
        """What was logged survives the loss of the machine from here on; called with each checkpoint."""

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: later records are void and will be logged anew."""

    def close(self, exit_code: int = 0) -> None:
        """The end of the process; must be called on every way out."""


class NoLogger:
    """Logs nothing. The other loggers inherit from it what they have no use for."""

    def log(self, step: int, tokens: int, metrics: dict[str, Number]) -> None:
        pass

    def text(self, step: int, name: str, rows: Rows) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def sync(self) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def close(self, exit_code: int = 0) -> None:
        pass


class JsonlLogger(NoLogger):
    """metrics.jsonl: {"step", "tokens", "time", NAME: value, ...}; samples.jsonl: {"step", "name", "row":
    {...}}."""

    def __init__(self, run: RunDirectory, clock: Callable[[], float] = time.time):
        self._run = run
        self._clock = clock
        self._metrics = LineFile(run.metrics_file)
        self._samples = LineFile(run.samples_file)

    def log(self, step: int, tokens: int, metrics: dict[str, Number]) -> None:
        self._metrics.append({"step": step, AXIS: tokens, "time": round(self._clock(), 3), **metrics})

    def text(self, step: int, name: str, rows: Rows) -> None:
        for row in rows:
            self._samples.append({"step": step, "name": name, "row": row})

    def sync(self) -> None:
        self._metrics.sync()
        self._samples.sync()

    def rewind(self, step: int) -> None:
        for file in (self._metrics, self._samples):
            file.keep(step, self._run.log_dir / f"replaced-{file.path.name}")

    def close(self, exit_code: int = 0) -> None:
        self._metrics.close()
        self._samples.close()


class Loggers(NoLogger):
    """All loggers of this rank behind one; empty on ranks other than 0."""

    def __init__(self, loggers: Sequence[Logger] = ()):
        self.loggers = list(loggers)

    def log(self, step: int, tokens: int, metrics: dict[str, Number]) -> None:
        """Refuses (ValueError) a name that is not in `trainer.observe.metrics`."""
        check(metrics)
        for logger in self.loggers:
            logger.log(step, tokens, metrics)

    def text(self, step: int, name: str, rows: Rows) -> None:
        for logger in self.loggers:
            logger.text(step, name, rows)

    def message(self, text: str) -> None:
        for logger in self.loggers:
            logger.message(text)

    def sync(self) -> None:
        for logger in self.loggers:
            logger.sync()

    def rewind(self, step: int) -> None:
        for logger in self.loggers:
            logger.rewind(step)

    def close(self, exit_code: int = 0) -> None:
        # The terminal is given back first: what a later logger says then lands on a sane screen.
        for logger in reversed(self.loggers):
            logger.close(exit_code)


def make_loggers(config: LoggerConfig, run: RunDirectory, total_steps: int, first_step: int = 0) -> Loggers:
    """The loggers of this rank: none but on rank 0. Call after `run.resume_from`, which puts metrics.jsonl
    in order. `first_step`: the step the run goes on from."""
    config.validate()
    if run.rank != 0:
        return Loggers()
    loggers: list[Logger] = [JsonlLogger(run)]
    from trainer.observe.console import make_console  # rich is needed on rank 0 only

    console = make_console(config, total_steps, first_step, sys.stdout)
    if config.wandb != "disabled":
        from trainer.observe.wandb_logger import WandbLogger  # 0.7 s to import

        loggers.append(WandbLogger(config, run, tell=console.message))
    return Loggers([*loggers, console])


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl: {"step", "tokens", "time", NAME: value}, nan and inf as floats
    again."""
    from trainer.observe.files import read_lines

    return [
        {name: float(value) if value in NOT_FINITE else value for name, value in record.items()}
        for record in read_lines(Path(path))
    ]
