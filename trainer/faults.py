"""Named points at which a run may be killed: where a crash could hurt, the code says so by `reach(POINT)`.

In a real run this is a call of an empty function. A crash test installs a `hook` that kills the process at
the point it wants (tests/crashes.py), so that "no crash can spoil a checkpoint" is a test and not a hope.
"""

from collections.abc import Callable

POINTS = {
    "step/updated": "between the optimizer's update and the log line of the step",
    "data/prefetch": "while a batch is read ahead",
    "save/staged": "the ranges lie in host memory, nothing is written yet",
    "save/shard": "before each range of a rank's file is written",
    "save/manifest": "all files are there, the manifest is not",
    "save/rename": "the manifest is there, the directory still has its temporary name",
    "save/marker": "renamed, not yet marked as committed",
    "save/committed": "marked; nothing pruned yet",
    "save/prune": "an old checkpoint has lost its marker but not its files",
    "wandb/start": "the run directory is open, W&B is not",
}

hook: Callable[[str], None] | None = None


def reach(point: str) -> None:
    """The run is at `point`, one of POINTS."""
    if hook is not None:
        hook(point)
