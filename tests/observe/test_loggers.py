import contextlib
import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.observe.console import PlainConsole, duration, make_console, printable, short_number, summary
from trainer.observe.files import read_lines
from trainer.observe.loggers import JsonlLogger, LoggerConfig, Loggers, NoLogger, make_loggers, read_metrics
from trainer.run import RunDirectory

ROOT = Path(__file__).parents[2]
QUIET = LoggerConfig(wandb="disabled", console="off")


@pytest.fixture
def run(tmp_path):
    opened = RunDirectory.open(tmp_path / "run", {"steps": 20}, "pretrain")
    yield opened
    opened.close()


def test_each_step_is_one_line_with_its_tokens(run):
    loggers = make_loggers(QUIET, run, 20)
    for step in range(1, 4):
        loggers.log(step, step * 1000, {"train/loss": 3.0 / step, "data/batch_hash": f"{step:016x}"})
    loggers.text(3, "fixed", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    loggers.close()
    records = read_metrics(run.metrics_file)
    assert [(r["step"], r["tokens"], r["train/loss"]) for r in records] == [
        (1, 1000, 3.0),
        (2, 2000, 1.5),
        (3, 3000, 1.0),
    ]
    assert records[2]["data/batch_hash"] == "0000000000000003"
    assert records[0]["time"] > 1e9
    assert read_lines(run.samples_file)[1] == {
        "step": 3,
        "name": "fixed",
        "row": {"prompt": "c", "completion": "d"},
    }


def test_lines_are_on_disk_at_once_not_when_a_buffer_is_full(run):
    loggers = make_loggers(QUIET, run, 20)
    loggers.log(1, 10, {"train/loss": 1.0})
    assert len(read_metrics(run.metrics_file)) == 1
    loggers.close()


def test_an_unregistered_name_is_refused_on_every_rank(run, tmp_path):
    other = RunDirectory.open(run.path, {"steps": 20}, "pretrain", 1)
    for loggers in (make_loggers(QUIET, run, 20), make_loggers(QUIET, other, 20), Loggers()):
        with pytest.raises(ValueError, match="'train/los' is not in"):
            loggers.log(1, 10, {"train/loss": 1.0, "train/los": 1.0})
        loggers.close()
    assert read_metrics(run.metrics_file) == []


def test_only_rank_0_logs(run):
    before = sorted(run.path.rglob("*"))
    other = RunDirectory.open(run.path, {"steps": 20}, "pretrain", 1)
    loggers = make_loggers(LoggerConfig(), other, 20)
    loggers.log(1, 10, {"train/loss": 1.0})
    loggers.text(1, "fixed", [{"a": "b"}])
    loggers.message("hello")
    loggers.sync()
    loggers.rewind(0)
    loggers.close()
    assert loggers.loggers == []
    assert sorted(run.path.rglob("*")) == before


def test_going_back_replaces_the_later_lines(run):
    logger = JsonlLogger(run, clock=lambda: 5.0)
    for step in range(1, 9):
        logger.log(step, step, {"train/loss": 9.0})
    logger.text(8, "fixed", [{"completion": "gone"}])
    logger.rewind(5)
    for step in range(6, 9):
        logger.log(step, step, {"train/loss": 1.0})
    logger.sync()
    logger.close()
    assert [(r["step"], r["train/loss"]) for r in read_metrics(run.metrics_file)][4:] == [
        (5, 9.0),
        (6, 1.0),
        (7, 1.0),
        (8, 1.0),
    ]
    assert len(read_metrics(run.log_dir / "replaced-metrics.jsonl")) == 3
    assert read_lines(run.samples_file) == []


def test_a_full_disk_stops_with_one_line(run):
    logger = JsonlLogger(run)
    logger._metrics._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match="no space left"):
        logger.log(1, 1, {"train/loss": 1.0})
    with contextlib.suppress(OSError):  # the line that could not be written is still in the buffer
        logger._metrics._file.close()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"wandb": "on"}, "logger.wandb=on: one of auto, online, offline, disabled"),
        ({"console": "fancy"}, "logger.console=fancy"),
        ({"every": 0}, "logger.every=0"),
        ({"wandb_every": -1}, "logger.wandb_every=-1"),
        ({"project": "a/b"}, "logger.project=a/b"),
        ({"tags": [""]}, "logger.tags="),
    ],
)
def test_wrong_keys_are_named(values, text):
    with pytest.raises(UserError, match=text.replace("=", "[=]")):
        LoggerConfig(**values).validate()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_plain_lines_come_every_k_steps_and_at_evaluations_and_tell_the_time_left():
    out, clock = io.StringIO(), Clock()
    console = PlainConsole(100, 0, 10, out, clock)
    for step in range(1, 25):
        clock.now += 2.0
        metrics = {"train/loss": 3.5, "train/lr": 1e-4, "speed/tokens_per_s": 123456.0, "speed/mfu": 0.4123}
        console.log(step, step * 1000, metrics | ({"val/bpb": 1.25} if step == 15 else {}))
    lines = out.getvalue().splitlines()
    assert [int(line.split("/")[0].split()[-1]) for line in lines] == [1, 10, 15, 20]
    assert lines[1] == "step  10/100  loss 3.5000  lr 1.00e-04  tok/s 123k  mfu 41.2%  tokens 10k  left 3m00s"
    assert "val bpb 1.2500" in lines[2]


