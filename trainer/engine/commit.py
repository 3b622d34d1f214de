"""Which checkpoint directories exist: names, the marker that commits one, verification, retention.

A directory is written as `step-N.tmp`, fsynced, renamed, its parent fsynced, and only then marked. One
without its marker does not exist. An old one is deleted after the newer one has been verified, marker first,
so that a crash in between leaves no half checkpoint that looks whole. No torch here: looking is quick.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from trainer.durable import fsync_directory, write_durably
from trainer.engine.checkpoint_config import CheckpointConfig
from trainer.errors import UserError
from trainer.faults import reach

if TYPE_CHECKING:
    from trainer.engine.world import World

INDEX = "ranges.json"
MARKER = "COMMITTED"
NAME = re.compile(r"step-(\d{8,})$")


def directory_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def file_hash(path: Path) -> str:
    """xxh3_128 of a file's content."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def commit(working: Path, final: Path, files: dict[str, Any]) -> None:
    """Manifest, rename, marker: after each line a crash leaves either no checkpoint or a whole one."""
    for path in sorted(p for p in working.rglob("*") if p.is_file()):
        name = str(path.relative_to(working))
        if name not in files:
            files[name] = [path.stat().st_size, file_hash(path)]
    reach("save/manifest")
    write_durably(working / "manifest.json", json.dumps(files, indent=1, sort_keys=True))
    for directory in [working, *(p for p in working.rglob("*") if p.is_dir())]:
        fsync_directory(directory)
    reach("save/rename")
    os.rename(working, final)
    fsync_directory(final.parent)
    reach("save/marker")
    # Written beside and renamed: an empty marker would make a whole checkpoint look damaged.
    write_durably(final / f"{MARKER}.tmp", file_hash(final / "manifest.json"))
    os.rename(final / f"{MARKER}.tmp", final / MARKER)
    fsync_directory(final)
    reach("save/committed")


def remove(path: Path) -> None:
    """Delete a checkpoint directory, its marker first: what a crash leaves of it does not exist."""
    if is_committed(path):
        os.unlink(path / MARKER)
        fsync_directory(path)
        reach("save/prune")
    shutil.rmtree(path)


def remove_after(root: Path, step: int) -> None:
    """Delete the checkpoints of later steps, the latest first: what a crash leaves is always a past."""
    for later in reversed([found for found in list_steps(root) if found > step]):
        remove(directory_of(root, later))


def is_committed(path: Path) -> bool:
    return (path / MARKER).is_file()


def list_steps(root: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := NAME.search(path.name))]
    return sorted(step for step, path in found if is_committed(path))


def check(path: Path, hashes: bool = True, rank: int = 0, size: int = 1) -> str:
    """What is wrong with a checkpoint directory, in words; empty if it is whole.

    `hashes`: also read the files again; of `size` ranks each reads its part.
    """
    if not is_committed(path):
        return f"{path} has no {MARKER} marker: its save did not finish"
    manifest = path / "manifest.json"
    if not manifest.is_file() or (path / MARKER).read_text() != file_hash(manifest):
        return f"{manifest} is not the one that was committed"
    for number, (name, (length, digest)) in enumerate(json.loads(manifest.read_text()).items()):
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != length:
            return f"{file} has {file.stat().st_size} bytes, {length} were committed"
        if hashes and number % size == rank and file_hash(file) != digest:
            return f"{file} does not have the content that was committed"
    return ""


def find(path: str | Path) -> Path:
    """The checkpoint that a user's path means: a checkpoint directory, or a run directory's newest whole one.

    Raises:
        UserError: nothing there, a directory whose save did not finish, or nothing that verifies.
    """
    path = Path(path)
    if NAME.search(path.resolve().name) or (path / INDEX).is_file():
        problem = check(path)
        if problem:
            raise UserError(f"{problem}; use another checkpoint of {path.resolve().parent}")
        return path
    root = path if path.name == "checkpoints" else path / "checkpoints"
    problems = []
    for step in reversed(list_steps(root)):
        problem = check(directory_of(root, step))
        if not problem:
            return directory_of(root, step)
        problems.append(problem)
    if problems:
        raise UserError(f"{path}: no checkpoint verifies; {problems[0]}")
    raise UserError(f"{path}: no committed checkpoint in {root}; give a run directory that has saved one")


def newest_whole(
    root: Path, world: "World", not_after: int | None = None
) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that verifies (of step `not_after` or before), and the newer ones that do not
    with what is wrong. Collective.
    """
    problems: dict[Path, str] = {}
    # rank 0's view: a shared file system may show others an older one
    steps = world.gather(list_steps(root))[0]
    assert isinstance(steps, list)
    for step in reversed([step for step in steps if not_after is None or step <= not_after]):
        path = directory_of(root, step)
        found = [str(text) for text in world.gather(check(path, True, world.rank, world.size)) if text]
        if not found:
            return path, problems
        problems[path] = found[0]
    return None, problems


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint: no longer the newest, but there for whoever wants to look into it."""
    aside = path.with_name(path.name + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(path, aside)
    return aside


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint directory."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def prune(root: Path, config: CheckpointConfig) -> list[int]:
    """Delete what the retention rule does not keep, if the newest one is whole. One process, after a save.

    What a killed save left behind goes too. Returns the steps removed.
    """
    for path in root.iterdir():
        if path.name.endswith(".tmp") or (NAME.search(path.name) and not is_committed(path)):
            remove(path)
    steps = list_steps(root)
    kept = set(steps[-config.keep_last :]) | {
        s for s in steps if config.keep_every and s % config.keep_every == 0
    }
    doomed = [step for step in steps if step not in kept]
    # Its hashes were taken from the files when it was saved; here sizes and marker tell a broken disk.
    if doomed and check(directory_of(root, steps[-1]), hashes=False):
        return []
    for step in doomed:
        remove(directory_of(root, step))
    return doomed
