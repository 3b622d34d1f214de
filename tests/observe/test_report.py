import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.observe.goodput import Goodput
from trainer.observe.loggers import JsonlLogger
from trainer.observe.plots import MAX_POINTS, running_mean, series, svgs, thin
from trainer.observe.report import main, render
from trainer.observe.timer import StepTimer
from trainer.run import RunDirectory

VOID = {"meta", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that tags nest; gathers the text and the tags."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], "", []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [
            v for k, v in attributes if k in ("src", "href", "xlink:href") and v and not v.startswith("#")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def train(path, first, last, stop=None, config=None):
    run = RunDirectory.open(
        path, config or {"steps": 60, "lr": 0.1}, "pretrain", lineage={"data": "f00d"}, world=2
    )
    run.resume_from(first)
    logger, goodput, timer = JsonlLogger(run), Goodput(run.goodput_file, run.attempt), StepTimer()
    goodput.start()
    for step in range(first + 1, last + 1):
        with timer.part("forward_backward"):
            loss = math.nan if step == 7 else 5.0 / step
        parts = timer.finish()
        metrics = {
            "train/loss": loss,
            "train/grad_norm": 1.0,
            "train/lr": 1e-3,
            "speed/tokens_per_s": 1e4,
        } | parts
        if step % 10 == 0:
            metrics |= {"val/bpb": 2.0 - step / 100, "val/loss": 3.0}
            logger.text(
                step,
                "fixed",
                [{"prompt": "<script>alert(1)</script>", "completion": f" c{step}\x1b[2J&", "score": 1}],
            )
        logger.log(step, step * 100, metrics)
        goodput.step(step, parts)
        if step % 10 == 0:
            goodput.flush()
    if stop:
        goodput.stop(stop)
    logger.close()
    run.close()
    return run


def test_the_page_of_a_finished_run_has_all_of_its_life(tmp_path):
    train(tmp_path / "run", 0, 40)
    run = train(tmp_path / "run", 30, 60, "done", {"steps": 60, "lr": 0.2})
    run.mark_done(60)
    assert main([str(run.path), "--png", str(tmp_path / "loss.png")]) == 0
    page = Page((run.path / "report.html").read_text())
    assert page.tags.count("svg") == 6
    for text in (
        "pretrain · done", "60 / 60", "bits per byte", "where the time of a step goes",
        "10 steps trained twice", "killed", "lr: 0.1 -> 0.2", "f00d", "c60·[2J&", "score: 1", "1.4000",
        "<script>alert(1)</script>", "config.yaml",
    ):  # fmt: skip
        assert text in page.text, text
    assert "script" not in page.tags
    assert page.links == []
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_goes_on_can_be_looked_at_and_is_not_touched(tmp_path):
    run = train(tmp_path / "run", 0, 12)
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 13, "tok')
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    page = Page(render(RunDirectory.read(run.path)))
    assert "running, or killed" in page.text
    assert "12 / 60" in page.text
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before


def test_a_run_without_a_step_still_has_a_page(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {"steps": 60}, "grpo")
    run.close()
    page = Page(render(RunDirectory.read(run.path)))
    assert "grpo · not started" in page.text
    assert "svg" not in page.tags
    with pytest.raises(UserError, match="no steps yet"):
        main([str(run.path), "--out", str(tmp_path / "page.html"), "--png", str(tmp_path / "loss.png")])
    assert (tmp_path / "page.html").exists()


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"run\.json: missing.*is not a run directory"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="is not a run directory"):
        main([str(tmp_path / "nowhere")])


def test_curves_of_any_length_are_thinned_without_losing_nans_or_ends():
    tokens = np.arange(1.0, 100_001.0)
    values = np.where((tokens > 50_000) & (tokens <= 60_000), np.nan, tokens)
    x, y = thin(tokens, values)
    assert len(x) == len(y) == MAX_POINTS
    assert x[-1] == tokens[-1]
    assert np.isnan(y[(x > 50_100) & (x < 60_000)]).all()
    assert np.isfinite(y[x < 49_900]).all()
    np.testing.assert_allclose(y[0], values[:83].mean())
    assert thin(tokens[:50], values[:50])[1].tolist() == values[:50].tolist()


def test_the_running_mean_has_no_lag_and_passes_nans():
    line = np.arange(600.0)
    np.testing.assert_allclose(running_mean(line)[10:-10], line[10:-10])
    line[300] = np.nan
    np.testing.assert_allclose(running_mean(line)[310:-10], line[310:-10], atol=1)
    assert np.isfinite(running_mean(line)).all()
    assert np.isnan(running_mean(np.full(5, np.nan))).all()


def test_series_skip_steps_without_the_metric():
    records = [{"tokens": 10, "train/loss": 1.0}, {"tokens": 20}, {"tokens": 30, "train/loss": math.inf}]
    tokens, values = series(records, "train/loss")
    assert tokens.tolist() == [10.0, 30.0]
    assert values[0] == 1.0
    assert np.isnan(values[1])
    assert svgs([{"tokens": 10, "train/loss": math.nan}]) == []


def test_it_runs_as_a_module_without_a_display(tmp_path):
    run = train(tmp_path / "run", 0, 3)
    done = subprocess.run(
        [sys.executable, "-m", "trainer.observe.report", str(run.path)],
        cwd=Path(__file__).parents[2], env={"PATH": "/usr/bin", "HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{run.path}/report.html\n"), done.stderr
