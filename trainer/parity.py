"""The numerics matrix on your machine, your config, your devices: `trivium parity KEY=VALUE ...`

Trains a few steps on every engine and number of ranks and compares each loss and gradient norm with one plain
loop: one process, the whole batch, torch's own AdamW and clipping, no engine of ours. Nothing is saved.

Exit code 0: all agree within 1e-5 (fp32; 5e-3 in bf16, which has 8 bits of mantissa); 1: some do not.
"""

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from trainer.config import FSDP_KINDS, ZERO_KINDS, StageConfig, config_of
from trainer.errors import UserError
from trainer.launch import load_initial, run_main
from trainer.trials import (
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    Point,
    devices,
    difference,
    given_config,
    launch,
    tail,
    with_changes,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "checkpointing": {"engine.activation_checkpoint": "full"},
    "selective": {"engine.activation_checkpoint": "selective"},
    "compile": {"engine.compile": True},
}
PLAIN = "plain loop"


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code. Raises UserError."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        return _worker(Path(argv[1]))
    parser = argparse.ArgumentParser(prog="trivium parity", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="+", help="a run directory, or KEY=VALUE as for training")
    parser.add_argument("--stage", default="pretrain", help="of KEY=VALUE (default pretrain)")
    parser.add_argument("--engines", default=",".join(FSDP_KINDS + ZERO_KINDS), help="default: all")
    parser.add_argument("--ranks", help="e.g. 1,2,4 (default: powers of two up to the GPUs; 1,2 on a CPU)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--options", default="none", help=f"any of {', '.join(OPTIONS)}")
    args = parser.parse_args(argv)
    stage, values = given_config(args.what, args.stage)
    gpus = devices()
    worlds = [2**n for n in range(10) if 2**n <= gpus] or [1, 2]
    if args.ranks:
        worlds = [int(text) for text in args.ranks.split(",") if text.isdigit()]
    engines, options = args.engines.split(","), args.options.split(",")
    for flag, given, known in (
        ("--engines", engines, FSDP_KINDS + ZERO_KINDS),
        ("--options", options, OPTIONS),
    ):
        for name in given:
            if name not in known:
                raise UserError(f"{flag} {name}: choose from {', '.join(known)}")
    if not worlds or args.steps < 1:
        raise UserError(
            f"--ranks {args.ranks} --steps {args.steps}: give numbers from 1 on, e.g. --ranks 1,2"
        )
    values = with_changes(values, {"engine.dtype": args.dtype, "engine.persistence_threshold": 0})
    cells = [(PLAIN, 1, "none")] + [(e, w, o) for e in engines for w in worlds for o in options]
    console, found = Console(), {}
    with tempfile.TemporaryDirectory(prefix="trivium-parity-") as scratch:
        for number, cell in enumerate(track(cells, "training", console=console)):
            found[cell] = _cell(stage, values, cell, args.steps, Path(scratch) / f"{number}.yaml")
    return _show(console, found, BF16_TOLERANCE if args.dtype == "bfloat16" else FP32_TOLERANCE)


def _cell(stage: str, values: dict[str, Any], cell: tuple[str, int, str], steps: int, file: Path) -> Any:
    """(curve, seconds per step) of one cell, or why it cannot run."""
    kind, ranks, option = cell
    changes: dict[str, Any] = {"engine.shard_size": None, **OPTIONS[option]}
    if kind != PLAIN:
        changes["engine.kind"] = kind
    config = with_changes(values, changes)
    config["engine"]["deepspeed"] = config["engine"]["deepspeed"] if kind in ZERO_KINDS else {}
    try:
        config_of(stage, config, "parity").validate(ranks)
    except UserError as error:
        return str(error)
    result, log = file.with_suffix(".json"), file.with_suffix(".log")
    job = {"stage": stage, "config": config, "plain": kind == PLAIN, "steps": steps, "result": str(result)}
    file.write_text(yaml.safe_dump(job))
    launch("trainer.parity", ["--worker", str(file)], ranks, log).wait()
    if not result.exists():
        if kind == PLAIN:
            raise UserError(f"the plain loop did not run: {tail(log)}")
        return tail(log)
    content = json.loads(result.read_text())
    return [Point(**point) for point in content["curve"]], content["seconds"]


