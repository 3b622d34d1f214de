"""The run directory: all that there is to know about a run, on disk, readable without us.

    runs/NAME/  config.yaml                the resolved config of the newest attempt
                config-attempt-N.yaml      what attempts up to N ran with, where it was changed since
                run.json                   run id, W&B id, attempts, lineage, versions
                metrics.jsonl              one line per step; samples.jsonl: text written by the model
                quarantine.json            blocks of damaged data that were put out of use, if any
                goodput.jsonl              where the time of all attempts went
                checkpoints/ rollouts/ wandb/ logs/attempt-N/
                report.html DONE           DONE exists only when the last step was trained and saved

Starting a stage in an existing run directory is the resume: there is no other switch. The new config is
compared with the saved one (`trainer.changes`): changes that would make the run another run are refused,
the others are announced and recorded. Rank 0 writes; the other ranks learn from it what it found through
`share`, a broadcast, rather than from the disk: a shared file system may show them an older state."""

import fcntl
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from trainer.changes import Change, compare, refuse, refuse_lineage
from trainer.durable import fsync_directory
from trainer.errors import UserError
from trainer.observe.files import LineFile, explained, replace_text
from trainer.observe.provenance import code_version, versions
from trainer.observe.secrets import redact

FORMAT = "trivium-run-1"
DAMAGE_FILE = "quarantine.json"
PREPARED = {
    "config.yaml",
    "logs",
    "slurm",
    "wandb",
}  # what may lie in a new run directory before its first start
READER = -1  # the rank of one who only looks
Share = Callable[[Any], Any]
"""`share(value)` on rank 0 returns `value`; on every other rank, called with None, what rank 0 shared (JSON
types)."""