def test_text_of_the_model_cannot_command_the_terminal():
    out = io.StringIO()
    console = PlainConsole(10, 0, 1, out)
    console.text(5, "samples", [{"prompt": "[bold]x[/bold]", "completion": "a\x1b]0;owned\x07b\r\nc\x9b2J"}])
    assert (
        out.getvalue()
        == "samples at step 5:\n  prompt: [bold]x[/bold]\n  completion: a·]0;owned·b·\n      c·2J\n"
    )
    assert printable("tab\tnew\nline ü 漢") == "tab\tnew\nline ü 漢"


def test_the_console_fits_where_it_writes_to():
    assert type(make_console(LoggerConfig(), 10, 0, io.StringIO())) is PlainConsole
    assert type(make_console(LoggerConfig(console="off"), 10, 0, io.StringIO())) is NoLogger


def test_short_forms():
    assert [short_number(x) for x in (0, 12.3456, 999.4, 1234567, 999_600, 3e13)] == [
        "0",
        "12.3",
        "999",
        "1.23M",
        "1M",
        "30T",
    ]
    assert [duration(x) for x in (0.4, 65, 3725, 90000)] == ["0s", "1m05s", "1h02m", "1d01h"]


def test_beside_the_bar_on_80_columns_the_line_is_short():
    metrics = {
        "train/loss": 3.5,
        "train/grad_norm": 1.0,
        "train/lr": 1e-4,
        "speed/tokens_per_s": 1e5,
        "speed/mfu": 0.4,
    }
    assert summary(metrics, 10**6, short=True) == "loss 3.5000  tok/s 100k  mfu 40.0%"


LIVE = """
import sys
from trainer.observe.console import make_console
from trainer.observe.loggers import LoggerConfig
console = make_console(LoggerConfig(), 50, 0, sys.stdout)
for step in range(1, 31):
    metrics = {"train/loss": 2.5, "speed/tokens_per_s": 4e4}
    console.log(step, step * 1000, metrics | ({"val/bpb": 1.5} if step == 20 else {}))
console.text(30, "samples", [{"prompt": "The [red]sea", "completion": " is\\x1b[2J wide", "reward": 0.5}])
if sys.argv[1] == "crash":
    raise SystemExit(1)
console.close()
print("after")
"""


@pytest.mark.parametrize("end", ["close", "crash"])
def test_on_a_terminal_there_is_a_bar_and_the_terminal_is_given_back(end):
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE, end], stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    screen = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # EIO: the other side is closed
            break
        if not chunk:
            break
        screen += chunk
    process.wait()
    os.close(leader)
    text = screen.decode()
    assert "30/50" in text
    assert "loss 2.5000" in text
    assert "val bpb 1.5000" in text
    assert "The [red]sea" in text  # not read as markup
    assert "\x1b[2J" not in text  # not obeyed
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
    assert ("after" in text) == (end == "close")
