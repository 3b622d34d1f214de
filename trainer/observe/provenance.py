"""Which code ran: the commit of the source tree and the versions of what results depend on."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("trivium", "torch", "deepspeed", "numpy", "triton", "wandb")


def code_version() -> dict[str, Any]:
    """{"commit", "dirty"} of the source tree this module was imported from; {} outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit, status = (
            subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True, timeout=10)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this node, or a slow file system
        return {}
    if commit.returncode or status.returncode:
        return {}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def versions() -> dict[str, str]:
    """Versions of python and the packages whose change could change results, read without importing them."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
