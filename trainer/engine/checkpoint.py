"""Checkpoints that any engine on any number of ranks can go on from, and that no crash can half-write.

    checkpoints/step-00000200/
        ranges.json, __R_0.distcp     flat ranges of masters and moments, see ranges.py
        state.json                    step, counters, stream and stage state, model config: plain JSON
        tokenizer/                    so that the directory alone can be sampled from or exported
        manifest.json                 size and xxh3_128 of every file above
        COMMITTED                     hash of the manifest; a directory without it does not exist

Written as `step-N.tmp`, fsynced, renamed, the parent fsynced, and only then marked. An old one is deleted
after the newer one has been verified, marker first, so that a crash in between leaves no half checkpoint
that looks whole.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor

from trainer.engine.checkpoint_config import CheckpointConfig
from trainer.engine.engine import Engine
from trainer.engine.ranges import FlatRange
from trainer.engine.storage import INDEX, RangeReader, RangeWriter, read_index
from trainer.engine.world import World
from trainer.errors import SharedError, UserError

MARKER = "COMMITTED"
NAME = re.compile(r"step-(\d{8,})$")


def directory_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def save(
    root: Path, step: int, engine: Engine, state: dict[str, Any], extra: dict[str, Path] | None = None
) -> Path:
    """Write the checkpoint of `step` and commit it. Collective.

    `state`: JSON of the loop, the stream and the stage. `extra`: name -> directory to copy in (the
    tokenizer).

    Raises:
        UserError: the disk is full or cannot be written; the older checkpoints are untouched.
    """
    world = engine.world
    final, working = directory_of(root, step), root / f"step-{step:08d}.tmp"
    failure = ""
    if world.is_main:
        try:
            for stale in (working, final):
                if stale.exists():
                    shutil.rmtree(stale)
            working.mkdir(parents=True)
        except OSError as error:
            failure = str(error)
    _raise_together(engine, failure, root)
    failure = ""
    try:
        dcp.save(engine.shards(), storage_writer=RangeWriter(working), process_group=world.cpu_group)
    except dcp.CheckpointException as error:
        failure = str(_disk_error(error))
    _raise_together(engine, failure, root, working)
    mine = {
        path.name: [path.stat().st_size, _hash(path)] for path in working.glob(f"__{world.rank}_*.distcp")
    }
    files: dict[str, Any] = {}
    for part in world.gather(mine):
        assert isinstance(part, dict)
        files.update(part)
    if world.is_main:
        try:
            whole = {
                **state, "step": step, "updates": engine.updates, "model": asdict(engine.model_config),
                "engine": engine.config.kind, "world": world.size, "format": "trivium-checkpoint-1",
                "shapes": {n.removesuffix("/param"): list(r.whole_shape) for n, r in
                engine.shards(moments=False).items()},
            }  # fmt: skip
            _write(working / "state.json", json.dumps(whole, indent=1))
            for name, source in (extra or {}).items():
                shutil.copytree(source, working / name)
            _commit(working, final, files)
        except OSError as error:
            failure = str(error)
    _raise_together(engine, failure, root, working)
    return final


def _commit(working: Path, final: Path, files: dict[str, Any]) -> None:
    """Manifest, rename, marker: after each line a crash leaves either no checkpoint or a whole one."""
    for path in sorted(p for p in working.rglob("*") if p.is_file()):
        name = str(path.relative_to(working))
        if name not in files:
            files[name] = [path.stat().st_size, _hash(path)]
    _write(working / "manifest.json", json.dumps(files, indent=1, sort_keys=True))
    for directory in [working, *(p for p in working.rglob("*") if p.is_dir())]:
        _fsync_directory(directory)
    os.rename(working, final)
    _fsync_directory(final.parent)
    _write(final / MARKER, _hash(final / "manifest.json"))
    _fsync_directory(final)


def _disk_error(error: dcp.CheckpointException) -> OSError:
    """DCP wraps every rank's error in one of its own; a disk's complaint is the user's business, all else is
    a fault.
    """
    for inner, _trace in error.failures.values():
        if isinstance(inner, OSError):
            return inner
    raise error


def _raise_together(engine: Engine, failure: str, root: Path, working: Path | None = None) -> None:
    """If any rank failed, all raise the same error, so that none is left waiting in a collective."""
    said = [text for text in engine.world.gather(failure) if text]
    if said:
        if working is not None and engine.world.is_main:
            shutil.rmtree(working, ignore_errors=True)
        engine.world.barrier()  # the error is raised after the tidying, on every rank
        raise SharedError(
            f"cannot save a checkpoint in {root}: {said[0]}; free or extend the disk and start again"
        )


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
    if not manifest.is_file() or (path / MARKER).read_text() != _hash(manifest):
        return f"{manifest} is not the one that was committed"
    for number, (name, (length, digest)) in enumerate(json.loads(manifest.read_text()).items()):
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != length:
            return f"{file} has {file.stat().st_size} bytes, {length} were committed"
        if hashes and number % size == rank and _hash(file) != digest:
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


def newest_whole(root: Path, world: World) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and the newer ones that do not with what is wrong. Collective."""
    problems: dict[Path, str] = {}
    steps = world.gather(list_steps(root))[
        0
    ]  # rank 0's view: a shared file system may show others an older one
    assert isinstance(steps, list)
    for step in reversed(steps):
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


