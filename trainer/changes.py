"""What may change between two attempts of one run, as data: the table of config keys that a resume refuses.

A run is one experiment: its weights, its data and their order. A key that decides one of these cannot
change half way, or the second half would silently be another experiment (or the change would silently have
no effect). Everything else may change: the number of devices, the engine, the learning rate, how long to
train. It is announced and kept."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from trainer.errors import UserError

# (pattern over dotted keys, why it cannot change). The first row that matches decides; an empty reason
# allows.
RULES: tuple[tuple[str, str], ...] = (
    ("model.attention", ""),  # another kernel for the same function
    ("model.loss_chunk_tokens", ""),  # memory only
    ("model.*", "the checkpoints hold the weights of the saved model"),
    ("seed", "data order, initial weights and sampling noise come from it"),
    ("seq_len", "the n-th sample of the data would be another one"),
    ("data.shuffle_blocks", "it is part of the order of the data"),
    (
        "data.sources.*.weight",
        "what was read so far was drawn with it (from here on: add a phase to data.weight_schedule)",
    ),
    ("global_batch", "step n would read other samples"),
)
# The same for run.json's lineage: digests of what went in, so that a moved path is fine and changed content
# is not.
LINEAGE_RULES = {
    "data": "the training data is not what this run has read so far",
    "tokenizer": "the same text would become other ids",
    "parent": "the weights this run started from were others",
}


class _Absent:
    def __repr__(self) -> str:
        return "(not set)"


ABSENT: Any = _Absent()


@dataclass(frozen=True)
class Change:
    """One dotted config key whose value differs; `old` or `new` is ABSENT where only one side knows the
    key."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {show(self.old)} -> {show(self.new)}"


def show(value: Any) -> str:
    """A config value as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str) and value else repr(value)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys -> leaves (scalars, lists, empty dicts)."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """All differences between two nested configs, in the order of the new one, then keys that are gone."""
    was, now = flatten(old), flatten(new)
    keys = [*now, *(key for key in was if key not in now)]
    changes = [Change(key, was.get(key, ABSENT), now.get(key, ABSENT)) for key in keys]
    return [
        c for c in changes if c.old != c.new and not (c.old != c.old and c.new != c.new)
    ]  # nan equals nan here


def why_refused(change: Change, changes: list[Change]) -> str:
    """The reason from RULES, or "" if the change is allowed. A key that only one side knows is a change of
    our code, not of the user's mind, unless its parent or child is on the other side (`rope_scaling: null
    -> {...}`)."""
    if change.old is ABSENT or change.new is ABSENT:
        related = any(
            other is not change
            and (other.key.startswith(change.key + ".") or change.key.startswith(other.key + "."))
            for other in changes
        )
        if not related:
            return ""
    if change.old is ABSENT and change.key.startswith("data.sources."):
        return ""  # a source added on the way: the stream's own state says whether the past stays what it was
    return next((reason for pattern, reason in RULES if fnmatchcase(change.key, pattern)), "")


def refuse(run_dir: str, changes: list[Change]) -> None:
    """UserError for the first change that RULES refuse: key, old value, new value, reason, fix."""
    for change in changes:
        reason = why_refused(change, changes)
        if reason:
            raise UserError(
                f"{change.key}={show(change.new)}: {run_dir} was started with {show(change.old)} and "
                f"{reason}: put the value back, or choose another run_dir"
            )


def refuse_lineage(run_dir: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """UserError if the digest of an input differs from the one the run began with."""
    for key, reason in LINEAGE_RULES.items():
        if old.get(key) and new.get(key) and old[key] != new[key]:
            raise UserError(
                f"{run_dir}: {reason} ({key} was {show(old[key])}, is {show(new[key])}): "
                "give it the same input again, or choose another run_dir"
            )
