"""Reader speed: tokens per second of CPU through TokenBatches, against plain webdataset and a raw memory map.

    PYTHONPATH=. python tests/bench/bench_stream.py [--tokens 64000000] [--repeats 5]

One process, one thread, page cache warm. Figures are million tokens per CPU-second (process_time, the best
of `repeats` interleaved rounds, since a shared machine only ever makes things slower); the ratios are within
this run. Every reader ends with the same thing: int64 tensors of inputs and targets, [8, seq_len] each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset

from trainer.stream.batches import TokenBatches
from trainer.stream.config import DataConfig
from trainer.stream.index import Index
from trainer.stream.loader import Prefetcher
from trainer.stream.mixture import Mixture
from trainer.stream.order import SourceOrder
from trainer.stream.shards import ShardWriter

MICRO, GLOBAL = 8, 256
TARGET = 50.0  # million tokens per CPU-second
SIMULATED = Path(__file__).parents[1] / "stream" / "simulated.py"


def write_data(directory: Path, tokens: int) -> float:
    """A corpus of random ids in documents of about 700 tokens; returns Mtok per CPU-second of the writer."""
    rng = np.random.default_rng(0)
    row = rng.integers(1, 32_768, tokens).astype(np.int64)
    row[rng.integers(0, tokens, tokens // 700)] = 0
    start = time.process_time()
    options = {"vocab_size": 32_768, "eos_id": 0, "tokenizer_sha256": "bench", "blocks_per_shard": 64}
    with ShardWriter(directory, name="bench", **options) as writer:
        for begin in range(0, tokens, 700):
            writer.add(row[begin : begin + 700])
    return tokens / (time.process_time() - start) / 1e6


def pair(rows_BW: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What a training step needs at the least: contiguous int64 inputs and targets."""
    return (
        torch.from_numpy(rows_BW[:, :-1].astype(np.int64)),
        torch.from_numpy(rows_BW[:, 1:].astype(np.int64)),
    )


def ours(
    directory: Path, seq_len: int, steps: int, fresh: bool = False, **options: object
) -> Callable[[], int]:
    """fresh: open everything anew each round, so that every block touched is opened, hashed and compared
    again.
    """
    config = DataConfig(train=str(directory), **options)  # type: ignore[arg-type]

    def opened() -> TokenBatches:
        return TokenBatches(config, seed=1, seq_len=seq_len, global_batch=GLOBAL, micro_batch=MICRO)

    warm = opened()

    def run() -> int:
        batches = opened() if fresh else warm
        return sum(m.tokens_BT.numel() for step in range(steps) for m in batches.batch(step).micros)

    return run


def plain_webdataset(directory: Path, seq_len: int, steps: int) -> Callable[[], int]:
    """Blocks in file order, cut into windows: no order, no checks, no resume."""
    urls = [str(path) for path in sorted(directory.glob("*.tar"))]

    def run() -> int:
        done, rows = 0, []
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            block = sample["tokens.npy"]
            for begin in range(0, len(block) - 1, seq_len):
                rows.append(block[begin : begin + seq_len + 1])
                if len(rows) == MICRO:
                    done += pair(np.stack(rows))[0].numel()
                    rows = []
            if done >= steps * GLOBAL * seq_len:
                break
        return done

    return run


