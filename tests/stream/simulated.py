"""A data set of 100,000 shards of 2,000 blocks that takes no room: few blocks are real.

Also the program that opens it in a fresh process and reads one global batch far into a run:

    python tests/stream/simulated.py DIR CONFIG_JSON
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

SHARDS, BLOCKS, SEQ_LEN, BLOCK_TOKENS = 100_000, 2_000, 2048, 1 << 18


def write_simulated(directory: Path, real: dict[int, np.ndarray]) -> None:
    """index.json, a sparse blocks.xxh3, and sparse tars of the shards that hold the blocks `real`:
    number -> tokens.
    """
    from trainer.stream.index import HASH, HASHES_FILE, Index, block_hash, member_layout
    from trainer.stream.table import SECTOR, Shards

    base, stride = member_layout(BLOCK_TOKENS, "uint16")
    size = BLOCKS * stride + 2 * SECTOR
    empty = xxhash.xxh3_64_hexdigest(bytes(HASH.itemsize * BLOCKS))
    rows = [[f"web-{n:06d}.tar", size, BLOCKS, f"{n:016x}", empty] for n in range(SHARDS)]
    directory.mkdir()
    with open(directory / HASHES_FILE, "wb") as file:
        file.truncate(HASH.itemsize * SHARDS * BLOCKS)
        for number in sorted({block // BLOCKS for block in real}):
            hashes = np.zeros(BLOCKS, HASH)
            with open(directory / rows[number][0], "wb") as tar:
                tar.truncate(size)
                for block, tokens in real.items():
                    if block // BLOCKS == number:
                        hashes[block % BLOCKS] = block_hash(tokens)
                        tar.seek(base + block % BLOCKS * stride)
                        tar.write(tokens.tobytes())
            file.seek(HASH.itemsize * BLOCKS * number)
            file.write(hashes.tobytes())
            rows[number][4] = xxhash.xxh3_64_hexdigest(hashes.tobytes())
    tokens = SHARDS * BLOCKS * BLOCK_TOKENS + 1
    Index(
        name="web", dtype="uint16", vocab_size=1 << 16, eos_id=0, tokenizer_sha256="t",
        block_tokens=BLOCK_TOKENS, tokens=tokens, n_valid=BLOCK_TOKENS + 1, documents=1, bytes_of_text=0,
        shards=Shards(rows, base, stride),
    ).save(directory)  # fmt: skip


def memory(key: str) -> float:
    """VmRSS or VmHWM (its highest so far) of this process, MB. ru_maxrss would count the parent's, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1e3
    raise KeyError(key)


def open_and_read(directory: str, config: dict[str, Any]) -> dict[str, Any]:
    """One rank: open, plan and read the global batch that holds sample config["sample"]."""
    from trainer.stream.batches import TokenBatches
    from trainer.stream.config import DataConfig

    imports_s, before = time.process_time(), memory("VmRSS")
    begin, cpu = time.perf_counter(), time.process_time()
    data = DataConfig(train=directory, verify=config["verify"], cache_dir=config["cache_dir"])
    batches = TokenBatches(
        data, seed=7, seq_len=SEQ_LEN,
        global_batch=config["global_batch"], micro_batch=4, rank=config["rank"], world=config["world"],
    )  # fmt: skip
    opened = time.perf_counter()
    step = config["sample"] // config["global_batch"]
    batches.mixture.batch(batches.consumed(step), config["global_batch"])
    planned, after_plan = time.perf_counter(), memory("VmHWM")
    rows: list[Any] = []
    if config["read"]:
        batch = batches.batch(step)
        assert batch.first_sample <= config["sample"] < batch.first_sample + batch.num_samples
        for micro in batch.micros:
            real = micro.tokens_BT[(micro.targets_BT != -100).any(1)]
            rows += [xxhash.xxh3_64_hexdigest(row.numpy().astype("<u2").tobytes()) for row in real]
    return {
        "open_s": opened - begin,
        "plan_s": planned - opened,
        "read_s": time.perf_counter() - planned,
        "cpu_s": time.process_time() - cpu,
        "imports_cpu_s": imports_s,
        "imports_mb": before,
        "plan_mb": after_plan - before,
        "peak_mb": memory("VmHWM"),
        "growth_mb": memory("VmHWM") - before,
        "rows": rows,
    }


if __name__ == "__main__":
    print(json.dumps(open_and_read(sys.argv[1], json.loads(sys.argv[2]))))
