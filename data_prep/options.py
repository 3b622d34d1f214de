"""Command line -> DataPrepConfig: `configs/data.yaml`, then `key=value` overrides."""

import dataclasses

from data_prep.config import DataPrepConfig
from trainer.compose import compose, flat
from trainer.errors import UserError


def compose_config(overrides: list[str]) -> DataPrepConfig:
    """The typed and checked config. Raises UserError with one line that names the key."""
    for argument in overrides:
        if "=" not in argument:
            raise UserError(f"{argument}: not KEY=VALUE; `trivium data --help` lists the keys")
    config = compose("data", "data_schema", DataPrepConfig, overrides, "trivium data")
    assert isinstance(config, DataPrepConfig)
    config.validate()
    return config


def help_text() -> str:
    """Every key with its default."""
    from data_prep import run

    keys = "\n".join(
        f"    {key}={value}" for key, value in flat(dataclasses.asdict(DataPrepConfig())).items()
    )
    return f"{(run.__doc__ or '').strip()}\n\n  keys and defaults:\n{keys.replace('=None', '=null')}"