def config_hash(config: dict[str, Any]) -> str:
    """16 hex digits of a resolved config, equal on all ranks or the launch is wrong (another file, another
    env)."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class RunDirectory:
    """An opened run directory. On rank 0 it also holds the lock that keeps a second launch out of it."""

    path: Path
    rank: int
    state: dict[str, Any]  # the content of run.json
    config: dict[str, Any]  # resolved, plain, without secrets
    changes: list[Change] = field(default_factory=list)
    _lock: IO[str] | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: dict[str, Any],
        stage: str,
        rank: int = 0,
        lineage: dict[str, Any] | None = None,
        *,
        world: int = 1,
        share: Share | None = None,
        clock: Callable[[], float] = time.time,
    ) -> "RunDirectory":
        """Creates the run directory, or opens it for the next attempt (the resume).

        config: the resolved config as plain dicts, lists and scalars; secrets in it are not written.
        lineage: digests of the inputs: {"data": fingerprint, "tokenizer": sha256, "parent": checkpoint
        digest}; a digest that differs from the recorded one is refused, a new one is added.
        share: makes this a collective; every rank gets rank 0's outcome, be it the state or the same
        UserError. Without it, call rank 0 first and the others after a barrier (they read run.json).
        Raises UserError: a refused change, another stage, a foreign directory, a broken run.json, a run
        that is in use, no permission, no space. Nothing of an existing run is touched when it does."""
        path = Path(path)
        config = redact(config)
        if rank != 0:
            outcome: dict[str, Any] = share(None) if share else {"state": _read_state(path), "changes": []}
            if "error" in outcome:
                raise UserError(outcome["error"])
            changes = [Change(*row) for row in outcome["changes"]]
            return cls(path, rank, outcome["state"], config, changes)
        try:
            run = cls._open_as_writer(path, config, stage, lineage or {}, world, clock)
        except UserError as error:
            if share:
                share({"error": str(error)})
            raise
        if share:
            share({"state": run.state, "changes": [[c.key, str(c.old), str(c.new)] for c in run.changes]})
        return run

    @classmethod
    def read(cls, path: str | Path) -> "RunDirectory":
        """Looks at a run, also one that is going on, without becoming an attempt of it or writing
        anything."""
        path = Path(path)
        return cls(path, READER, _read_state(path), _read_config(path / "config.yaml"))

    @classmethod
    def _open_as_writer(
        cls,
        path: Path,
        config: dict[str, Any],
        stage: str,
        lineage: dict[str, Any],
        world: int,
        clock: Callable[[], float],
    ) -> "RunDirectory":
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
        if not (path / "run.json").exists():
            _refuse_foreign(path)
        lock = _take_lock(path)
        state = _read_state(path) if (path / "run.json").exists() else _new_state(path, stage, clock())
        if state["stage"] != stage:
            raise UserError(
                f"run_dir={path}: it holds a {state['stage']} run, not {stage}: choose another run_dir "
                f"(to start from its weights: init_from={path})"
            )
        changes: list[Change] = []
        if (path / "config.yaml").exists():
            saved = _read_config(path / "config.yaml")
            changes = compare(saved, config)
            refuse(str(path), changes)
        refuse_lineage(str(path), state["lineage"], lineage)

        # From here on the directory is written. config first, run.json last: it counts the attempt.
        state["lineage"] = state["lineage"] | lineage
        if changes and state["attempts"]:
            name = f"config-attempt-{len(state['attempts'])}.yaml"
            replace_text(path / name, (path / "config.yaml").read_text(encoding="utf-8"))
        replace_text(path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        attempt = len(state["attempts"]) + 1
        with explained(path):
            (path / "checkpoints").mkdir(exist_ok=True)
            (path / "logs" / f"attempt-{attempt}").mkdir(parents=True, exist_ok=True)
        state["attempts"].append({
            "attempt": attempt, "started": _iso(clock()), "from_step": None, "host": socket.gethostname(),
            "world": world, "slurm_job": os.environ.get("SLURM_JOB_ID"), "code": code_version(),
            "versions": versions(), "changes": [str(change) for change in changes],
        })  # fmt: skip
        run = cls(path, 0, state, config, changes, lock)
        run._write_state()
        if run._done_step() is not None and not run.is_done:  # `steps` was raised: the run goes on
            (path / "DONE").unlink()
        return run

    def _write_state(self) -> None:
        if self.rank == 0:
            replace_text(self.path / "run.json", json.dumps(self.state, indent=2, ensure_ascii=False) + "\n")

    # --- what is where

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def stage(self) -> str:
        return self.state["stage"]

    @property
    def run_id(self) -> str:
        return self.state["run_id"]

    @property
    def wandb_id(self) -> str:
        """Random once, then the same in every attempt: W&B shows one run, however often it was resumed."""
        return self.state["wandb_id"]

    @property
    def lineage(self) -> dict[str, Any]:
        return self.state["lineage"]

    @property
    def attempt(self) -> int:
        """1 for the first start, +1 for every resume."""
        return len(self.state["attempts"])

    @property
    def resumed(self) -> bool:
        return self.attempt > 1

    def facts(self) -> dict[str, Any]:
        """Identity and origin of this attempt, for other records of the run (W&B's config, the report)."""
        now = self.state["attempts"][-1]
        return {"id": self.run_id, "lineage": self.lineage} | {
            k: now[k] for k in ("world", "code", "versions")
        }

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def goodput_file(self) -> Path:
        return self.path / "goodput.jsonl"

    @property
    def log_dir(self) -> Path:
        """logs/attempt-N of this attempt; exists."""
        return self.path / "logs" / f"attempt-{self.attempt}"

    # --- what happens to a run

    def describe(self) -> list[str]:
        """What a user wants to read at the start: new or resumed, and what changed; one string per line."""
        if not self.resumed:
            return [f"new run {self.path} ({self.stage}, id {self.run_id})"]
        lines = [f"resuming {self.path} ({self.stage}, id {self.run_id}), attempt {self.attempt}"]
        return lines + [f"  changed  {change}" for change in self.changes]

    def resume_from(self, step: int) -> int:
        """Records that this attempt goes on after `step` (0 = from the start) and drops the metrics of
        later steps; returns how many lines of metrics.jsonl were replaced. Call once the checkpoint is
        chosen."""
        self.state["attempts"][-1]["from_step"] = step
        self._write_state()
        return self.truncate_metrics(
            step or -1
        )  # from the start: the evaluation before step 1 comes again, too

    def truncate_metrics(self, step: int) -> int:
        """Steps after `step` will be trained again, so their lines leave metrics.jsonl and samples.jsonl,
        or each would be there twice. They are not thrown away but moved to logs/attempt-N/replaced-*.jsonl:
        after a crash or a loss spike, the curve that was left is what one wants to look at. Call before
        loggers open the files."""
        if self.rank != 0:
            return 0
        counts = []
        for file in (self.metrics_file, self.samples_file):
            lines = LineFile(file) if file.exists() else None
            counts.append(lines.keep(step, self.log_dir / f"replaced-{file.name}") if lines else 0)
            if lines:
                lines.close()
        return counts[0]

    def add_damage(self, found: list[dict[str, Any]]) -> None:
        """Blocks of data that were put out of use: a later attempt leaves them out even when they were mended
        meanwhile, or it would read other samples than this one did."""
        if self.rank == 0:
            known = read_damage(self.path)
            replace_text(self.path / DAMAGE_FILE, json.dumps(known + found, indent=1) + "\n")

    def add_lineage(self, **digests: Any) -> None:
        """Adds what became known only after opening, under the same rule: a digest never changes."""
        refuse_lineage(str(self.path), self.lineage, digests)
        self.state["lineage"] = self.lineage | digests
        self._write_state()

    def _done_step(self) -> int | None:
        try:
            return int(json.loads((self.path / "DONE").read_text())["step"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return 0  # not ours or torn: then it proves nothing

    @property
    def is_done(self) -> bool:
        """Whether the run has trained and saved all the `steps` its config asks for now."""
        done = self._done_step()
        return done is not None and done >= int(self.config.get("steps") or 0)

    def mark_done(self, step: int) -> None:
        """The last step is trained and its checkpoint committed. Slurm scripts stop requeueing when DONE
        exists."""
        if self.rank == 0:
            replace_text(self.path / "DONE", json.dumps({"step": step, "time": _iso(time.time())}) + "\n")

    def close(self) -> None:
        """Gives the directory free for another launch; the end of the process does it too."""
        if self._lock:
            self._lock.close()
            self._lock = None


def read_damage(path: Path) -> list[dict[str, Any]]:
    """What `add_damage` recorded in the run directory `path`; [] without such a file or directory."""
    file = path / DAMAGE_FILE
    if not file.exists():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON ({error}): restore it") from error
    return found


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _new_state(path: Path, stage: str, now: float) -> dict[str, Any]:
    """Writes and returns the run.json of a run that has not started yet; the ids are random, once."""
    state = {
        "format": FORMAT, "run_id": secrets.token_hex(4), "wandb_id": secrets.token_hex(4), "stage": stage,
        "name": path.resolve().name, "created": _iso(now), "lineage": {}, "attempts": [],
    }  # fmt: skip
    replace_text(path / "run.json", json.dumps(state, indent=2) + "\n")
    fsync_directory(path.resolve().parent)
    return state


def _read_state(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    with explained(file):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{file}: missing: {path} is not a run directory; check the path") from error
        except ValueError as error:
            raise UserError(
                f"{file}: not readable as JSON ({error}): restore it, or choose another run_dir"
            ) from error
    needed = {"run_id", "wandb_id", "stage", "lineage", "attempts"}
    if not isinstance(state, dict) or state.get("format") != FORMAT or not needed <= state.keys():
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{file}: format is {found!r}, not {FORMAT!r}: it is not ours or of another version; "
                        "choose another run_dir")  # fmt: skip
    return state


def _read_config(file: Path) -> dict[str, Any]:
    with explained(file):
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"{file}: not readable as YAML ({error}): restore it, or choose another run_dir"
            ) from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds no config: restore it, or choose another run_dir")
    return config


def _refuse_foreign(path: Path) -> None:
    with explained(path):
        names = sorted(name for name in os.listdir(path) if not name.startswith(".") and name not in PREPARED)
    if names:
        raise UserError(
            f"run_dir={path}: not empty and no run of ours ({names[0]!r} is there, run.json is not): "
            "choose another run_dir"
        )


def _take_lock(path: Path) -> IO[str] | None:
    """A POSIX record lock: freed by the kernel when the process dies, not inherited by forked data workers,
    works on NFS. None where the file system has no locks."""
    with explained(path):
        lock = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held as long as the run)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise UserError(
            f"run_dir={path}: in use by {holder}: wait for it, or choose another run_dir"
        ) from error
    except OSError:
        lock.close()
        return None
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock
