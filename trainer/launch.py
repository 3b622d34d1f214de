"""From a command line to a running loop: what the stages' `main`s share, and how a user's mistakes leave."""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.config import StageConfig, compose_stage, help_text, plain
from trainer.errors import EXIT_USER_ERROR, SharedError, UserError

if TYPE_CHECKING:
    from trainer.engine.world import World
    from trainer.loop import Stage

T = TypeVar("T")
MakeStage = Callable[[Any, "World"], "Stage"]


def run_main(main: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Call a command; a `UserError` becomes one line on stderr and exit code 2, else the traceback stays.

    Before the ranks have met all of them fail alike, so rank 0 alone speaks.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"trivium: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


def run_stage(name: str, story: str, argv: list[str], make_stage: MakeStage) -> int:
    """Compose and check the config, then train. Returns the exit code.

    `make_stage(config, world)` builds the stage; everything else is the same for all of them.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        print(help_text(name, story))
        return 0
    from trainer.engine.world import engine_of_launcher, launch_from_env  # torch from here on

    overrides = [argument for argument in argv if argument != "--cfg"]
    config = adopt_model(compose_stage(name, overrides, engine_of_launcher(os.environ)), overrides)
    config.validate(launch_from_env(os.environ).world)
    if len(overrides) < len(argv):
        import yaml

        print(yaml.safe_dump(plain(config), sort_keys=False), end="")
        return 0
    return train(name, config, make_stage)


def adopt_model(config: StageConfig, overrides: list[str]) -> StageConfig:
    """With `init_from`, the architecture is that of the weights; a `model` asked for must not differ."""
    if config.init_from is None:
        return config
    from trainer.load import open_source

    found = open_source(config.init_from).config
    # How it is computed is not part of what it is.
    found = replace(found, attention=config.model.attention, loss_chunk_tokens=config.model.loss_chunk_tokens)
    for key in (o.partition("=")[0] for o in overrides if o.startswith(("model.", "model="))):
        field = key.partition(".")[2]
        for name in [field] if hasattr(found, field) else asdict(found):
            here, there = getattr(config.model, name), getattr(found, name)
            if here != there:
                raise UserError(
                    f"{key}: model.{name}={here}, but init_from={config.init_from} has {there}; drop {key}"
                )
    return replace(config, model=found)


def train(name: str, config: StageConfig, make_stage: MakeStage) -> int:
    """Open the world, build stage and engine, resume or begin, run the loop. Returns the exit code."""
    from trainer.engine import world as worlds

    world = worlds.start(config.engine.device)
    try:
        code = _train(name, config, make_stage, world)
    except UserError as error:
        if world.is_main or not isinstance(error, SharedError):
            place = f"rank {world.rank}: " if world.rank else ""
            print(f"trivium: {place}{error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Another rank may be inside a collective that this one will never enter: no farewell, just go.
        os._exit(EXIT_USER_ERROR)
    worlds.stop(world)
    return code


def _train(name: str, config: StageConfig, make_stage: MakeStage, world: "World") -> int:
    from trainer.engine.build import build_engine
    from trainer.load import open_source
    from trainer.loop import Loop, resume
    from trainer.observe.loggers import make_loggers
    from trainer.run import RunDirectory, config_hash

    world.same_everywhere("the resolved config", config_hash(plain(config)))
    stage = together(world, lambda: make_stage(config, world))
    lineage = {"data": stage.state(0).get("fingerprint")}
    if stage.tokenizer is not None:
        lineage["tokenizer"] = stage.tokenizer.sha256

    def open_run() -> RunDirectory:
        share = lambda value: world.gather(value)[0]  # noqa: E731
        return RunDirectory.open(
            config.run_dir, plain(config), name, world.rank, lineage, world=world.size, share=share
        )

    engine = together(
        world, lambda: build_engine(config.model, config.engine, config.optim, world, config.seed)
    )
    run = together(world, open_run)
    progress, told = together(world, lambda: resume(engine, stage, run))
    if progress.step == 0 and config.init_from is not None:
        engine.load_weights(open_source(config.init_from).weights())
        told.append(f"weights from {config.init_from}")
    run.resume_from(progress.step)
    loggers = make_loggers(config.logger, run, config.steps, progress.step)
    code = 1
    try:
        for line in [*run.describe(), *told]:
            loggers.message(line)
        code = Loop(stage, engine, config, run, progress, loggers).run()
    finally:
        loggers.close(code)
        run.close()
    engine.close()
    return code


def together(world: "World", work: Callable[[], T]) -> T:
    """Do `work` on every rank; a user's mistake on any of them stops all, and rank 0 tells the first."""
    failure = ""
    try:
        result = work()
    except UserError as error:
        failure = str(error)
    said = [str(text) for text in world.gather(failure) if text]
    if said:
        raise SharedError(said[0])
    return result
