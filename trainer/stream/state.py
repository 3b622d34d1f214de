"""The stream's part of a checkpoint: what was read so far, and whether another config goes on from there.

What lies ahead of the checkpoint may change: batch sizes, weights, sources that were not read yet. What lies
behind may not, or samples would be read twice or never.
"""

from collections.abc import Mapping
from typing import Any

from trainer.errors import UserError

VERSION = 2
State = dict[str, Any]


def weights_before(sample: int, schedule: list[tuple[int, dict[str, float]]]) -> list[list[Any]]:
    """The phases that samples before `sample` belong to (the first one always), without resting sources."""
    past = [phase for phase in schedule if phase[0] < max(1, sample)]
    return [[start, {name: weight for name, weight in weights.items() if weight}] for start, weights in past]


def check(state: State, here: State, step: int, where: Mapping[str, str]) -> None:
    """Raise UserError when `here`, this config's state after `step` steps, does not go on from `state`.

    where: source -> the key and directory that name it, for messages.
    """
    if state["v"] != VERSION:
        raise UserError(
            f"stream state of version {state['v']}: this version reads {VERSION}: use its version"
        )
    for name, setting in (
        ("seed", "seed"),
        ("seq_len", "seq_len"),
        ("shuffle_blocks", "data.shuffle_blocks"),
    ):
        if state[name] != here[name]:
            raise UserError(
                f"{setting}={here[name]}: this run was begun with {state[name]}, and another value would "
                f"repeat and skip samples: set it back, or begin a new run with init_from"
            )
    if state["consumed"] != here["consumed"]:
        raise UserError(
            f"global_batch or data.batch_ramp: steps before {step} read {state['consumed']} samples, now "
            f"they would be {here['consumed']}: keep the past and add a data.batch_ramp entry from step "
            f"{step} on"
        )
    _check_sources(state, here, where)
    if state["schedule"] != here["schedule"]:
        raise UserError(
            f"data.weight_schedule: the weights of samples before {state['consumed']} were "
            f"{state['schedule']}: keep them and add a phase with start_sample={state['consumed']} or later"
        )


def _check_sources(state: State, here: State, where: Mapping[str, str]) -> None:
    first = state["consumed"]
    for name, was in state["sources"].items():
        if name not in where:
            raise UserError(
                f"data.sources.{name} is missing: this run read it before sample {first}: name it with the "
                f"shards it had (to stop reading it, add a data.weight_schedule phase without it)"
            )
        now = here["sources"].get(name)
        if now is not None and now != was:
            counts = f"{now['shards']} shards where this run began with {was['shards']}"
            if now["shards"] == was["shards"]:
                counts = "not the shards this run began with"
            raise UserError(
                f"{where[name]}: {counts} (fingerprint {now['fingerprint'][:15]}, not "
                f"{was['fingerprint'][:15]}): give {name} its old shards back and name added ones as another "
                f"of data.sources, with a data.weight_schedule phase from start_sample={first} on, or begin "
                f"a new run with init_from"
            )
