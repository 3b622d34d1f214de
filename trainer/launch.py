"""From a command line to a running loop: the part of a stage's `main` that all stages share, and how errors
leave.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from trainer.config import StageConfig, compose_stage, help_text, plain
from trainer.errors import EXIT_USER_ERROR, UserError

T = TypeVar("T")


def run_main(main: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Call a command; a `UserError` becomes one line on stderr and exit code 2, anything else keeps its
    traceback.

    Before the ranks have met, all of them fail alike and rank 0 alone speaks.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"trivium: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


def run_stage(name: str, story: str, argv: list[str], make_stage: Callable[..., object]) -> int:
    """Compose, check, open the world, build stage and engine, resume, train. Returns the exit code.

    `make_stage(config, world)` builds the stage; everything else is the same for all of them.
    """
    from trainer.engine.world import engine_of_launcher, launch_from_env  # torch from here on

    if any(argument in ("-h", "--help") for argument in argv):
        print(help_text(name, story))
        return 0
    config = compose_stage(name, [a for a in argv if a != "--cfg"], engine_of_launcher(os.environ))
    config = adopt_model(config, argv)
    config.validate(launch_from_env(os.environ).world)
    if "--cfg" in argv:
        import yaml

        print(yaml.safe_dump(plain(config), sort_keys=False), end="")
        return 0
    return _train(name, config, make_stage)


def adopt_model(config: StageConfig, argv: list[str]) -> StageConfig:
    """With `init_from`, the architecture is that of the weights; a `model` asked for beside it must not
    differ.
    """
    if config.init_from is None:
        return config
    from dataclasses import asdict

    from trainer.load import open_source

    found = open_source(config.init_from).config
    # How it is computed is not part of what it is.
    found = replace(found, attention=config.model.attention, loss_chunk_tokens=config.model.loss_chunk_tokens)
    asked = [a.partition("=")[0] for a in argv if a.startswith(("model.", "model="))]
    for key in asked:
        field = key.partition(".")[2]
        fields = [field] if field and hasattr(found, field) else list(asdict(found))
        for name in fields:
            here, there = getattr(config.model, name), getattr(found, name)
            if here != there:
                raise UserError(
                    f"{key}: model.{name}={here}, but init_from={config.init_from} has {there}; drop {key}"
                )
    return replace(config, model=found)


def _train(name: str, config: StageConfig, make_stage: Callable[..., object]) -> int:
    from trainer.engine import world as worlds
    from trainer.engine.build import build_engine
    from trainer.load import open_source
    from trainer.loop import Loop, Stage, resume
    from trainer.observe.loggers import make_loggers
    from trainer.run import RunDirectory, config_hash

    world = worlds.start(config.engine.device)
    code = 1
    try:
        with _spoken(world.rank):
            world.same_everywhere("the resolved config", config_hash(plain(config)))
            stage: Stage = _together(world, lambda: make_stage(config, world))  # type: ignore[assignment]
            lineage = {"data": stage.state(0).get("fingerprint")}
            if stage.tokenizer is not None:
                lineage["tokenizer"] = stage.tokenizer.sha256
            run = RunDirectory.open(
                config.run_dir,
                plain(config),
                name,
                world.rank,
                lineage,
                world=world.size,
                share=_share(world),
            )
            engine = build_engine(config.model, config.engine, config.optim, world, config.seed)
            progress, told = _together(world, lambda: resume(engine, stage, run))
            if progress.step == 0 and config.init_from is not None:
                engine.load_weights(open_source(config.init_from).weights())
            run.resume_from(progress.step)
            loggers = make_loggers(config.logger, run, config.steps, progress.step)
            try:
                for line in [*run.describe(), *told]:
                    loggers.message(line)
                code = Loop(stage, engine, config, run, progress, loggers).run()
            finally:
                loggers.close(code)
                run.close()
        engine.close()
        worlds.stop(world)
        return code
    except UserError as error:
        # Another rank may be inside a collective that this one will never enter: no farewell, just go.
        print(f"trivium: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_USER_ERROR)


class _Silent(UserError):
    """An error that rank 0 has told already."""


@contextlib.contextmanager
def _spoken(rank: int) -> Iterator[None]:
    """Errors that all ranks share are told by rank 0 alone; one rank's own error says whose it is."""
    try:
        yield
    except _Silent:
        sys.stdout.flush()
        os._exit(EXIT_USER_ERROR)
    except UserError as error:
        raise UserError(f"rank {rank}: {error}" if rank else str(error)) from error


def _together(world: object, work: Callable[[], T]) -> T:
    """Do `work` on every rank; if it is a user's mistake on any, all stop and one speaks."""
    from trainer.engine.world import World

    assert isinstance(world, World)
    failure, result = "", None
    try:
        result = work()
    except UserError as error:
        failure = str(error)
    said = [str(text) for text in world.gather(failure) if text]
    if said:
        raise UserError(said[0]) if world.is_main else _Silent(said[0])
    return result  # type: ignore[return-value]


def _share(world: object) -> Callable[[object], object]:
    """A broadcast from rank 0 over the CPU group, as `RunDirectory.open` wants it."""
    from trainer.engine.world import World

    assert isinstance(world, World)
    return lambda value: world.gather(value)[0]
