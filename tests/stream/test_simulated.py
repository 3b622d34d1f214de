"""100,000 shards: opening and seeking to sample 10^12 takes little memory and finds the right tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simulated
import xxhash
from simulated import BLOCK_TOKENS, BLOCKS, SEQ_LEN, SHARDS

from trainer.stream.order import SourceOrder

SAMPLE, GLOBAL_BATCH = 10**12, 24
PER_BLOCK = BLOCK_TOKENS // SEQ_LEN


@pytest.fixture(scope="module")
def windows() -> list[int]:
    """The windows of the batch that holds the sample, one by one from the order alone."""
    order = SourceOrder("train", 7, SHARDS * BLOCKS * PER_BLOCK, PER_BLOCK, 1024)
    first = SAMPLE // GLOBAL_BATCH * GLOBAL_BATCH
    return [int(order.windows(sample, 1)[0]) for sample in range(first, first + GLOBAL_BATCH)]


@pytest.fixture(scope="module")
def blocks(windows: list[int]) -> dict[int, np.ndarray]:
    """Random tokens for the blocks of these windows."""
    rng = np.random.default_rng(0)
    return {
        window // PER_BLOCK: rng.integers(1, 1 << 16, BLOCK_TOKENS + 1).astype("<u2") for window in windows
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, blocks: dict[int, np.ndarray]) -> Path:
    directory = tmp_path_factory.mktemp("simulated") / "train"
    simulated.write_simulated(directory, blocks)
    return directory


def start(directory: str, cache: str, rank: int, world: int) -> dict:
    """One rank in a process of its own."""
    config = {
        "sample": SAMPLE, "global_batch": GLOBAL_BATCH, "rank": rank, "world": world, "read": True,
        "verify": "blocks", "cache_dir": cache,
    }  # fmt: skip
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, str(simulated.__file__), directory, json.dumps(config)], capture_output=True,
        text=True, timeout=120, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_far_sample_of_many_shards_is_found_in_little_memory(
    data: Path, windows: list[int], blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    """Against the tokens that were put there, on 1 and on 3 ranks; through a URL, as no shard but those of
    the batch is on the disk to have its size looked at.
    """
    expected = sorted(
        xxhash.xxh3_64_hexdigest(
            blocks[window // PER_BLOCK][window % PER_BLOCK * SEQ_LEN :][:SEQ_LEN].tobytes()
        )
        for window in windows
    )
    assert len({block // BLOCKS for block in blocks}) > GLOBAL_BATCH // 2  # nearly every row another shard
    for world in (1, 3):
        found = [start(f"local://{data}", str(tmp_path / str(world)), rank, world) for rank in range(world)]
        assert sorted(row for result in found for row in result["rows"]) == expected
        assert max(result["growth_mb"] for result in found) < 200