def load(path: Path, engine: Engine) -> dict[str, Any]:
    """Weights, moments and counters into a built engine, whatever engine and world size wrote them.
    Collective.

    Raises:
        UserError: the checkpoint is of another model.
    """
    state = read_state(path)
    shards = engine.shards()
    _same_tensors(path, state, shards)
    # dcp.load wants dict[str, Any]; the planner finds our ranges through their protocol methods.
    dcp.load(shards, storage_reader=RangeReader(path), process_group=engine.world.cpu_group)
    engine.load_shards(shards)
    engine.updates = state["updates"]
    return state


def _same_tensors(path: Path, state: dict[str, Any], shards: dict[str, FlatRange]) -> None:
    here = {n.removesuffix("/param"): list(r.whole_shape) for n, r in shards.items() if n.endswith("/param")}
    there = state["shapes"]
    for name in sorted(set(here) | set(there)):
        if here.get(name) != there.get(name):
            raise UserError(
                f"{path}: {name} has shape {there.get(name)} there and {here.get(name)} in this model; "
                f"set model.* as in its state.json"
            )


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Whole fp32 weights of a checkpoint one by one, on one process without any process group."""
    shapes = read_state(path)["shapes"]
    sizes = read_index(path)
    for name, shape in shapes.items():
        whole = FlatRange(torch.empty(sizes[f"{name}/param"]["size"]), 0, shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
            dcp.load({f"{name}/param": whole}, storage_reader=RangeReader(path), no_dist=True)
        yield name, whole.local.view(shape)


def prune(root: Path, config: CheckpointConfig) -> list[int]:
    """Delete what the retention rule does not keep, if the newest one is whole. Rank 0 only, after a save.

    What a killed save left behind goes too. Returns the steps removed.
    """
    for path in root.iterdir():
        if path.name.endswith(".tmp") or (NAME.search(path.name) and not is_committed(path)):
            shutil.rmtree(path)
    steps = list_steps(root)
    kept = set(steps[-config.keep_last :]) | {
        s for s in steps if config.keep_every and s % config.keep_every == 0
    }
    doomed = [step for step in steps if step not in kept]
    # Its hashes were taken from the files when it was saved; here sizes and marker tell a broken disk.
    if doomed and check(directory_of(root, steps[-1]), hashes=False):
        return []
    for step in doomed:
        path = directory_of(root, step)
        os.unlink(path / MARKER)
        shutil.rmtree(path)
    return doomed
