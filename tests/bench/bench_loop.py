"""A training step through stream + engine + loop against a bare loop over the same compiled model on random
tokens.

Both are measured in one run, in turns, best of several rounds each (other processes can only make a round
slower): tokens/s of the whole run against tokens/s of `forward, backward, clip, AdamW`. Also the share of a
step that waited for data. Target: ratio >= 0.97, wait <= 1 %.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from trainer.engine import world as worlds
from trainer.engine.build import build_engine
from trainer.engine.config import EngineConfig
from trainer.engine.schedule import OptimConfig
from trainer.loop import Loop, Progress
from trainer.model.config import ModelConfig
from trainer.model.init import init_weights
from trainer.model.transformer import Transformer
from trainer.observe.loggers import make_loggers, read_metrics
from trainer.observe.watch import Watch
from trainer.run import RunDirectory
from trainer.stability import Stability
from trainer.stream.shards import ShardWriter

SEQ_LEN, BATCH = 512, 8


def bare_loop(model: Transformer, optim: OptimConfig, tokens: list[torch.Tensor]) -> float:
    """Seconds per step of the plainest loop that trains the same model with the same optimizer settings."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True
    )
    started = time.perf_counter()
    for window in tokens:
        loss = model(window[:, :-1], targets_BT=window[:, 1:]) / window[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="fsdp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="per round")
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    model_config, optim = ModelConfig(vocab_size=4096, tie_embeddings=True), OptimConfig()
    with tempfile.TemporaryDirectory() as folder:
        data = write_random_tokens(Path(folder) / "data", 40 * BATCH * SEQ_LEN)
        world = worlds.start("cpu", {})
        bare = Transformer(model_config)
        init_weights(bare, 0)
        for block in bare.blocks:
            block.forward = torch.compile(block.forward)
        ours = build_loop(Path(folder) / "run", data, model_config, optim, args, world)
        generator = torch.Generator().manual_seed(0)
        windows = [
            torch.randint(0, 4096, (BATCH, SEQ_LEN + 1), generator=generator) for _ in range(args.steps)
        ]
        bare_loop(bare, optim, windows[:3])  # compile and warm up
        ours.config.steps = 3
        ours.run()
        bare_seconds, our_seconds, waits = [], [], []
        for _ in range(args.rounds):
            bare_seconds.append(bare_loop(bare, optim, windows))
            first = ours.progress.step
            ours.config.steps = first + args.steps
            ours.run()
            ours.loggers.sync()
            lines = [m for m in read_metrics(ours.run_directory.metrics_file) if m["step"] > first + 1]
            our_seconds.append(statistics.fmean(line["speed/step_s"] for line in lines))
            waits.append(statistics.fmean(line["speed/wait_data_s"] / line["speed/step_s"] for line in lines))
        ours.loggers.close()
        worlds.stop(world)
    tokens = BATCH * SEQ_LEN
    work = f"{args.rounds} rounds of {args.steps} steps of {tokens} tokens"
    print(f"engine={args.engine}, {threads} threads, {work}")
    print(f"bare loop        {tokens / min(bare_seconds):8.0f} tokens/s")
    print(f"trivium          {tokens / min(our_seconds):8.0f} tokens/s")
    print(f"ratio            {min(bare_seconds) / min(our_seconds):8.3f}   (target >= 0.97)")
    print(f"waiting for data {100 * min(waits):8.3f} % of a step   (target <= 1 %)")


def write_random_tokens(path: Path, count: int) -> Path:
    writer = ShardWriter(
        path / "train",
        name="random",
        vocab_size=4096,
        eos_id=0,
        tokenizer_sha256="0" * 64,
        block_tokens=1 << 15,
    )
    writer.add(np.random.default_rng(0).integers(1, 4096, count))
    writer.close()
    return path


def build_loop(run_dir: Path, data: Path, model: ModelConfig, optim: OptimConfig, args, world) -> Loop:
    from trainer.config import compose_stage, plain
    from trainer.pretrain import Pretrain

    shape = [f"seq_len={SEQ_LEN}", f"global_batch={BATCH}", f"micro_batch={BATCH}", "steps=1000000"]
    quiet = [
        "eval.every=0",
        "sample.every=0",
        "checkpoint.every=0",
        "logger.wandb=disabled",
        "logger.console=off",
    ]
    engine = [f"engine={args.engine}", "engine.compile=true"]
    overrides = [f"data.train={data}", f"run_dir={run_dir}", *shape, *quiet, *engine]
    config = compose_stage("pretrain", overrides)
    config.model = model
    run = RunDirectory.open(run_dir, plain(config), "pretrain")
    run.resume_from(0)
    stage = Pretrain(config, world)
    built = build_engine(model, EngineConfig(kind=args.engine, compile=True), optim, world, 0)
    loop = Loop(
        stage,
        built,
        config,
        run,
        Progress(),
        make_loggers(config.logger, run, config.steps),
        Stability(config.stability),
        Watch(config.watch, world, run.log_dir),
    )
    loop._save = lambda last=False: None  # a round ends here, not the run: saving is not what is measured
    return loop


if __name__ == "__main__":
    main()
