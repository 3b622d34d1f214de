"""`make soak`: the promises of the test suite at length. Exits 1 on the first broken kind of promise.

    python -m tests.soak.run [--kills 200] [--seed 0] [--only kills|watch|pairs] [--trial N]

kills   Runs are killed at random moments, half of them at a random point of a save, one rank or all at once,
        and started again on a random engine and number of ranks, again and again until they are done. No
        committed checkpoint may be lost, every run must end with the losses and batches of the unbroken one.
watch   Healthy runs under a tight watch: every alarm would be a false one.
pairs   The tests marked `soak`.
"""

import argparse
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # the forked ranks inherit it

from commands import assert_same_curve, curve, metrics, tiny  # noqa: E402
from corpus import write_dataset  # noqa: E402
from crashes import CrashServer, Kill  # noqa: E402

from trainer.engine import commit  # noqa: E402

ENGINES = ("fsdp", "hsdp", "zero1", "zero2", "zero3")
SAVE_POINTS = ("staged", "shard", "manifest", "rename", "marker", "committed", "prune")
RANK_0_ONLY = ("manifest", "rename", "marker", "committed", "prune")
STEPS = 24
SETTINGS = [f"steps={STEPS}", "optim.lr=1e-3", "micro_batch=1"]  # 12 rows divide by 1 to 4 ranks


@dataclass
class Tally:
    """What the trials came to."""

    kills: Counter[str] = field(default_factory=Counter)
    during: Counter[str] = field(default_factory=Counter)  # what lay on the disk after each kill
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    runs: int = 0
    attempts: int = 0
    restart_seconds: list[float] = field(default_factory=list)


def draw(dice: random.Random, world: int) -> Kill:
    """A kill at a point of a save, or at any moment of the seconds that an attempt takes."""
    everyone = dice.random() < 0.5
    if dice.random() < 0.5:
        point = dice.choice(SAVE_POINTS)
        rank = 0 if point in RANK_0_ONLY else dice.randrange(world)
        count = dice.randint(1, 60) if point == "shard" else dice.randint(1, 3)
        return Kill(f"save/{point}", count, rank, everyone)
    return Kill(rank=dice.randrange(world), everyone=everyone, after=0.3 + 3.5 * dice.random())


def state_of_the_save(root: Path) -> str:
    """How far the save was that a kill interrupted, by what is on the disk."""
    if not root.is_dir():
        return "nothing saved yet"
    for path in root.iterdir():
        if path.name.endswith(".tmp"):
            return "files being written" if not (path / "manifest.json").exists() else "manifest written"
        if not commit.is_committed(path):
            return "renamed or being deleted, no marker"
    return "between saves"


def check_the_disk(root: Path, every: int, run: Path) -> str:
    """What is lost or damaged, in words; "" if all is well."""
    steps = commit.list_steps(root)
    for step in steps:
        if problem := commit.check(commit.directory_of(root, step)):
            return problem
    lines = metrics(run) if (run / "metrics.jsonl").exists() else []
    logged = lines[-1]["step"] if lines else 0
    if max(steps, default=0) < logged // every * every - 2 * every:  # at most two saves are not yet there
        return f"step {logged} was logged, but the newest checkpoint is {max(steps, default=None)}"
    return ""


def one_run(
    server: CrashServer, data: Path, folder: Path, seed: str, reference, tally: Tally, left: int
) -> int:
    """One run from its first start to its end; returns the number of kills."""
    dice, run, kills = random.Random(seed), folder / "run", 0
    every = dice.choice((2, 3))
    arguments = tiny(data, run, *SETTINGS, f"checkpoint.every={every}")
    for attempt in range(1, 100):
        world, engine = dice.choice((1, 2, 2, 3, 4)), dice.choice(ENGINES)
        kill = draw(dice, world) if kills < left else None
        result = server.attempt(
            [*arguments, f"engine={engine}"], world, folder / f"{attempt}.log", kill, limit=240
        )
        tally.attempts += 1
        where = f"--seed {seed.replace(':', ' --trial ')}: attempt {attempt}, {kill}, {engine} x{world}"
        if (run / "DONE").exists():
            break
        if not result.killed:
            tally.different.append(f"{where}: ended with {result.codes}: {result.output[-600:]}")
            return kills
        kills += 1
        tally.kills[kill.point if kill and kill.point else "any moment"] += 1
        tally.during[state_of_the_save(run / "checkpoints")] += 1
        if (run / "run.json").exists() and (problem := check_the_disk(run / "checkpoints", every, run)):
            tally.lost.append(f"{where}: {problem}")
        tally.restart_seconds.append(result.seconds)
    tally.runs += 1
    try:
        assert_same_curve(curve(run), reference)
    except AssertionError as error:
        tally.different.append(f"--seed {seed.replace(':', ' --trial ')}: {error}")
    return kills


