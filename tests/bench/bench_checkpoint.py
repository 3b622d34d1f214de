"""What a checkpoint costs: the step after a save, the pause of the step that saves, and the writing itself.

    python -m tests.bench.bench_checkpoint [--engine fsdp] [--rounds 5]

In one run, in turns: steps without a save, the step that orders a background save and the step after it, the
same with a synchronous save, and a plain write and fsync of the same number of bytes to the same disk. Ratios
are medians over the rounds; the reference is the step without a save, and the plain write.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from trainer.engine import checkpoint
from trainer.engine import world as worlds
from trainer.engine.build import build_engine
from trainer.engine.checkpoint_config import CheckpointConfig
from trainer.engine.config import EngineConfig
from trainer.engine.engine import Engine, LossSum
from trainer.engine.saver import Saver
from trainer.engine.schedule import OptimConfig
from trainer.model.config import ModelConfig
from trainer.stream.micro import Micro

SEQ_LEN, BATCH = 512, 8


def step(engine: Engine) -> float:
    """Seconds of one update on random tokens."""
    window = torch.randint(0, engine.model_config.vocab_size, (BATCH, SEQ_LEN + 1))
    micro = Micro(window[:, :-1], window[:, 1:], None, None, BATCH * SEQ_LEN, 0)
    started = time.perf_counter()
    engine.train_step([micro], lambda m, x: LossSum(m(x.tokens_BT, targets_BT=x.targets_BT)), 1e-4)
    return time.perf_counter() - started


def plain_write(path: Path, size: int) -> float:
    """Seconds to write and fsync `size` bytes."""
    block = memoryview(os.urandom(1 << 24))
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for begin in range(0, size, len(block)):
            file.write(block[: size - begin])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", default="fsdp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where to write; default: the temporary directory")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    world = worlds.start("cpu", {})
    model = ModelConfig(vocab_size=4096, tie_embeddings=True)
    config = EngineConfig(kind=args.engine, compile=True)
    engine = build_engine(model, config, OptimConfig(), world, 0)
    root = Path(tempfile.mkdtemp(dir=args.directory))
    size = sum(r.local.numel() * r.local.element_size() for r in engine.shards().values())
    saver = Saver(root, engine, CheckpointConfig())
    for _ in range(3):
        step(engine)
    saver.save(0, {}, {})  # the first one also makes the buffers
    saver.wait()
    rows: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        rows.setdefault(name, []).append(value)

    for number in range(1, args.rounds + 1):
        for _ in range(3):
            note("step", step(engine))
        started = time.perf_counter()
        saver.save(2 * number, {}, {})
        note("pause, background", time.perf_counter() - started)
        note("step after, background", step(engine))
        saver.wait()
        for _ in range(2):
            note("step", step(engine))
        started = time.perf_counter()
        checkpoint.save(root, 2 * number + 1, engine, {})
        note("pause, synchronous", time.perf_counter() - started)
        note("step after, synchronous", step(engine))
        note("plain write", plain_write(root / "plain", size))
    median = {name: statistics.median(values) for name, values in rows.items()}
    plain, whole = median["step"], median["pause, synchronous"]
    print(f"engine={args.engine}, {size / 1e6:.0f} MB a checkpoint, {args.rounds} rounds, {root.parent}")
    for name, value in median.items():
        print(f"{name:26}{value:8.3f} s  {value / plain:6.2f} of a step")
    print(f"step that saves + its pause, background: {1 + median['pause, background'] / plain:.3f}")
    print(f"step after a background save: {median['step after, background'] / plain:.3f}   (target <= 1.15)")
    print(
        f"write speed: {size / whole / 1e6:.0f} MB/s, {median['plain write'] / whole:.2f} of a plain write's"
    )
    engine.close()
    worlds.stop(world)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
