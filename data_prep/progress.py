"""What the console shows while stages run: a bar with rate and time left, then one line per stage."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn


class TaskProgress:
    """A bar over the bytes of the archives; tasks that an earlier run has done count at once."""

    def __init__(self, console: Console, sizes: list[int], workers: int):
        self.sizes = sizes
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            SpeedColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        description = f"clean ({len(sizes)} tasks, {min(workers, len(sizes))} workers)"
        self.bar = self.progress.add_task(description, total=sum(sizes))

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def done(self, rank: int, fresh: bool) -> None:
        """Task `rank` is committed."""
        self.progress.advance(self.bar, self.sizes[rank])
        if not fresh:  # done by an earlier run: it says nothing about this run's speed
            self.progress.reset(self.bar, completed=int(self.progress.tasks[0].completed))


def stage_line(name: str, what: str, result: dict[str, Any], seconds: float) -> str:
    """The line that a finished stage leaves."""
    if result.get("skipped"):
        return f"  {name:<10} {what}: done before, unchanged"
    return f"  {name:<10} {what}: {seconds:.1f} s"
