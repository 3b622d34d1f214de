"""What the console shows while stages run: a bar with rate and time left, then one line per stage."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

from data_prep.files import format_bytes


class TaskProgress:
    """A bar over the bytes of the archives; without a terminal, a line every quarter of the work."""

    def __init__(self, console: Console, sizes: list[int], workers: int):
        self.console = console
        self.sizes = sizes
        self.total = max(1, sum(sizes))
        self.earlier = self.fresh = 0  # bytes done by an earlier run say nothing about this run's speed
        self.began = time.monotonic()
        self.quarters = 0
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rate]}"),
            console=console,
            transient=True,
        )
        description = f"clean ({len(sizes)} tasks, {min(workers, len(sizes))} workers)"
        self.bar = self.progress.add_task(description, total=self.total, rate="")

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def done(self, rank: int, fresh: bool) -> None:
        """Task `rank` is committed; `fresh` when this run did it."""
        if fresh:
            self.fresh += self.sizes[rank]
        else:
            self.earlier += self.sizes[rank]
        finished = self.earlier + self.fresh
        self.progress.update(self.bar, completed=finished, rate=self.rate())
        quarter = 4 * finished // self.total
        if not self.console.is_terminal and fresh and self.quarters < quarter < 4:
            self.quarters = quarter
            self.console.print(f"  clean      {finished / self.total:.0%}  {self.rate()}", highlight=False)

    def rate(self) -> str:
        """Bytes of archive a second, and the time left at that rate."""
        speed = self.fresh / max(1e-6, time.monotonic() - self.began)
        if not speed:
            return ""
        left = (self.total - self.earlier - self.fresh) / speed
        return f"{format_bytes(speed)}/s, {left:.0f} s left"


def stage_line(name: str, what: str, result: dict[str, Any], seconds: float) -> str:
    """The line that a finished stage leaves."""
    if result.get("skipped"):
        return f"  {name:<10} {what}: done before, unchanged"
    return f"  {name:<10} {what}: {seconds:.1f} s"
