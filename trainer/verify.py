"""Prove that a run resumes exactly: `trivium verify RUN` or `trivium verify KEY=VALUE ...`

The config of RUN (or the one that the overrides compose) is trained twice in a scratch directory: once
unbroken for 2k steps; once until step k, killed with SIGKILL there, and resumed with the same command on
another engine and another number of ranks. Every loss, gradient norm and batch must be the same. The learning
rate follows the run's own schedule: both stop after 2k of its steps.

Exit code 0: the same; 1: not the same, and the first step that differs is named.
"""

import argparse
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from trainer.config import FSDP_KINDS
from trainer.errors import EXIT_STOPPED, UserError
from trainer.launch import run_main
from trainer.trials import (
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    Point,
    curve,
    devices,
    difference,
    first_difference,
    fitting_world,
    given_config,
    run_trial,
    tail,
    with_changes,
)

QUIET = {
    "logger.wandb": "disabled", "logger.console": "plain", "logger.every": 1, "eval.every": 0,
    "sample.every": 0,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="trivium verify", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="+", help="a run directory, or KEY=VALUE as for training")
    parser.add_argument("--stage", default="pretrain", help="of KEY=VALUE (default pretrain)")
    parser.add_argument("--steps", type=int, default=20, help="2k: how many steps (default 20)")
    parser.add_argument("--ranks", type=int, help="of the first part (default: all GPUs, or 1)")
    parser.add_argument("--resume-ranks", type=int, help="of the resumed part (default: half, or 2 on a CPU)")
    parser.add_argument("--resume-engine", help="default: zero3 after FSDP, fsdp after DeepSpeed")
    parser.add_argument("--keep", help="directory for the two runs and verify.json (default: deleted)")
    args = parser.parse_args(argv)
    stage, values = given_config(args.what, args.stage)
    if args.steps < 2:
        raise UserError(f"--steps {args.steps}: must be at least 2: half of them come before the kill")
    gpus = devices()
    ranks = args.ranks or fitting_world(values, gpus or 1)
    again = args.resume_ranks or fitting_world(values, max(1, gpus // 2) if gpus else 2)
    for flag, count in (("--ranks", ranks), ("--resume-ranks", again)):
        if values["global_batch"] % (count * values["micro_batch"]):
            fits = fitting_world(values, count)
            raise UserError(
                f"{flag} {count}: global_batch={values['global_batch']} is no multiple of {count} ranks x "
                f"micro_batch={values['micro_batch']}; use {flag} {fits}, or another micro_batch"
            )
    kind = values["engine"]["kind"]
    other = args.resume_engine or ("zero3" if kind in FSDP_KINDS else "fsdp")
    bf16 = values["engine"]["dtype"] == "bfloat16" or (values["engine"]["dtype"] == "auto" and gpus > 0)
    scratch = Path(args.keep or tempfile.mkdtemp(prefix="trivium-verify-"))
    try:
        return _verify(
            stage, values, args.steps, (kind, ranks), (other, again), bf16, scratch, bool(args.keep)
        )
    finally:
        if not args.keep:
            shutil.rmtree(scratch, ignore_errors=True)


def _verify(
    stage: str,
    values: dict[str, Any],
    steps: int,
    first: tuple[str, int],
    second: tuple[str, int],
    bf16: bool,
    scratch: Path,
    keep: bool,
) -> int:
    console, half = Console(), steps // 2
    steps = min(steps, values["steps"])
    base = with_changes(values, {**QUIET, "stop_after": steps, "checkpoint.every": max(1, half // 2)})
    unbroken = with_changes(base, {"run_dir": str(scratch / "unbroken")})
    killed = with_changes(base, {"run_dir": str(scratch / "killed")})
    resumed = with_changes(killed, {"engine.kind": second[0], "engine.shard_size": None})
    if second[0] in FSDP_KINDS:
        resumed["engine"]["deepspeed"] = {}
    parts = [
        ("unbroken", unbroken, first[1], 0),
        (f"killed at {half}", killed, first[1], half),
        ("resumed", resumed, second[1], 0),
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        for name, config, ranks, kill_at in parts:
            bar = progress.add_task(f"{name:14} {config['engine']['kind']} x{ranks}", total=kill_at or steps)
            tick = functools.partial(_tick, progress, bar)
            code = run_trial(stage, config, ranks, kill_at, tick)
            log = Path(config["run_dir"]).with_suffix(".log")
            done = len(curve(Path(config["run_dir"])))
            if not kill_at and (done < steps or (code not in (0, EXIT_STOPPED) and ranks == 1)):
                raise UserError(f"the {name} run ended with exit code {code} after {done} steps: {tail(log)}")
    one, two = curve(Path(unbroken["run_dir"])), curve(Path(killed["run_dir"]))
    tolerance = BF16_TOLERANCE if bf16 else FP32_TOLERANCE
    problem = first_difference(two, one, tolerance)
    _show(console, one, two)
    attempts = json.loads((Path(killed["run_dir"]) / "run.json").read_text())["attempts"]
    start = attempts[-1]["from_step"]
    how = (
        f"{first[0]} x{first[1]}, killed after step {half}, resumed from step {start} on "
        f"{second[0]} x{second[1]}; {steps} steps within {tolerance:g}{' (bf16)' if bf16 else ''}"
    )
    console.print(
        f"[red]DIFFERS[/] at {problem}\n  {how}" if problem else f"[green]SAME[/]: {how}", highlight=False
    )
    if keep:
        verdict = {"same": not problem, "problem": problem, "how": how}
        (scratch / "verify.json").write_text(json.dumps(verdict, indent=1) + "\n")
    return 1 if problem else 0


def _tick(progress: Progress, bar: TaskID, done: int) -> None:
    progress.update(bar, completed=done)


def _show(console: Console, one: list[Point], two: list[Point]) -> None:
    table = Table("step", "batch", "loss, unbroken", "loss, resumed", "apart", "norm apart")
    for a, b in zip(one, two):
        batch = a.batch[:8] if a.batch == b.batch else f"{a.batch[:8]} / {b.batch[:8]}"
        apart = f"{difference(b.loss, a.loss):.1e}", f"{difference(b.norm, a.norm):.1e}"
        table.add_row(str(a.step), batch, f"{a.loss:.8f}", f"{b.loss:.8f}", *apart)
    console.print(table)


if __name__ == "__main__":
    sys.exit(run_main(main))
