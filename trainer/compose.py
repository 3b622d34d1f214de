"""Hydra composes, typed: `configs/NAME.yaml` and `key=value` overrides -> an instance of a dataclass.

Hydra's compose API is used instead of `@hydra.main`, so Hydra owns no directory, no working directory and no
log file, and every rank composes the same. Its errors become one line that names the key.
"""

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trainer.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def config_directory() -> Path:
    """`trainer/configs` of an installed wheel, else `configs/` of the repository."""
    for path in (ROOT / "trainer" / "configs", ROOT / "configs"):
        if (path / "pretrain.yaml").is_file():
            return path
    raise UserError(f"{ROOT / 'configs' / 'pretrain.yaml'}: missing: install trivium again")


def compose(name: str, schema_name: str, schema: type, overrides: list[str], command: str) -> Any:
    """An instance of `schema` from `configs/NAME.yaml` and the overrides, by Hydra. Raises UserError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name=schema_name, node=schema)
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            return OmegaConf.to_object(hydra_compose(name, overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, schema, command)) from error


def explain(error: Exception, schema: type, command: str) -> str:
    """The one useful line of a Hydra or OmegaConf error: key, what is wrong, what there is instead."""
    cause = error.__cause__ or error
    text = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    key = getattr(cause, "full_key", None) or ""
    if type(cause).__name__ in ("ConfigAttributeError", "ConfigKeyError"):
        near = get_close_matches(key, list(flat(dataclasses.asdict(schema()))), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key}: no such key{hint} `{command} --help` lists them"
    if type(cause).__name__ == "MissingConfigException":
        options = next((i for i, line in enumerate(text) if line.startswith("Available options")), None)
        wanted = text[0].removeprefix("In ").split(": ")[-1] if options is None else text[0]
        names = [line for line in text[(options or 0) + 1 :] if not line.startswith("Config search path")]
        names = [line for line in names if "provider=" not in line]
        found = "" if options is None else "; there are " + ", ".join(names)
        return f"{wanted.rstrip('.')}{found.rstrip('.')}"
    return f"{key + ': ' if key and key not in text[0] else ''}{text[0]}; `{command} --help` lists the keys"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; an empty mapping stays a value."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
        )
    return out
