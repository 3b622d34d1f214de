"""From a command line to a running loop: what the stages' `main`s share, and how a user's mistakes leave."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.config import StageConfig, compose_stage, help_text, plain
from trainer.errors import EXIT_USER_ERROR, SharedError, UserError
from trainer.faults import reach

if TYPE_CHECKING:
    from trainer.engine.engine import Engine
    from trainer.engine.world import World
    from trainer.load import Source
    from trainer.stage import Stage

T = TypeVar("T")
# A rank that leaves another to speak stays so long: launchers kill all ranks as soon as the first has gone,
# and the one that was to speak would be killed before it did.
LINGER_S = 10.0
MakeStage = Callable[[Any, "World"], "Stage"]


def run_main(main: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Call a command; a `UserError` becomes one line on stderr and exit code 2, else the traceback stays.

    Before the ranks have met they mostly fail alike, so one per host speaks: a host may have its own mistake.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        if (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0":
            print(f"trivium: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr, flush=True)
        else:
            time.sleep(LINGER_S)
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
    """With `init_from`, the architecture is that of the weights; a `model` asked for must not differ.

    A run that has saved goes on from its own checkpoint: then `init_from` may have moved or gone.
    """
    if config.init_from is None:
        return config
    from trainer.engine.commit import list_steps
    from trainer.load import open_source

    started = bool(list_steps(Path(config.run_dir) / "checkpoints"))
    found = open_source(config.run_dir if started else config.init_from).config
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
        else:
            time.sleep(LINGER_S)
        sys.stdout.flush()
        # Another rank may be inside a collective that this one will never enter: no farewell, just go.
        os._exit(EXIT_USER_ERROR)
    worlds.stop(world)
    return code


def _train(name: str, config: StageConfig, make_stage: MakeStage, world: "World") -> int:
    from trainer.engine import commit
    from trainer.engine.build import build_engine
    from trainer.loop import Loop, Progress, resume
    from trainer.observe.loggers import make_loggers
    from trainer.observe.watch import Watch
    from trainer.run import RunDirectory, config_hash, read_damage
    from trainer.stability import Stability

    world.same_everywhere("the resolved config", config_hash(plain(config)))
    stage = together(world, lambda: make_stage(config, world))
    lineage = {"data": stage.state(0).get("fingerprint")}
    if stage.tokenizer is not None:
        lineage["tokenizer"] = stage.tokenizer.sha256

    # Everything that can be a mistake is looked at before the run directory is written.
    saved, damaged = commit.newest_whole(Path(config.run_dir) / "checkpoints", world)
    if saved is not None:
        state = commit.read_state(saved)
        done = Progress.of(state)
        together(world, lambda: stage.check_state(state["stream"], done.data_step(done.step)))
        together(world, lambda: stage.restore(state["stream"]))
    known = together(world, lambda: read_damage(Path(config.run_dir)) if world.is_main else [])
    together(world, lambda: stage.adopt_damage(world.gather(known)[0]))  # type: ignore[arg-type]
    engine = together(
        world, lambda: build_engine(config.model, config.engine, config.optim, world, config.seed)
    )
    told = list(stage.notes)
    if saved is None and config.init_from is not None:
        source = together(world, lambda: load_initial(engine, stage, str(config.init_from)))
        lineage["parent"] = source.digest()
        told.append(f"weights from {source.directory}")

    def open_run() -> RunDirectory:
        return RunDirectory.open(
            config.run_dir, plain(config), name, world.rank, lineage, world=world.size,
            share=lambda value: world.gather(value)[0],
        )  # fmt: skip

    run = together(world, open_run)
    for path, problem in damaged.items():
        told.append(f"damaged checkpoint set aside as {path.name}.damaged: {problem}")
        if world.is_main:
            commit.set_aside(path)
    stability = Stability(config.stability)
    progress = together(world, lambda: resume(engine, saved, stability))
    if saved is not None:
        told.append(f"going on from {saved}")
    run.resume_from(progress.step)
    reach("wandb/start")
    loggers = make_loggers(config.logger, run, config.steps, progress.step)
    watch = Watch(config.watch, world, run.log_dir)
    code = 1
    try:
        for line in [*run.describe(), *told]:
            loggers.message(line)
        code = Loop(stage, engine, config, run, progress, loggers, stability, watch).run()
    finally:
        watch.close()
        loggers.close(code)
        run.close()
    engine.close()
    return code


def load_initial(engine: "Engine", stage: "Stage", path: str) -> "Source":
    """Weights of another model into a fresh engine, after a look whether its ids mean the same text."""
    from trainer.chat.tokenizer import Tokenizer
    from trainer.load import open_source

    source = open_source(path)
    if source.tokenizer_dir is not None and stage.tokenizer is not None:
        theirs = Tokenizer.load(source.tokenizer_dir)
        if not theirs.same_ids(stage.tokenizer):
            raise UserError(
                f"init_from={path}: its tokenizer has other ids than the data's, "
                f"{stage.tokenizer.directory}; encode the data with it: "
                f"trivium data tokenizer.path={source.tokenizer_dir}"
            )
    engine.load_weights(source.weights())
    return source


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
