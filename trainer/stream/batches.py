"""The batches of a pretraining run: step -> this rank's micro-batches, a pure function of the config.

The set of rows in a global batch is fixed by the step. Which rank trains on which row is free, since the
engine sums losses and gradients over all ranks before it divides: so the batch is sorted by place in the
data and rank r takes the r-th slice. Rank count, micro-batch and read-ahead therefore never change what the
model sees in a step.

Legend: N rows of this rank.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.stream import state
from trainer.stream.config import DataConfig
from trainer.stream.damage import Quarantine
from trainer.stream.index import Index
from trainer.stream.micro import IGNORE, Micro, make_micros
from trainer.stream.mixture import Mixture
from trainer.stream.order import SourceOrder
from trainer.stream.reader import TokenReader
from trainer.stream.store import split_path

__all__ = ["IGNORE", "Batch", "Micro", "TokenBatches"]


@dataclass
class Batch:
    """This rank's share of one global batch: samples first_sample .. first_sample + num_samples - 1.

    epochs: how often each source was read through at the end of this batch.
    """

    micros: list[Micro]
    first_sample: int
    num_samples: int
    epochs: dict[str, float]


class TokenBatches:
    """Batches of one split, and the windows to evaluate on.

    global_batch: sequences of a step; micro_batch: rows of a micro-batch. Every rank gets equally many
    micro-batches; when they do not divide evenly, rows without loss fill them up, so any `world` can read
    any global batch. vocab_size, tokenizer_sha256: of the model and its tokenizer; None means whatever the
    data was written with. Raises UserError for data that cannot be used with this config. `batch` may be
    called from several threads.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        vocab_size: int | None = None,
        tokenizer_sha256: str | None = None,
        split: str = "train",
    ):
        config.validate()
        self.config = config
        self.seed = seed
        self.seq_len = seq_len
        self.micro_batch = micro_batch
        self.rank, self.world = rank, world
        self.vocab_size, self.tokenizer_sha256 = vocab_size, tokenizer_sha256
        self.quarantine = Quarantine(config.on_damage, config.max_damaged, seed)
        self.readers = self._open(split)
        for name, source in config.named_sources().items():
            if name not in self.readers:
                raise UserError(
                    f"{source.path}: holds no {split}/index.json: write that split or name it with a val key"
                )
        self._val: dict[str, TokenReader] | None = None
        orders = [
            SourceOrder(name, seed, reader.num_windows, reader.windows_per_block, config.shuffle_blocks)
            for name, reader in self.readers.items()
        ]
        self.mixture = Mixture(orders, config.schedule(), seed)
        self.ramp = [(phase.step, phase.global_batch) for phase in config.batch_ramp]
        if not self.ramp or self.ramp[0][0] > 0:
            self.ramp.insert(0, (0, global_batch))

    @property
    def index(self) -> Index:
        """Index of the first source: what all sources share (`eos_id`, `tokenizer_sha256`)."""
        return next(iter(self.readers.values())).index

    @property
    def fingerprint(self) -> str:
        """What is read: the sha256 of the index of a single source, or of all of them by name."""
        return self._fingerprint(list(self.readers))

    def _fingerprint(self, names: list[str]) -> str:
        prints = {name: self.readers[name].index.fingerprint for name in names}
        if list(prints) == ["train"]:
            return prints["train"]
        return "sha256:" + hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()

    def consumed(self, step: int) -> int:
        """Samples in all steps before `step`."""
        ends = [start for start, _ in self.ramp[1:]] + [step]
        return sum(max(0, min(step, end) - start) * size for (start, size), end in zip(self.ramp, ends))

    def batch(self, step: int) -> Batch:
        """This rank's share of global batch `step`, a pure function of the config, `step`, and the damaged
        blocks that were found or adopted.
        """
        first, last = self.consumed(step), self.consumed(step + 1)
        source_N, window_N = self.mixture.batch(first, last - first)
        micros = self._share(list(self.readers.values()), source_N, window_N, (first, last - first))
        return Batch(micros, first, last - first, self.mixture.epochs(last))

    def eval_batches(self, num_sequences: int, source: str | None = None) -> list[Micro]:
        """This rank's share of the first `num_sequences` windows of the val split, or of all it has.

        Over all ranks each window comes exactly once, and every rank gets equally many micro-batches.
        Several sources share the count by their weights; `source` asks for one of them. Raises UserError
        without a val split.
        """
        readers = self.val_readers
        if source is not None:
            readers = {name: reader for name, reader in readers.items() if name == source}
        if not readers:
            raise UserError(
                f"data.val is not set and {', '.join(s.path for s in self.config.named_sources().values())} "
                f"holds no val/index.json: set data.val=/path or turn evaluation off"
            )
        quotas = self._quotas(readers, num_sequences)
        source_N = np.repeat(np.arange(len(quotas)), quotas)
        window_N = np.concatenate([np.arange(quota) for quota in quotas])
        return self._share(list(readers.values()), source_N, window_N)

    @property
    def val_readers(self) -> dict[str, TokenReader]:
        """The sources that have a val split, opened when first asked for; {} when there is none."""
        if self._val is None:
            self._val = self._open("val")
        return self._val

    def state(self, step: int) -> dict[str, Any]:
        """Where the stream stands after `step` steps, as JSON; a function of the config, the step, and the
        list of damaged blocks.
        """
        consumed = self.consumed(step)
        schedule = state.weights_before(consumed, self.config.schedule())
        read = [name for name in self.readers if any(name in weights for _, weights in schedule)]
        return {
            "v": state.VERSION,
            "seed": self.seed,
            "consumed": consumed,
            "fingerprint": self._fingerprint(read),
            "sources": {
                name: {
                    "fingerprint": self.readers[name].index.fingerprint,
                    "shards": len(self.readers[name].index.shards),
                }
                for name in read
            },
            "schedule": schedule,
            "seq_len": self.seq_len,
            "shuffle_blocks": self.config.shuffle_blocks,
            "quarantine": self.quarantine.state(consumed),
        }

    def check_state(self, saved: dict[str, Any], step: int) -> None:
        """Raise UserError when this config would not go on where `saved`, of `step` steps, stopped.

        What lies ahead may change: later weight phases, sources that only they name, later batch sizes. What
        was already read may not.
        """
        where = {name: f"{reader.where}={reader.directory}" for name, reader in self.readers.items()}
        state.check(saved, self.state(step), step, where)

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what a checked state says about damaged blocks."""
        self.adopt_damage(saved["quarantine"])

    def new_damage(self) -> list[dict[str, Any]]:
        """Damaged blocks that this rank found since the last call, as JSON, `samples` being those of the
        global batch that would have read them. For all ranks to adopt (`trainer.stream.damage` says when).
        """
        found = self.quarantine.take_new()
        for damage in found:
            first, count = damage.pop("batch")
            windows = set(damage.pop("windows"))
            damage["samples"] = [
                sample
                for sample in range(first, first + count)
                if (place := self.mixture.locate(sample))[0] == damage["source"] and place[2] in windows
            ]
        return found

    def adopt_damage(self, found: list[dict[str, Any]]) -> None:
        """Put blocks out of use that other ranks or an earlier attempt found, without reading them.

        Batches that were read ahead are to be dropped after it. Raises UserError above data.max_damaged.
        """
        self.quarantine.adopt(found)

    def _open(self, split: str) -> dict[str, TokenReader]:
        """Readers of every source that has this split, sorted by name."""
        readers = {}
        directory: str | None
        for name, source in sorted(self.config.named_sources().items()):
            several = f"data.sources.{name}." if self.config.sources else ""
            if split == "val" and source.val:
                key = several + "val" if several else "data.val"
                directory = split_path(source.val, split, self.config.cache_dir) or source.val
            else:
                key = several + "path" if several else "data.train"
                directory = split_path(source.path, split, self.config.cache_dir)
            if directory is not None:
                readers[name] = TokenReader(
                    directory,
                    seq_len=self.seq_len,
                    verify=self.config.verify,
                    where=key,
                    cache_dir=self.config.cache_dir,
                    name=name,
                    split=split,
                    quarantine=self.quarantine,
                )
                self._check_tokenizer(readers[name])
                if self.config.verify != "off":
                    readers[name].check_sizes(self.rank, self.world)
        return readers

    def _check_tokenizer(self, reader: TokenReader) -> None:
        index, where = reader.index, f"{reader.where}={reader.directory}"
        wanted = self.tokenizer_sha256 or index.tokenizer_sha256
        if index.tokenizer_sha256 != wanted:
            raise UserError(
                f"{where}: written with another tokenizer (sha256 {index.tokenizer_sha256[:12]}, not "
                f"{wanted[:12]}): use the tokenizer of the data, or encode the data again"
            )
        self.tokenizer_sha256 = wanted  # the sources of one run must agree among themselves, too
        if self.vocab_size is not None and index.vocab_size > self.vocab_size:
            raise UserError(
                f"model.vocab_size={self.vocab_size}: less than the {index.vocab_size} ids of {where}: "
                f"set model.vocab_size={index.vocab_size} or more"
            )

    def _quotas(self, readers: dict[str, TokenReader], total: int) -> list[int]:
        """`total` windows shared by weight; what a small source cannot give, the others do."""
        weights = {name: source.weight for name, source in self.config.named_sources().items()}
        quotas, left, weight_left = {}, total, sum(weights[name] for name in readers)
        for name in sorted(readers, key=lambda name: readers[name].num_windows / weights[name]):
            share = round(left * weights[name] / weight_left) if weight_left > weights[name] else left
            quotas[name] = min(share, readers[name].num_windows)
            left, weight_left = left - quotas[name], weight_left - weights[name]
        return [quotas[name] for name in readers]

    def _share(
        self,
        readers: list[TokenReader],
        source_N: np.ndarray,
        window_N: np.ndarray,
        batch: tuple[int, int] = (0, 0),
    ) -> list[Micro]:
        """This rank's slice of the sorted rows as micro-batches, equally many on every rank."""
        count = len(window_N)
        mine = slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)
        source_N, window_N = source_N[mine], window_N[mine]
        num_micros = -(-count // (self.world * self.micro_batch))
        dtype = max((np.dtype(reader.index.dtype) for reader in readers), key=lambda dtype: dtype.itemsize)
        eos_id = readers[0].index.eos_id
        window_NW = np.empty((num_micros * self.micro_batch, self.seq_len + 1), dtype)
        window_NW[len(window_N) :] = eos_id  # rows without loss, where the rows do not divide evenly
        num_targets_N = np.zeros(len(window_NW), np.int64)
        for number, reader in enumerate(readers):
            first, last = np.searchsorted(source_N, [number, number + 1])
            reader.read(window_N[first:last], window_NW[first:last], batch)
            num_targets_N[first:last] = reader.num_targets(window_N[first:last])
        return make_micros(
            window_NW,
            num_targets_N,
            micro_batch=self.micro_batch,
            num_rows=len(window_N),
            eos_id=eos_id,
            document_mask=self.config.document_mask,
        )
