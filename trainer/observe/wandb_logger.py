"""W&B: one run however often it is resumed, tokens as x axis, online with a key, else offline in the run
directory.

The rules (measured and read in W&B 0.31): - The id is drawn once and kept in run.json; every attempt opens
it with resume="allow". Offline, each attempt is a
  directory of its own with that id, and `wandb sync` joins them. The client knows nothing of earlier
  attempts: step and tokens are ours, and `step=` is always given.
- W&B drops records whose step does not rise. After a return to an earlier checkpoint the replayed steps are
left out
  here in silence; metrics.jsonl has the replayed ones.
- `run.log` costs about 0.5 ms of Python and can block on a stalled service, so it runs in a thread of its
own. - A W&B failure (service died, disk full, no network) is told once, in one line; training goes on."""

import netrc
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlparse

import wandb

from trainer.observe.loggers import LoggerConfig, NoLogger, Rows
from trainer.observe.metrics import AXIS, Number, find, for_stage
from trainer.run import RunDirectory

INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 60.0  # a stop signal leaves a minute or two; what is not uploaded then stays on disk
Mode = Literal["online", "offline", "disabled"]


def has_api_key() -> bool:
    """Whether this user is logged in to W&B: WANDB_API_KEY, or a netrc entry (what `wandb login` writes)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for file in (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"):
        try:
            if file and netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def choose_mode(config: LoggerConfig) -> Mode:
    """ "online" or "offline" or "disabled". `auto` obeys WANDB_MODE, then looks for a key."""
    wish = config.wandb if config.wandb != "auto" else os.environ.get("WANDB_MODE", "")
    modes: dict[str, Mode] = {"online": "online", "offline": "offline", "disabled": "disabled"}
    return modes.get(wish) or ("online" if has_api_key() else "offline")


class Spared:
    """`with Spared(then)`: an error that is W&B's, or the system's on the way to it, does not pass but goes
    to `then`.

    W&B raises a dozen unrelated classes from private modules (a dead service: ConnectionResetError; a
    refused init: ServerResponseError), so the test is where the class was defined.
    """

    def __init__(self, then: Callable[[BaseException], None]):
        self._then = then

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None or error is None:
            return False
        if not (issubclass(kind, OSError | EOFError) or kind.__module__.split(".")[0] == "wandb"):
            return False
        self._then(error)
        return True


class WandbLogger(NoLogger):
    """Sends every record to one W&B run. `tell` shows a line to the user."""

    def __init__(self, config: LoggerConfig, run: RunDirectory, tell: Callable[[str], None]):
        self._every = config.wandb_every
        self._tell = tell
        self._last_step = -1
        self._run: Any = None  # None: not (or no longer) connected
        mode = choose_mode(config)
        if mode == "online":
            with Spared(self._not_reachable):
                self._start(config, run, mode)
        if mode != "disabled" and self._run is None:
            with Spared(self._fail):
                self._start(config, run, "offline")
        self._queue: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="wandb-logger", daemon=True)
        self._thread.start()

    def _start(self, config: LoggerConfig, run: RunDirectory, mode: Mode) -> None:
        wandb.setup(wandb.Settings(silent=True))  # else the login prints before the settings below are read
        wandb_run: Any = wandb.init(
            dir=run.path, id=run.wandb_id, resume="allow", mode=mode,
            project=config.project, entity=config.entity, group=config.group,
            job_type=run.stage, name=run.name, tags=config.tags or None,
            config={**run.config, "run": run.facts()},
            settings=wandb.Settings(
                console="off",  # it would capture the progress bar
                silent=True,  # what there is to say is said below, once
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                # The commit is in config.run; the patch of uncommitted work that W&B would upload may hold
                # secrets.
                disable_git=True,
                save_code=False,
            ),
        )  # fmt: skip
        define_metrics(wandb_run, run.stage)
        if mode == "online":
            self._last_step = wandb_run.starting_step - 1  # what the server has, it would drop
            self._tell(f"W&B: {wandb_run.url}")
        else:
            self._tell(f"W&B: offline; to look at it: wandb leet run {wandb_run.dir.removesuffix('/files')}")
        self._run = wandb_run

    def _not_reachable(self, error: BaseException) -> None:
        self._tell(
            f"W&B: no connection ({first_line(error)}); going on offline, upload later with: wandb sync"
        )
        self._tear_down()  # the failed start still holds the run id in the service

    def _fail(self, error: BaseException) -> None:
        self._run = None
        self._tell(
            f"W&B: stopped logging ({first_line(error)}); training goes on, metrics.jsonl has every step"
        )
        self._tear_down()

    def _tear_down(self) -> None:
        """Ends the service, or what is left of it: W&B's own exit hook would print a traceback about a dead
        one."""
        with Spared(lambda error: None):
            wandb.teardown(exit_code=1)

    def _send(self) -> None:
        """The thread: hands records to W&B in order, until None comes."""
        while (item := self._queue.get()) is not None:
            step, record = item
            if self._run is not None:
                with Spared(self._fail):
                    self._run.log({name: as_wandb(value) for name, value in record.items()}, step=step)

    def log(self, step: int, tokens: int, metrics: dict[str, Number]) -> None:
        if step % self._every and not any(name.startswith("val/") for name in metrics):
            return
        if step > self._last_step:
            charted = {name: value for name, value in metrics.items() if find(name).chart}
            self._queue.put((step, {AXIS: tokens, **charted}))
            self._last_step = step

    def text(self, step: int, name: str, rows: Rows) -> None:
        if rows and step >= self._last_step:
            self._queue.put((step, {f"samples/{name}": list(rows)}))

    def close(self, exit_code: int = 0) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._run is not None:
            with Spared(self._fail):
                self._run.finish(exit_code=exit_code)
            self._run = None


def define_metrics(wandb_run: Any, stage: str) -> None:
    """Tells W&B the x axis and the summary of every metric the stage can report."""
    wandb_run.define_metric(AXIS, hidden=True)
    for metric in for_stage(stage):
        if metric.chart:
            wandb_run.define_metric(metric.name, step_metric=AXIS, summary=metric.best)


def as_wandb(value: Any) -> Any:
    """Rows of text become a table; numbers stay."""
    if not isinstance(value, list):
        return value
    columns = list(value[0])
    return wandb.Table(columns=columns, data=[[row.get(column) for column in columns] for row in value])


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
