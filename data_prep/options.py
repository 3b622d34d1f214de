"""Command line -> DataPrepConfig, by Hydra's compose API: `configs/data.yaml`, then `key=value` overrides."""

import dataclasses
from pathlib import Path
from typing import Any

from data_prep.config import DataPrepConfig
from trainer.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def config_directory() -> Path:
    """`trainer/configs` of an installed wheel, else `configs/` of the repository."""
    for path in (ROOT / "trainer" / "configs", ROOT / "configs"):
        if (path / "data.yaml").is_file():
            return path
    raise UserError(f"{ROOT / 'configs' / 'data.yaml'}: missing: install trivium again")


def compose_config(overrides: list[str]) -> DataPrepConfig:
    """The typed and checked config. Raises UserError with one line that names the key."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for argument in overrides:
        if "=" not in argument:
            raise UserError(f"{argument}: not KEY=VALUE; `trivium data --help` lists the keys")
    ConfigStore.instance().store(name="data_schema", node=DataPrepConfig)
    try:
        with initialize_config_dir(str(config_directory()), version_base=None):
            composed = compose("data", overrides=overrides)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    assert isinstance(config, DataPrepConfig)
    config.validate()
    return config


def explain(error: Exception) -> str:
    """The useful line of a Hydra or OmegaConf error (the cause is more to the point than its wrapper)."""
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None) or ""
    first = str(cause).strip().splitlines()[0]
    if type(cause).__name__ in ("ConfigAttributeError", "ConfigKeyError"):
        near = nearest(key)
        return f"{key}: no such key{near}; `trivium data --help` lists them"
    return f"{key + ': ' if key and key not in first else ''}{first}; `trivium data --help` lists the keys"


def nearest(key: str) -> str:
    """`; did you mean X?` when a known key is close."""
    from difflib import get_close_matches

    found = get_close_matches(key, list(flat(dataclasses.asdict(DataPrepConfig()))), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def help_text() -> str:
    """Every key with its default."""
    from data_prep import run

    keys = "\n".join(
        f"    {key}={value}" for key, value in flat(dataclasses.asdict(DataPrepConfig())).items()
    )
    return f"{(run.__doc__ or '').strip()}\n\n  keys and defaults:\n{keys.replace('=None', '=null')}"
