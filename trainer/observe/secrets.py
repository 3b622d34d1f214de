"""Keeps secrets out of everything a run writes down: config.yaml, W&B, the report."""

import os
import re
from typing import Any

REDACTED = "<redacted>"
# Judged by the last part of a config key or the name of an environment variable. `tokens` must not match:
# half of the keys of a language-model trainer count tokens.
SECRET_NAME = re.compile(
    r"(^|_)(api_?key|secret|(secret|access|private)_key|password|passwd|credentials?|(access|auth|hf|bearer)_token)$",
    re.I,
)
SECRET_VARIABLE = re.compile(r"(_|^)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)$")
URL_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")


def secret_values() -> list[str]:
    """Values of the environment variables that by their name hold a secret (WANDB_API_KEY, HF_TOKEN, ...)."""
    return [value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) >= 8]


def redact(value: Any, name: str = "", hidden: list[str] | None = None) -> Any:
    """A copy of a plain config (dicts, lists, scalars) without secrets: values under secret-sounding keys,
    values of secret environment variables wherever they occur, and passwords inside URLs become
    "<redacted>"."""
    hidden = secret_values() if hidden is None else hidden
    if isinstance(value, dict):
        return {key: redact(item, str(key), hidden) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name, hidden) for item in value]
    if isinstance(value, str) and value:
        if SECRET_NAME.search(name):
            return REDACTED
        for secret in hidden:
            value = value.replace(secret, REDACTED)
        return URL_PASSWORD.sub(REDACTED, value)
    return value
