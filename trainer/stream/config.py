"""Keys of the group `data`: where the token shards are, how sources are mixed, how batches are made.

    data.train=/data/fineweb                                   one source
    data.sources={web:{path:/data/web,weight:0.7},code:{path:/data/code,weight:0.3}}

A path is what data_prep wrote (`PATH/train/index.json`, `PATH/val/index.json`), or one directory with an
`index.json`; local, on a shared file system, or any URL that fsspec opens (s3://, gs://, https://, ...).
"""

import math
import re
from dataclasses import dataclass, field

from trainer.errors import UserError

VERIFY = ("off", "size", "blocks")
ON_DAMAGE = ("halt", "quarantine")


@dataclass
class SourceConfig:
    """One source of a mixture; `weight` is its share of the samples relative to the other weights."""

    path: str = ""
    weight: float = 1.0
    val: str | None = None  # another place for its validation split; None: PATH/val if it is there


@dataclass
class WeightPhase:
    """From sample `start_sample` of the run on, these weights hold; a source not named rests."""

    start_sample: int = 0
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class BatchPhase:
    """From step `step` on, a global batch holds `global_batch` sequences."""

    step: int = 0
    global_batch: int = 0


@dataclass
class DataConfig:
    """verify: off | size (every shard has its size) | blocks (and each block its hash, when first read).

    on_damage: halt | quarantine (a block whose hash stays wrong after all attempts is replaced by another
    one of its source, recorded, and the same on every rank and in every resume), up to max_damaged blocks.

    shuffle_blocks: how many blocks are mixed with each other at a time; part of the order, do not change in
    a run. workers: threads that read ahead (0: the training thread reads); they never change what is read.
    """

    train: str | None = None
    val: str | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    weight_schedule: list[WeightPhase] = field(default_factory=list)
    batch_ramp: list[BatchPhase] = field(default_factory=list)
    document_mask: bool = False
    shuffle_blocks: int = 1024
    verify: str = "blocks"
    on_damage: str = "halt"
    max_damaged: int = 100
    workers: int = 1
    cache_dir: str = "~/.cache/trivium/shards"

    def named_sources(self) -> dict[str, SourceConfig]:
        """Name -> source; the single source of `data.train` is called `train`."""
        if self.train:
            return {"train": SourceConfig(path=self.train, val=self.val)}
        return dict(self.sources)

    def schedule(self) -> list[tuple[int, dict[str, float]]]:
        """Weight phases in order, the first one at sample 0."""
        phases = [(phase.start_sample, dict(phase.weights)) for phase in self.weight_schedule]
        if not phases or phases[0][0] > 0:
            phases.insert(0, (0, {name: source.weight for name, source in self.named_sources().items()}))
        return phases

    def validate(self) -> None:
        """Raise UserError for what can be known without opening the data."""
        if self.train and self.sources:
            raise UserError(
                "data.train and data.sources are both set: use data.train for one source, else data.sources"
            )
        if not self.train and not self.sources:
            raise UserError("data.train is not set: give the directory of the token shards, data.train=/path")
        if self.sources and self.val:
            raise UserError(f"data.val={self.val}: with data.sources, give each source its own val key")
        for name, source in self.sources.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise UserError(
                    f"data.sources.{name}: use letters, digits, '-' and '_' in the name of a source"
                )
            if not source.path:
                raise UserError(
                    f"data.sources.{name}.path is not set: give the directory of its token shards"
                )
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise UserError(
                    f"data.sources.{name}.weight={source.weight}: must be above 0 (to rest a source for a "
                    f"while, "
                    f"use data.weight_schedule)"
                )
        self._validate_weight_schedule()
        self._validate_batch_ramp()
        if self.shuffle_blocks < 1:
            raise UserError(f"data.shuffle_blocks={self.shuffle_blocks}: must be at least 1 (default 1024)")
        if self.verify not in VERIFY:
            raise UserError(f"data.verify={self.verify}: must be one of {', '.join(VERIFY)}")
        if self.on_damage not in ON_DAMAGE:
            raise UserError(f"data.on_damage={self.on_damage}: must be one of {', '.join(ON_DAMAGE)}")
        if self.on_damage == "quarantine" and self.verify != "blocks":
            raise UserError(
                f"data.on_damage=quarantine: with data.verify={self.verify} damage is not looked for: set "
                f"data.verify=blocks"
            )
        if self.max_damaged < 1:
            raise UserError(f"data.max_damaged={self.max_damaged}: must be at least 1 block")
        if self.workers < 0:
            raise UserError(f"data.workers={self.workers}: must be 0 (no read-ahead) or more")

    def _validate_weight_schedule(self) -> None:
        names, before = self.named_sources(), -1
        for number, phase in enumerate(self.weight_schedule):
            where = f"data.weight_schedule[{number}]"
            if phase.start_sample <= before:
                raise UserError(
                    f"{where}.start_sample={phase.start_sample}: must be above the one before, first at "
                    f"least 0"
                )
            before = phase.start_sample
            for name, weight in phase.weights.items():
                if name not in names:
                    raise UserError(
                        f"{where}.weights.{name}: no such source; there are {', '.join(sorted(names))}"
                    )
                if not (math.isfinite(weight) and weight >= 0):
                    raise UserError(f"{where}.weights.{name}={weight}: must be 0 or more")
            if not any(weight > 0 for weight in phase.weights.values()):
                raise UserError(f"{where}.weights: at least one source needs a weight above 0")

    def _validate_batch_ramp(self) -> None:
        before = -1
        for number, phase in enumerate(self.batch_ramp):
            where = f"data.batch_ramp[{number}]"
            if phase.step <= before:
                raise UserError(f"{where}.step={phase.step}: must be above the one before, first at least 0")
            if phase.global_batch < 1:
                raise UserError(f"{where}.global_batch={phase.global_batch}: must be at least 1 sequence")
            before = phase.step