def raw_memmap(directory: Path, seq_len: int, steps: int) -> Callable[[], int]:
    """Uniformly random windows of one flat map, the nanoGPT way."""
    index = Index.load(directory)
    maps = [np.memmap(directory / shard.file, "<u2", mode="r") for shard in index.shards]
    rng = np.random.default_rng(0)

    def run() -> int:
        done = 0
        for _ in range(steps * GLOBAL // MICRO):
            flat = maps[int(rng.integers(len(maps)))]
            begins = rng.integers(0, len(flat) - seq_len - 1, MICRO)
            done += pair(np.stack([flat[begin : begin + seq_len + 1] for begin in begins]))[0].numel()
        return done

    return run


def best(readers: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Best Mtok per CPU-second of each, rounds interleaved so that all see the same machine."""
    speeds: dict[str, float] = {}
    for _ in range(repeats):
        for name, run in readers.items():
            start = time.process_time()
            tokens = run()
            speeds[name] = max(speeds.get(name, 0.0), tokens / (time.process_time() - start) / 1e6)
    return speeds


def plan_cost() -> None:
    """Cost of planning a global batch of 1,024 samples out of 10^12 windows in three sources, far into a
    run.
    """
    sources = [
        SourceOrder(name, 1, size, 128, 1024)
        for name, size in (("a", 10**12), ("b", 10**9 + 7), ("c", 10**6))
    ]
    mixture = Mixture(
        sources, [(0, {"a": 0.7, "b": 0.2, "c": 0.1}), (10**9, {"a": 1.0, "b": 1.0, "c": 1.0})], 1
    )
    start = time.perf_counter()
    mixture.batch(10**15, 1024)
    cold = time.perf_counter() - start
    costs = []
    for step in range(300):
        start = time.perf_counter()
        mixture.batch(10**15 + step * 1024, 1024)
        costs.append(time.perf_counter() - start)
    median = np.median(costs) * 1e3
    print(f"plan 1,024 samples at sample 10^15, 3 sources: median {median:.2f} ms, first {cold * 1e3:.2f} ms")


def read_ahead(directory: Path, seq_len: int) -> None:
    """How long a step of 100 ms (a sleep, as on a GPU that is busy) waits for its batch."""
    batches = TokenBatches(
        DataConfig(train=str(directory)), seed=1, seq_len=seq_len, global_batch=1024, micro_batch=8, world=16
    )
    for workers in (0, 1):
        with Prefetcher(batches.batch, workers) as reader:
            reader.get(0)
            waited = 0.0
            for step in range(1, 21):
                time.sleep(0.1)
                start = time.perf_counter()
                reader.get(step)
                waited += time.perf_counter() - start
            shape = f"64 rows of {seq_len}, workers={workers}"
            print(f"wait for data per 100 ms step, {shape}: {waited / 20 * 1e3:.2f} ms")


def far_seek(root: Path) -> None:
    """100,000 shards of 2,000 blocks: open and plan the batch of sample 10^12, in a fresh process each.

    Once with data.verify=off (nothing but the index is looked at), once with the size of every shard compared
    as one rank of 1 and of 64 does it, on sparse tars.
    """
    sys.path.insert(0, str(SIMULATED.parent))
    import simulated

    directory = root / "simulated"
    simulated.write_simulated(directory, {})
    index = Index.load(directory)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    print(
        f"{len(index.shards):,} shards, index.json {(directory / 'index.json').stat().st_size / 1e6:.1f} MB:"
    )
    for verify, world in (("off", 1), ("blocks", 64), ("blocks", 1)):
        if verify == "blocks" and not (directory / index.shards.files[0]).exists():
            for file, size in zip(index.shards.files, index.shards.sizes().tolist()):
                with open(directory / file, "wb") as tar:
                    tar.truncate(size)
        config = {
            "sample": 10**12, "global_batch": 1024, "rank": 0, "world": world, "read": False,
            "verify": verify, "cache_dir": str(root / "cache"),
        }  # fmt: skip
        command = [sys.executable, str(SIMULATED), str(directory), json.dumps(config)]
        runs = [json.loads(subprocess.check_output(command, env=environment)) for _ in range(5)]
        slowest = max(run["open_s"] + run["plan_s"] for run in runs)
        best = min(runs, key=lambda run: run["open_s"] + run["plan_s"])
        print(
            f"  seek to sample 10^12, verify={verify}, rank 0 of {world}: open {best['open_s']:.3f} s + plan "
            f"{best['plan_s']:.3f} s (wall, best of {len(runs)}; slowest {slowest:.3f} s), memory "
            f"+{best['growth_mb']:.0f} MB at its highest over {best['imports_mb']:.0f} MB of bare imports = "
            f"{best['peak_mb']:.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "train"
        print(f"writer: {write_data(directory, arguments.tokens):.0f} Mtok/CPU-s in documents of 700 tokens")
        os.sync()
        for seq_len in (2048, 512):
            steps = min(16, arguments.tokens // (GLOBAL * seq_len))
            speeds = best(
                {
                    "trivium (rows hashed)": ours(directory, seq_len, steps),
                    "trivium, every block seen first": ours(directory, seq_len, steps, fresh=True),
                    "trivium + document mask": ours(directory, seq_len, steps, document_mask=True),
                    "plain webdataset, file order": plain_webdataset(directory, seq_len, steps),
                    "raw np.memmap, random windows": raw_memmap(directory, seq_len, steps),
                },
                arguments.repeats,
            )
            first = next(iter(speeds.values()))
            print(f"seq_len {seq_len}:")
            for name, speed in speeds.items():
                print(f"  {name:38s} {speed:7.0f} Mtok/CPU-s   trivium / this = {first / speed:.2f}")
            verdict = "met" if first >= TARGET else "MISSED"
            print(f"  target {TARGET:.0f} Mtok/CPU-s: {verdict} ({first / TARGET:.1f}x)")
            read_ahead(directory, seq_len)
        far_seek(Path(root))
    plan_cost()


if __name__ == "__main__":
    main()
