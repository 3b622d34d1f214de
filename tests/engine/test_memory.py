"""A save and a load take at most 1.5 times a rank's own shard of extra host memory, on every engine.

Measured by the kernel: the peak resident size is reset before and read after (`/proc/self/clear_refs`). The
shard is what the rank owns of fp32 masters and two moments.
"""

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine_parts import OPTIM, Piece, loss

from trainer.engine import checkpoint, commit
from trainer.engine.build import build_engine
from trainer.engine.checkpoint_config import CheckpointConfig
from trainer.engine.config import EngineConfig
from trainer.engine.saver import Saver
from trainer.model.config import ModelConfig

MODEL = ModelConfig(vocab_size=8192, hidden_size=256, num_layers=12, max_seq_len=64)
LAYOUTS = [("fsdp", 1), ("fsdp", 2), ("hsdp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero2", 1)]


@dataclass
class Peak:
    """Bytes of resident memory now, and the extra at the worst moment inside the `with`."""

    extra: int = 0

    def __enter__(self) -> "Peak":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what an earlier test freed would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now
        self.before = _status("VmRSS")
        return self

    def __exit__(self, *_error: object) -> None:
        self.extra = _status("VmHWM") - self.before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":"))) << 10


def measure(world, kind, root):
    """Extra memory over the bytes of the rank's shard: synchronous save, two background saves, load."""
    engine = build_engine(MODEL, EngineConfig(kind=kind, device="cpu"), OPTIM, world, 0)
    window = torch.randint(0, MODEL.vocab_size, (1, 9))
    micro = Piece(window[:, :-1], window[:, 1:], 8, 0)
    engine.train_step([micro], loss, OPTIM.lr)  # moments that were never written take no memory
    own = sum(shard.local.numel() * shard.local.element_size() for shard in engine.shards().values())
    found = {}
    with Peak() as peak:
        checkpoint.save(root, 1, engine, {})
    found["save"] = peak.extra / own
    saver = Saver(root, engine, CheckpointConfig())
    for step in (2, 3):
        with Peak() as peak:
            saver.save(step, {}, {})
            saver.wait()
        found[f"background save {step - 1}"] = peak.extra / own
    del saver
    with Peak() as peak:
        checkpoint.load(commit.directory_of(root, 3), engine)
    found["load"] = peak.extra / own
    engine.close()
    return found, own


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda pair: f"{pair[0]}x{pair[1]}")
def test_saving_and_loading_need_no_second_copy_of_the_model(pool, tmp_path, layout):
    kind, world = layout
    for found, own in pool.run(world, measure, kind, tmp_path):
        print(kind, world, own >> 20, {name: round(value, 2) for name, value in found.items()})
        assert own > 60e6  # big enough that buffers of fixed size do not matter
        assert max(found.values()) <= 1.5, found