def _show(console: Console, found: dict[tuple[str, int, str], Any], tolerance: float) -> int:
    reference, _ = found[PLAIN, 1, "none"]
    table = Table("engine", "ranks", "options", "loss", "norm", "loss ±", "norm ±", "s/step", "")
    good = True
    for (kind, ranks, option), value in found.items():
        if isinstance(value, str):
            table.add_row(kind, str(ranks), option, *[""] * 5, f"cannot run: {value}")
            continue
        points, seconds = value
        loss = max(difference(a.loss, b.loss) for a, b in zip(points, reference))
        norm = max(difference(a.norm, b.norm) for a, b in zip(points, reference))
        same = max(loss, norm) <= tolerance and [p.batch for p in points] == [p.batch for p in reference]
        good &= same
        last = points[-1]
        numbers = f"{last.loss:.5f}", f"{last.norm:.5f}", f"{loss:.0e}", f"{norm:.0e}", f"{seconds:.2f}"
        table.add_row(kind, str(ranks), option, *numbers, "[green]same[/]" if same else "[red]DIFFERS[/]")
    console.print(table)
    console.print(
        f"{'all agree' if good else 'NOT all agree'} with the plain loop within {tolerance:g}",
        highlight=False,
    )
    return 0 if good else 1


def _worker(file: Path) -> int:
    """One rank of one cell."""
    from trainer.engine import world as worlds

    job = yaml.safe_load(file.read_text())
    config = config_of(job["stage"], job["config"], str(file))
    config.validate(worlds.launch_from_env(os.environ).world)
    world = worlds.start(config.engine.device)
    stage = importlib.import_module(f"trainer.{job['stage']}").STAGE(config, world)
    curve, seconds = (_plain_loop if job["plain"] else _engine_loop)(config, stage, world, job["steps"])
    if world.is_main:
        content = {"curve": [asdict(point) for point in curve], "seconds": seconds}
        Path(job["result"]).write_text(json.dumps(content))
    worlds.stop(world)
    return 0


def _engine_loop(config: StageConfig, stage: Any, world: Any, steps: int) -> tuple[list[Point], float]:
    from trainer.engine.build import build_engine
    from trainer.engine.schedule import learning_rate

    engine = build_engine(config.model, config.engine, config.optim, world, config.seed)
    if config.init_from:
        load_initial(engine, stage, config.init_from)
    curve, times = [], []
    for step in range(steps):
        micros = stage.batch(step).micros
        lr = learning_rate(step, config.steps, config.optim.lr, config.schedule)
        started = time.perf_counter()
        result = engine.train_step(micros, stage.loss, lr)
        times.append(time.perf_counter() - started)
        curve.append(Point(step + 1, result.loss, result.grad_norm, result.batch_hash))
    engine.close()
    return curve, min(times)


def _plain_loop(config: StageConfig, stage: Any, world: Any, steps: int) -> tuple[list[Point], float]:
    """Nothing of the engine: what any reader would write with torch alone."""
    import torch

    from trainer.engine.schedule import learning_rate
    from trainer.load import open_source
    from trainer.model.init import init_weights
    from trainer.model.transformer import Transformer

    model = Transformer(config.model)
    init_weights(model, config.seed)
    if config.init_from:
        model.load_state_dict(dict(open_source(config.init_from).weights()), strict=False)
    model = model.to(world.device)
    optim = config.optim
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    curve, times = [], []
    for step in range(steps):
        micros = stage.batch(step).micros
        count = sum(micro.num_items for micro in micros)
        started, total = time.perf_counter(), 0.0
        for micro in micros:
            loss = stage.loss(model, micro).total / count
            loss.backward()
            total += loss.item()
        # In fp64: torch's fp32 norm of a million weights is off by 1e-5 on a CPU, all by itself.
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
        if 0 < optim.max_grad_norm < norm:
            for grad in grads:
                grad.mul_(optim.max_grad_norm / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, optim.lr, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
        rows = sum(micro.rows_hash for micro in micros) % (1 << 64)
        curve.append(Point(step + 1, total, norm, f"{rows:016x}"))
    return curve, min(times)


if __name__ == "__main__":
    sys.exit(run_main(main))
