"""What a person at the terminal sees: a progress bar with loss, tokens/s, MFU and time left, or plain lines.

A progress bar in a log file is garbage, so `auto` draws it only where there is a terminal; under Slurm,
nohup or a pipe it writes one line every `logger.every` steps that can be grepped. Text from the model is
untrusted: it is never read as markup, and control characters (which could move the cursor or retitle the
window) are shown as dots."""

import atexit
import re
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from trainer.observe.loggers import LoggerConfig, NoLogger, Rows
from trainer.observe.metrics import Number

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
WINDOW = 50  # steps whose pace predicts the time left


def printable(text: object) -> str:
    """The text without characters that a terminal obeys; tabs and newlines stay."""
    return CONTROL.sub("·", str(text))


def short_number(value: float) -> str:
    """1234567 -> "1.23M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        rounded = f"{value / size:.3g}"
        if abs(float(rounded)) >= 1:
            return rounded + unit
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """3725 -> "1h02m"; 65 -> "1m05s"; 5.2 -> "5s"."""
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def summary(metrics: dict[str, Number], tokens: int, short: bool = False) -> str:
    """The few numbers worth a line, in words: `loss 3.2104  grad 0.91 ...`; leaves out what the step does not
    have. `short`: what fits beside a progress bar on 80 columns."""
    fields: list[tuple[str, str, Callable[[float], str]]] = [
        ("loss", "train/loss", lambda v: f"{v:.4f}"),
        ("val bpb", "val/bpb", lambda v: f"{v:.4f}"),
        ("val loss", "val/loss", lambda v: f"{v:.4f}"),
        ("acc", "train/accuracy", lambda v: f"{v:.3f}"),
        ("reward", "rl/reward", lambda v: f"{v:.3f}"),
        ("pass@1", "rl/pass@1", lambda v: f"{v:.3f}"),
        ("length", "rl/length", lambda v: f"{v:.0f}"),
        ("grad", "train/grad_norm", lambda v: f"{v:.3g}"),
        ("lr", "train/lr", lambda v: f"{v:.2e}"),
        ("tok/s", "speed/tokens_per_s", short_number),
        ("mfu", "speed/mfu", lambda v: f"{v:.1%}"),
    ]
    left_out = {"val bpb", "val loss", "acc", "length", "grad", "lr"} if short else set()
    parts = [
        f"{label} {form(float(metrics[name]))}"
        for label, name, form in fields
        if name in metrics and label not in left_out
    ]
    return "  ".join(parts if short else [*parts, f"tokens {short_number(tokens)}"])


class PlainConsole(NoLogger):
    """One line every `every` steps, for log files and pipes; also at the first and last step and when
    evaluated."""

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        every: int,
        out: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._every, self._out, self._clock = total_steps, every, out, clock
        self._begin(first_step)

    def _begin(self, step: int) -> None:
        self._first = step
        self._pace: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)  # (step, when it ended)

    def _left(self, step: int) -> str:
        """Time left at the pace of the last steps, evaluation and saving included. The first step
        (compilation, warm caches) does not count, so it has no answer yet."""
        self._pace.append((step, self._clock()))
        (then_step, then), (_, now) = self._pace[0], self._pace[-1]
        if step <= then_step:
            return "?"
        return duration((now - then) / (step - then_step) * max(0, self._total - step))

    def log(self, step: int, tokens: int, metrics: dict[str, Number]) -> None:
        left = self._left(step)
        evaluated = any(name.startswith("val/") for name in metrics)
        if step % self._every == 0 or step in (self._first + 1, self._total) or evaluated:
            self.message(
                f"step {step:>{len(str(self._total))}}/{self._total}  {summary(metrics, tokens)}  left {left}"
            )

    def text(self, step: int, name: str, rows: Rows) -> None:
        self.message(f"{name} at step {step}:")
        for row in rows:
            for key, value in row.items():
                lines = printable(value).splitlines() or [""]
                self.message(f"  {key}: {lines[0]}")
                for line in lines[1:]:
                    self.message(f"      {line}")

    def message(self, text: str) -> None:
        print(printable(text), file=self._out, flush=True)

    def rewind(self, step: int) -> None:
        self._begin(step)


class RichConsole(PlainConsole):
    """A live progress bar; evaluations, samples and messages scroll by above it."""

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        every: int,
        out: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(total_steps, first_step, every, out, clock)
        self._console = Console(file=out, force_terminal=True, highlight=False)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24 if self._console.width >= 100 else 14),
            TextColumn("{task.fields[line]}", markup=False),
            console=self._console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=first_step, line="")
        self._progress.start()
        atexit.register(self._progress.stop)  # a crash that skips close() must not leave the cursor hidden

    def log(self, step: int, tokens: int, metrics: dict[str, Number]) -> None:
        left, short = self._left(step), self._console.width < 120
        self._progress.update(
            self._task, completed=step, line=f"{summary(metrics, tokens, short)}  left {left}"
        )
        if any(name.startswith("val/") for name in metrics):
            self._console.print(Text(f"step {step}  {summary(metrics, tokens)}", style="bold"))

    def text(self, step: int, name: str, rows: Rows) -> None:
        self._console.rule(Text(f"{name} at step {step}"), style="dim")
        for row in rows:
            line = Text()
            for key, value in row.items():
                style = {"prompt": "cyan", "completion": ""}.get(key, "dim")
                label = "" if key in ("prompt", "completion") else f"  [{key} "
                line.append(f"{label}{printable(value)}{']' if label else ''}", style=style)
            self._console.print(line)
        self._console.rule(style="dim")

    def message(self, text: str) -> None:
        self._console.print(Text(printable(text)))

    def rewind(self, step: int) -> None:
        super().rewind(step)
        self._progress.update(self._task, completed=step)

    def close(self, exit_code: int = 0) -> None:
        self._progress.stop()
        atexit.unregister(self._progress.stop)


def make_console(config: LoggerConfig, total_steps: int, first_step: int, out: TextIO) -> NoLogger:
    """The console logger that fits `logger.console` and where `out` leads to."""
    if config.console == "off":
        return NoLogger()
    live = config.console == "rich" or (config.console == "auto" and out.isatty())
    return (RichConsole if live else PlainConsole)(total_steps, first_step, config.every, out)
