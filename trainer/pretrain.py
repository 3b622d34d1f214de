"""Pretraining: predict the next token of the stream. `trivium pretrain [key=value ...]`

trivium pretrain experiment=quickstart                      one process, the built-in sample
trivium pretrain data.train=/data/web model=llama_1b engine=fsdp
torchrun --nproc_per_node 8 -m trainer.pretrain experiment=llama_1b data.train=/data/web
accelerate launch --config_file configs/accelerate/zero3.yaml -m trainer.pretrain experiment=gpt2_124m ...

The same command again resumes the run in run_dir, also on the other engine and on another number of ranks.
"""

import math
import sys
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config import PretrainConfig
from trainer.launch import run_main, run_stage

if TYPE_CHECKING:
    from torch import nn

    from trainer.engine.engine import LossSum
    from trainer.engine.world import World
    from trainer.stream.batches import Batch, Micro


class Pretrain:
    """The stage: a batch is a slice of the token stream, the loss is -log p of every next token."""

    name = "pretrain"

    def __init__(self, config: PretrainConfig, world: "World"):
        import torch

        from trainer.model.attention import require_backend
        from trainer.stream.batches import TokenBatches

        self.config = config
        self.device = world.device
        require_backend(config.model, world.device.type, training=True)
        self.read_ahead = config.data.workers
        self.quarantines = config.data.on_damage == "quarantine"
        self.tokenizer = find_tokenizer(config)
        if self.tokenizer is not None:
            self.tokenizer.check_vocab(config.model.vocab_size)
            self.token_bytes = torch.from_numpy(self.tokenizer.token_bytes()).to(self.device)
        self.notes = []
        if self.tokenizer is None and (config.eval.every or config.sample.every):
            self.notes.append("no tokenizer beside the data: no samples, no bits per byte; set tokenizer=DIR")
        self.batches = TokenBatches(
            config.data, seed=config.seed, seq_len=config.seq_len, global_batch=config.global_batch,
            micro_batch=config.micro_batch, rank=world.rank, world=world.size,
            vocab_size=config.model.vocab_size, tokenizer_sha256=self.tokenizer.sha256 if self.tokenizer else
            None,
        )  # fmt: skip
        if config.eval.every:
            _ = (
                self.batches.val_readers
            )  # opened now: what is wrong with them is told before the run is written

    def batch(self, step: int) -> "Batch":
        return self.batches.batch(step)

    def loss(self, model: "nn.Module", micro: "Micro") -> "LossSum":
        from trainer.engine.engine import LossSum

        return LossSum(model(**self._inputs(micro)))

    def _inputs(self, micro: "Micro") -> dict[str, Any]:
        def move(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(self.device, non_blocking=True)

        return {
            "tokens_BT": move(micro.tokens_BT), "targets_BT": move(micro.targets_BT),
            "positions_BT": move(micro.positions_BT), "documents_BT": move(micro.documents_BT),
        }  # fmt: skip

    def eval_batches(self) -> "Sequence[Micro]":
        if not self.batches.val_readers:
            return []
        return self.batches.eval_batches(self.config.eval.sequences)

    def eval_loss(self, model: "nn.Module", micro: "Micro") -> "LossSum":
        """Loss over all targets; and, for bits per byte, over those that stand for text (special tokens are
        no bytes).
        """
        from trainer.engine.engine import LossSum

        inputs = self._inputs(micro)
        nll_BT = model(**inputs, reduction="none")
        if self.tokenizer is None:
            return LossSum(nll_BT.sum())
        targets_BT = inputs["targets_BT"]
        bytes_BT = self.token_bytes[targets_BT.clamp(min=0)] * (targets_BT >= 0)
        text_nll = (nll_BT * (bytes_BT > 0)).sum()
        return LossSum(nll_BT.sum(), {"text_nll": text_nll, "bytes": bytes_BT.sum()})

    def eval_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        metrics = {"val/loss": sums["loss"] / sums["items"]}
        if sums.get("bytes"):
            metrics["val/bpb"] = sums["text_nll"] / sums["bytes"] / math.log(2)
        return metrics

    def state(self, step: int) -> dict[str, Any]:
        return self.batches.state(step)

    def check_state(self, state: dict[str, Any], step: int) -> None:
        self.batches.check_state(state, step)

    def restore(self, state: dict[str, Any]) -> None:
        self.batches.restore(state)

    def new_damage(self) -> list[dict[str, Any]]:
        return self.batches.new_damage()

    def adopt_damage(self, found: list[dict[str, Any]]) -> None:
        self.batches.adopt_damage(found)

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Where the rows of batch `step` come from, in the order in which one rank trains on them."""
        batches = self.batches
        found = []
        for sample in range(batches.consumed(step), batches.consumed(step + 1)):
            source, epoch, window = batches.mixture.locate(sample)
            reader = batches.readers[source]
            block, place = divmod(window, reader.windows_per_block)
            shards = reader.index.shards
            shard = shards[bisect_right(shards.first_block.tolist(), block) - 1]
            inside = block - shard.first_block
            offset = shard.base + inside * shard.stride
            offset += place * self.config.seq_len * np.dtype(reader.index.dtype).itemsize
            found.append({
                "sample": sample, "source": source, "epoch": epoch, "window": window, "shard": shard.file,
                "block": int(inside), "offset": int(offset),
            })  # fmt: skip
        return sorted(found, key=lambda row: (row["source"], row["window"]))

    def row_losses(self, model: "nn.Module", micro: "Micro") -> list[float]:
        """Mean loss of each row of a micro-batch over its supervised tokens; nan where it has none."""
        inputs = self._inputs(micro)
        nll_BT = model(**inputs, reduction="none")
        count_B = (inputs["targets_BT"] >= 0).sum(1)
        losses: list[float] = (nll_BT.sum(1) / count_B).tolist()
        return losses


STAGE = Pretrain


def find_tokenizer(config: PretrainConfig) -> Any:
    """`tokenizer=DIR`, else the one beside the first source; None if there is none (then no samples, no bits
    per byte).
    """
    from trainer.chat.tokenizer import Tokenizer

    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)
    for source in config.data.named_sources().values():
        beside = Path(source.path) / "tokenizer"
        if (beside / "tokenizer.json").is_file():
            return Tokenizer.load(beside)
    return None


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code. Raises UserError."""
    return run_stage("pretrain", __doc__ or "", sys.argv[1:] if argv is None else argv, Pretrain)


if __name__ == "__main__":
    sys.exit(run_main(main))