def soak_kills(console: Console, wanted: int, seed: int, trial: int | None) -> bool:
    """Kill until `wanted` kills are done; or replay one trial."""
    server, tally, kills = CrashServer(), Tally(), 0
    base = Path(tempfile.mkdtemp(prefix="soak-"))
    data = write_dataset(base / "data")
    result = server.attempt(tiny(data, base / "unbroken", *SETTINGS), 1, base / "unbroken.log")
    assert result.codes == [0], result.output
    reference, started = curve(base / "unbroken"), time.monotonic()
    columns = ("kills", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("kills", total=wanted)
        number = trial or 0
        while kills < wanted:
            folder = base / f"run-{number}"
            folder.mkdir()
            kills += one_run(server, data, folder, f"{seed}:{number}", reference, tally, wanted - kills)
            progress.update(bar, completed=kills)
            shutil.rmtree(folder)
            number += 1
            if trial is not None:
                break
    shutil.rmtree(base)
    table = Table(title=f"{kills} kills in {tally.runs} runs, {tally.attempts} attempts")
    table.add_column("killed at")
    table.add_column("kills", justify="right")
    for name, count in sorted(tally.kills.items()):
        table.add_row(name, str(count))
    table.add_section()
    for name, count in tally.during.most_common():
        table.add_row(f"found on the disk: {name}", str(count))
    console.print(table)
    minutes = (time.monotonic() - started) / 60
    console.print(
        f"lost or damaged checkpoints: {len(tally.lost)}; runs that differ: {len(tally.different)}; "
        f"median attempt {statistics.median(tally.restart_seconds or [0]):.1f} s; {minutes:.1f} min"
    )
    for problem in tally.lost + tally.different:
        console.print(problem, style="red", markup=False)
    return not tally.lost and not tally.different


def soak_watch(console: Console) -> bool:
    """Healthy runs of every engine with evaluation, samples and saves, under a limit of seconds."""
    server, alarms, runs = CrashServer(), 0, 0
    base = Path(tempfile.mkdtemp(prefix="soak-"))
    data = write_dataset(base / "data")
    for engine in ENGINES:
        for world in (1, 2, 4):
            run = base / f"{engine}-{world}"
            extra = [
                "steps=60",
                "checkpoint.every=5",
                "eval.every=10",
                "eval.sequences=24",
                "watch.limit_s=4",
                "micro_batch=1",
            ]
            arguments = tiny(data, run, *extra, f"engine={engine}")
            result = server.attempt(arguments, world, run.with_suffix(".log"), limit=300)
            runs += 1
            if set(result.codes) != {0} or list(run.glob("logs/*/hang.json")):
                alarms += 1
                console.print(result.output[-2000:], style="red", markup=False)
    shutil.rmtree(base)
    console.print(f"watch: {runs} healthy runs, {alarms} false alarms")
    return alarms == 0


def soak_pairs(_console: Console) -> bool:
    """Tests that are too long for `make test`; pytest's 5 means that there are none."""
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "soak"], check=False).returncode
    return code in (0, 5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, help="replay one run of the kills")
    parser.add_argument("--only", choices=("kills", "watch", "pairs"))
    args = parser.parse_args()
    console, good = Console(), True
    if args.only in (None, "kills"):
        good &= soak_kills(console, args.kills, args.seed, args.trial)
    if args.only in (None, "watch"):
        good &= soak_watch(console)
    if args.only in (None, "pairs"):
        good &= soak_pairs(console)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
