"""Run one step of a run again and see what was in it: `trivium replay RUN --step N`

The newest checkpoint before step N is trained forward to N - 1 on one process, without touching the run, then
exactly step N's batch is run. Loss, gradient norm and batch are compared with what the run logged (also
when a return to an earlier checkpoint has taken the line out of metrics.jsonl), and the rows of the batch are
shown by their loss, with shard, block, offset and text: which document made the spike?
"""

import argparse
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from trainer.config import StageConfig, config_of
from trainer.engine import commit
from trainer.errors import UserError
from trainer.launch import adopt_model, load_initial, run_main
from trainer.observe.console import printable
from trainer.run import read_damage


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="trivium replay", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="run directory")
    parser.add_argument("--step", type=int, required=True, help="the step, counted from 1 as in the log")
    parser.add_argument("--batch", type=int, help="on that step's weights this batch (0-based) of the stream")
    parser.add_argument("--rows", type=int, default=10, help="rows to show (default 10)")
    parser.add_argument("--characters", type=int, default=200, help="of each row's text (default 200)")
    args = parser.parse_args(argv)
    if args.step < 1:
        raise UserError(f"--step {args.step}: steps are counted from 1")
    run = Path(args.run)
    try:
        stage = json.loads((run / "run.json").read_text())["stage"]
        values = yaml.safe_load((run / "config.yaml").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: missing: {run} is not a run directory") from None
    config = adopt_model(config_of(stage, values, str(run / "config.yaml")), [])
    return _replay(run, stage, config, args.step, args.batch, args.rows, args.characters)


def _replay(
    run: Path, name: str, config: StageConfig, step: int, batch: int | None, rows: int, characters: int
) -> int:
    from trainer.engine import world as worlds
    from trainer.engine.build import build_engine
    from trainer.engine.schedule import learning_rate
    from trainer.loop import resume
    from trainer.stability import Stability

    console = Console()
    # How the run was sharded does not matter to its numbers: one process, whole weights.
    one = replace(config.engine, kind="fsdp", shard_size=None, deepspeed={}, offload="none", compile=False)
    config = replace(config, engine=one)
    before = [s for s in commit.list_steps(run / "checkpoints") if s < step]
    start = commit.find(commit.directory_of(run / "checkpoints", before[-1])) if before else None
    world = worlds.start(config.engine.device, {})
    stage = importlib.import_module(f"trainer.{name}").STAGE(config, world)
    engine = build_engine(config.model, config.engine, config.optim, world, config.seed)
    stability = Stability(config.stability)
    if start is None and config.init_from:
        load_initial(engine, stage, config.init_from)
    progress = resume(engine, start, stability)
    stage.adopt_damage(read_damage(run))
    if start is not None:
        stage.restore(commit.read_state(start)["stream"])
    console.print(f"from {start or 'the beginning'}", highlight=False)

    def train(number: int, data_step: int) -> Any:
        found = stage.batch(data_step)
        lr = learning_rate(number, config.steps, config.optim.lr, config.schedule)
        result = engine.train_step(
            found.micros, stage.loss, lr, lambda loss, norm: not stability.why_not(loss, norm)
        )
        return found, result

    for number in track(range(progress.step, step - 1), "training up to it", console=console):
        _, result = train(number, progress.data_step(number))
        stability.record(result.loss, result.grad_norm, result.skipped)
    data_step = progress.data_step(step - 1) if batch is None else batch
    losses = []
    for micro in stage.batch(data_step).micros:
        losses += engine.no_grad(stage.row_losses, micro)
    found, result = train(step - 1, data_step)
    last = found.first_sample + found.num_samples - 1
    console.print(
        f"step {step}, batch {data_step}, samples {found.first_sample}..{last}: loss {result.loss:.8f}, "
        f"gradient norm {result.grad_norm:.8f}, batch {result.batch_hash}", highlight=False,
    )  # fmt: skip
    same = _compare(console, run, step, result) if batch is None else True
    _show(console, stage, data_step, losses, rows, characters)
    engine.close()
    worlds.stop(world)
    return 0 if same else 1


def _compare(console: Console, run: Path, step: int, result: Any) -> bool:
    """With every line that the run logged for this step."""
    from trainer.trials import FP32_TOLERANCE, difference

    same = True
    for file in [run / "metrics.jsonl", *sorted(run.glob("logs/attempt-*/replaced-metrics.jsonl"))]:
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        for line in [line for line in lines if line["step"] == step and "train/loss" in line]:
            loss, norm = float(line["train/loss"]), float(line["train/grad_norm"])
            apart = max(difference(result.loss, loss), difference(result.grad_norm, norm))
            equal = line["data/batch_hash"] == result.batch_hash and apart <= FP32_TOLERANCE
            other = "" if line["data/batch_hash"] == result.batch_hash else ", ANOTHER BATCH"
            event = f"; {line['event/skip']}" if "event/skip" in line else ""
            word = "[green]the same[/]" if equal else "[red]differs[/]"
            console.print(
                f"  {file.relative_to(run)}: {word}, {apart:.1e} apart{other}{event}", highlight=False
            )
            same &= equal or file.name != "metrics.jsonl"
    return same


def _show(
    console: Console, stage: Any, data_step: int, losses: list[float], count: int, characters: int
) -> None:
    import torch

    rows = stage.rows(data_step)
    tokens = torch.cat([micro.tokens_BT for micro in stage.batch(data_step).micros])
    table = Table("loss", "sample", "where", "text", show_lines=True)
    order = sorted(range(len(rows)), key=lambda i: -losses[i])
    for i in order[:count]:
        row = rows[i]
        place = f"block {row['block']}, byte {row['offset']}"
        where = f"{row['source']}, epoch {row['epoch']}\n{row['shard']}\n{place}"
        text = stage.tokenizer.decode(tokens[i].tolist()) if stage.tokenizer else str(tokens[i].tolist())
        text = printable(text[:characters]).replace("[", "\\[")
        table.add_row(f"{losses[i]:.4f}", str(row["sample"]), where, text)
    console.print(table)
    if len(order) > count:
        console.print(f"{len(order) - count} more rows with lower loss; --rows {len(order)} shows all")


if __name__ == "__main__":
    sys.exit(run_main(main))
