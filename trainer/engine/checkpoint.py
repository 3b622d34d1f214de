"""Checkpoints that any engine on any number of ranks can go on from, and that no crash can half-write.

checkpoints/step-00000200/
    ranges.json, rank-R.bin       flat ranges of masters and moments, see ranges.py and storage.py
    state.json                    step, counters, stream and stage state, model config: plain JSON
    tokenizer/                    so that the directory alone can be sampled from or exported
    manifest.json                 size and xxh3_128 of every file above
    COMMITTED                     hash of the manifest; a directory without it does not exist (commit.py)
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from trainer.durable import write_durably
from trainer.engine.commit import commit, directory_of, is_committed, read_state, remove
from trainer.engine.engine import Engine
from trainer.engine.ranges import FlatRange
from trainer.engine.storage import RangeReader, RangeWriter, read_index, read_tensor
from trainer.engine.world import World
from trainer.errors import SharedError, UserError


def describe(engine: Engine, step: int, state: dict[str, Any]) -> dict[str, Any]:
    """What `state.json` holds: `state` of the loop and the stage, and what the ranges belong to."""
    shapes = {n.removesuffix("/param"): list(r.whole_shape) for n, r in engine.shards(moments=False).items()}
    return {
        **state, "step": step, "updates": engine.updates, "model": asdict(engine.model_config),
        "engine": engine.config.kind, "world": engine.world.size, "format": "trivium-checkpoint-1",
        "shapes": shapes,
    }  # fmt: skip


def save(
    root: Path, step: int, engine: Engine, state: dict[str, Any], extra: dict[str, Path] | None = None
) -> Path:
    """Write the checkpoint of `step` and commit it, while training waits (`Saver` does not wait). Collective.

    `state`: JSON of the loop, the stream and the stage. `extra`: name -> directory to copy in (the
    tokenizer).

    Raises:
        UserError: the disk is full or cannot be written; the older checkpoints are untouched.
    """
    return write(
        root, step, engine.ranges_to_save(), describe(engine, step, state), extra or {}, engine.world
    )


def write(
    root: Path,
    step: int,
    ranges: dict[str, FlatRange],
    state: dict[str, Any],
    extra: dict[str, Path],
    world: World,
    before_commit: Callable[[], None] = lambda: None,
    progress: Callable[[], None] = lambda: None,
) -> Path:
    """The whole save over `world.cpu_group`, of ranges that nobody changes meanwhile. Collective.

    `before_commit` is called on rank 0 when all files are there: what must be on the disk before the
    checkpoint exists, goes there. `progress` is called after each piece that was written.
    """
    final, working = directory_of(root, step), root / f"step-{step:08d}.tmp"
    failure = ""
    if world.is_main:
        try:
            for stale in (working, final):
                if stale.exists():
                    remove(stale)
            working.mkdir(parents=True)
        except OSError as error:
            failure = str(error)
    _raise_together(world, failure, root)
    failure = ""
    writer = RangeWriter(working, progress)
    try:
        # DCP takes dict[str, Any]; its planner finds our ranges through their protocol methods.
        dcp.save(dict(ranges), storage_writer=writer, process_group=world.cpu_group)
    except dcp.CheckpointException as error:
        failure = str(_disk_error(error))
    _raise_together(world, failure, root, working, final)
    files: dict[str, Any] = {}
    for part in world.gather(writer.written):
        assert isinstance(part, dict)
        files.update(part)
    if world.is_main:
        try:
            write_durably(working / "state.json", json.dumps(state, indent=1))
            for name, source in extra.items():
                shutil.copytree(source, working / name)
                for copied in (working / name).rglob("*"):
                    _fsync(copied)
            before_commit()
            commit(working, final, files)
        except OSError as error:
            failure = str(error)
    _raise_together(world, failure, root, working, final)
    return final


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(error: dcp.CheckpointException) -> OSError:
    """DCP wraps every rank's error in one of its own; a disk's complaint is the user's business, all else is
    a fault.
    """
    for inner, _trace in error.failures.values():
        if isinstance(inner, OSError):
            return inner
    raise error


def _raise_together(world: World, failure: str, root: Path, *leftovers: Path) -> None:
    """If any rank failed, all raise the same error, so that none is left waiting in a collective."""
    said = [text for text in world.gather(failure) if text]
    if said:
        if world.is_main:
            for path in leftovers:
                if path.exists() and not is_committed(path):
                    shutil.rmtree(path, ignore_errors=True)
        world.barrier()  # the error is raised after the tidying, on every rank
        raise SharedError(
            f"cannot save a checkpoint in {root}: {said[0]}; free or extend the disk (older ones are whole)"
        )


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
    index = read_index(path)
    for name, shape in shapes.items():
        yield name, read_tensor(path, index[f"{name}/param"]).view(shape)
