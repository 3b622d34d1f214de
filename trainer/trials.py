"""Trial runs: real runs of a stage in processes of their own, and the comparison of their curves.

`verify` and `parity` are made of them. A trial gets its whole config in a file, so that a run directory's
config can be tried as it is, with nothing composed again.

    python -m trainer.trials CONFIG.yaml        (what the trial processes run; torchrun -m for several ranks)
"""

import importlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.config import compose_stage, config_of, plain
from trainer.errors import UserError
from trainer.launch import run_main, train

FP32_TOLERANCE = 1e-5
# Masters are fp32, but what is computed in bf16 has 8 bits: other splits of a sum differ by so much.
BF16_TOLERANCE = 5e-3
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "ACCELERATE_",
)


@dataclass(frozen=True)
class Point:
    """One step of a run's curve."""

    step: int
    loss: float
    norm: float
    batch: str


def given_config(arguments: list[str], stage: str) -> tuple[str, dict[str, Any]]:
    """(stage, plain config) of a run directory, or of KEY=VALUE overrides. Raises UserError."""
    if len(arguments) == 1 and "=" not in arguments[0]:
        run = Path(arguments[0])
        try:
            stage = json.loads((run / "run.json").read_text())["stage"]
            values = yaml.safe_load((run / "config.yaml").read_text())
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename}: missing: give a run directory, or KEY=VALUE as for training"
            ) from None
        return stage, plain(config_of(stage, values, str(run / "config.yaml")))
    return stage, plain(compose_stage(stage, arguments))


def with_changes(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with dotted keys replaced."""
    copy: dict[str, Any] = json.loads(json.dumps(values))
    for key, value in changes.items():
        *groups, name = key.split(".")
        place = copy
        for group in groups:
            place = place[group]
        place[name] = value
    return copy


def fitting_world(values: dict[str, Any], wanted: int) -> int:
    """The largest number of ranks up to `wanted` that divides the batch."""
    return max(n for n in range(1, wanted + 1) if values["global_batch"] % (n * values["micro_batch"]) == 0)


def devices() -> int:
    """GPUs of this machine; 0 without any."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(module: str, arguments: list[str], ranks: int, log: Path) -> subprocess.Popen[bytes]:
    """`python -m MODULE` on one rank, torchrun on several, in a process group of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    command = [sys.executable, "-m", module, *arguments]
    if ranks > 1:
        torchrun = ["torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
        command = [sys.executable, "-m", *torchrun, "-m", module, *arguments]
    with open(log, "ab") as sink:
        return subprocess.Popen(command, env=env, stdout=sink, stderr=sink, start_new_session=True)


def run_trial(
    stage: str,
    values: dict[str, Any],
    ranks: int,
    kill_at: int = 0,
    tick: Callable[[int], None] = lambda n: None,
) -> int:
    """Run a stage to its end, or until step `kill_at` is logged and then SIGKILL every process of it.
    Returns the exit code. `tick(step)` is called as it goes.
    """
    run = Path(values["run_dir"])
    file = run.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"stage": stage, "config": values}, sort_keys=False))
    process = launch("trainer.trials", [str(file)], ranks, run.with_suffix(".log"))
    try:
        while process.poll() is None:
            time.sleep(0.02)
            done = len(curve(run))
            tick(done)
            if kill_at and done >= kill_at:
                break
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return code


def curve(run: Path) -> list[Point]:
    """The steps in a run's metrics.jsonl, also while it is written."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    return [
        Point(m["step"], float(m["train/loss"]), float(m["train/grad_norm"]), m["data/batch_hash"])
        for m in lines
        if "train/loss" in m
    ]


def difference(a: float, b: float) -> float:
    """|a - b| / |b|; 0 for two nans or equal infinities."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) / abs(b) if b else math.inf


def first_difference(one: list[Point], other: list[Point], tolerance: float) -> str:
    """Where two curves part, in words; "" if they do not."""
    if [p.step for p in one] != [p.step for p in other]:
        return f"the steps differ: {len(one)} and {len(other)} of them"
    for a, b in zip(one, other):
        if a.batch != b.batch:
            return f"step {a.step}: another batch ({a.batch}, {b.batch})"
        for name, x, y in (("loss", a.loss, b.loss), ("gradient norm", a.norm, b.norm)):
            if not difference(x, y) <= tolerance:
                return f"step {a.step}: {name} {x:.9g} and {y:.9g}, {difference(x, y):.1e} apart"
    return ""


def tail(log: Path, lines: int = 3) -> str:
    """The end of a trial's log, for a message of one line."""
    text = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    told = [line for line in text if line.startswith("trivium:")] or text[-lines:]
    return " | ".join(line.strip() for line in told[-lines:])


def main(argv: list[str] | None = None) -> int:
    """One rank of a trial."""
    (file,) = sys.argv[1:] if argv is None else argv
    content = yaml.safe_load(Path(file).read_text())
    config = config_of(content["stage"], content["config"], file)
    from trainer.engine.world import launch_from_env

    config.validate(launch_from_env(os.environ).world)
    return train(content["stage"], config, importlib.import_module(f"trainer.{content['stage']}").STAGE)


if __name__ == "__main__":
    sys.exit(run_main(main))
