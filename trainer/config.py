"""Command line -> one typed, checked config per stage: Hydra composes, dataclasses type, `validate()`
crosses the fields.

Each dataclass lives beside the code that it configures; this file only assembles them. Hydra's compose API
is used instead of `@hydra.main`, so Hydra owns no directory, no working directory and no log: every rank
composes the same.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from trainer.compose import compose, config_directory, flat
from trainer.engine.checkpoint_config import CheckpointConfig
from trainer.engine.config import FSDP_KINDS, ZERO_KINDS, EngineConfig
from trainer.engine.schedule import OptimConfig, ScheduleConfig
from trainer.errors import UserError
from trainer.generate.config import SamplingConfig
from trainer.model.config import ModelConfig
from trainer.observe.loggers import LoggerConfig
from trainer.observe.watch_config import WatchConfig
from trainer.stability import StabilityConfig
from trainer.stream.config import DataConfig


@dataclass
class EvalConfig:
    """Held-out loss and bits per byte, at the start, every so many steps and at the end."""

    every: int = 250  # steps; 0: never
    sequences: int = 64  # of seq_len tokens, the first ones of the val split, over all ranks

    def validate(self) -> None:
        if self.every < 0:
            raise UserError(f"eval.every={self.every}: must be >= 0 steps (0: never)")
        if self.sequences < 1:
            raise UserError(f"eval.sequences={self.sequences}: must be at least 1")


@dataclass
class SampleConfig:
    """Text written by the model while it learns, from fixed prompts with fixed noise: only the weights
    differ.
    """

    every: int = 250  # steps; 0: never
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 48
    temperature: float = 0.8
    top_k: int = 50

    def validate(self) -> None:
        if self.every < 0:
            raise UserError(f"sample.every={self.every}: must be >= 0 steps (0: never)")
        try:
            self.sampling().validate()
        except UserError as error:
            raise UserError(str(error).replace("sampling.", "sample.", 1)) from error

    def sampling(self) -> SamplingConfig:
        """How the samples are drawn."""
        return SamplingConfig(self.max_new_tokens, self.temperature, self.top_k)


@dataclass
class StageConfig:
    """What every stage has. These keys stand at the top of every command line."""

    run_dir: str = "runs/pretrain"
    steps: int = 1000  # optimizer updates
    stop_after: int | None = None  # stop at this step as if asked to; the schedule stays that of `steps`
    seed: int = 0
    seq_len: int = 512  # tokens
    global_batch: int = 32  # sequences per update, over all ranks and micro-batches
    micro_batch: int = 8  # sequences per forward on one rank
    init_from: str | None = None  # weights only: a run, a checkpoint or a Hugging Face directory
    tokenizer: str | None = None  # directory; null: the one beside the data
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def validate(self, world: int) -> None:
        """Every check that needs no data: each group's own, then what holds between them.

        Raises:
            UserError: the first thing that is wrong, with its key, its value and the fix.
        """
        for name in ("steps", "seq_len", "global_batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.stop_after is not None and self.stop_after < 1:
            raise UserError(f"stop_after={self.stop_after}: must be at least 1 step, or null for all steps")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed={self.seed}: must be in [0, 2**63)")
        for group in (
            self.model,
            self.engine,
            self.optim,
            self.checkpoint,
            self.stability,
            self.watch,
            self.eval,
            self.sample,
            self.logger,
        ):
            group.validate()
        self.schedule.validate(self.steps)
        if self.seq_len > self.model.max_seq_len:
            raise UserError(
                f"seq_len={self.seq_len}: above model.max_seq_len={self.model.max_seq_len}; "
                f"lower seq_len or raise it"
            )
        self._check_batch("global_batch", self.global_batch, world)

    def _check_batch(self, key: str, size: int, world: int) -> None:
        if size % (world * self.micro_batch):
            raise UserError(
                f"{key}={size}: must be micro_batch={self.micro_batch} x accumulation x {world} ranks, "
                f"a multiple of {world * self.micro_batch}; change {key} or micro_batch"
            )


@dataclass
class PretrainConfig(StageConfig):
    """`trivium pretrain`."""

    data: DataConfig = field(default_factory=DataConfig)

    def validate(self, world: int) -> None:
        super().validate(world)
        self.data.validate()
        for phase in self.data.batch_ramp:
            self._check_batch("data.batch_ramp.global_batch", phase.global_batch, world)


STAGES: dict[str, type[StageConfig]] = {"pretrain": PretrainConfig}


def compose_stage(stage: str, overrides: list[str], launcher_engine: str | None = None) -> StageConfig:
    """The typed config of `stage`; not yet validated (that needs the number of ranks).

    `launcher_engine`: what accelerate's config file names. It stands in for an `engine=` that was not
    given, and a
    different `engine=` is refused: one of the two is a mistake.

    Raises:
        UserError: unknown key or group option, wrong type, malformed override.
    """
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise UserError(f"{override}: not KEY=VALUE; `trivium {stage} --help` lists the keys")
    chosen = [o.partition("=")[2] for o in overrides if o.startswith("engine=")]
    kinds = [o.partition("=")[2] for o in overrides if o.startswith("engine.kind=")]
    if launcher_engine is not None:
        for named in chosen + kinds:
            # `ddp` is what accelerate says without any config file, too: then it has no opinion.
            if named != launcher_engine != "ddp":
                raise UserError(
                    f"engine={named}: but accelerate's config file starts {launcher_engine}; "
                    f"drop engine= or pass "
                    f"--config_file configs/accelerate/{named}.yaml"
                )
        if not chosen:
            overrides = [f"engine={launcher_engine}", *overrides]
    config = compose(stage, f"{stage}_schema", STAGES[stage], overrides, f"trivium {stage}")
    assert isinstance(config, StageConfig)
    return config


def config_of(stage: str, values: dict[str, Any], where: str) -> StageConfig:
    """The typed config from a resolved one, e.g. a run directory's config.yaml; `where` is its name for
    messages. Raises UserError for keys or types that this version does not know.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(STAGES[stage]), values))
    except (OmegaConfBaseException, KeyError) as error:
        raise UserError(f"{where}: not a config of this version ({str(error).splitlines()[0]})") from error
    assert isinstance(config, StageConfig)
    return config


def plain(config: Any) -> dict[str, Any]:
    """The resolved config as plain dicts, lists and scalars: what the run directory keeps."""
    return dataclasses.asdict(config)


def help_text(stage: str, story: str) -> str:
    """The stage's own words, its groups and every key with its value as composed without overrides."""
    directory = config_directory()
    groups = []
    for group in sorted(p for p in directory.iterdir() if p.is_dir() and p.name != "accelerate"):
        options = sorted(p.stem for p in group.glob("*.yaml"))
        groups.append(f"    {group.name + '=':13}{' | '.join(options)}")
    keys = "\n".join(
        f"    {k}={'null' if v is None else v}" for k, v in flat(plain(compose_stage(stage, []))).items()
    )
    kinds = " | ".join(FSDP_KINDS + ZERO_KINDS)
    return f"{story.strip()}\n\n  groups (engines: {kinds}):\n" + "\n".join(groups) + f"\n\n  keys:\n{keys}"
