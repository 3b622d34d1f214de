import pytest

from trainer.observe.files import read_lines
from trainer.observe.goodput import Goodput, summarize
from trainer.observe.metrics import PARTS


class Clock:
    def __init__(self, now=1_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


def parts(**seconds):
    return {f"speed/{part}_s": seconds.get(part, 0.0) for part in PARTS}


def train(goodput, clock, first, last, **seconds):
    for step in range(first, last + 1):
        clock.now += sum(seconds.values())
        goodput.step(step, parts(**seconds))


def test_one_attempt_counts_only_productive_parts_and_the_parts_sum_to_the_life(tmp_path):
    clock = Clock()
    goodput = Goodput(tmp_path / "goodput.jsonl", 1, clock)
    goodput.start()
    clock.now += 20
    train(goodput, clock, 1, 10, forward_backward=6.0, optimizer=1.0, wait_data=0.5, save=0.25, sample=0.25)
    goodput.stop("done")
    life = summarize(tmp_path / "goodput.jsonl")
    assert life.wall == pytest.approx(100)
    assert life.goodput == pytest.approx(0.70)
    assert life.seconds["startup"] == pytest.approx(20)
    assert life.seconds["wait_data"] == pytest.approx(5)
    assert life.seconds["eval"] == pytest.approx(2.5)
    assert sum(life.seconds.values()) == pytest.approx(life.wall)
    assert (life.steps, life.attempts, life.recomputed_steps, life.stops) == (10, 1, 0, ["done"])


def test_a_killed_attempt_wastes_what_is_trained_again_and_the_time_it_was_down(tmp_path):
    clock, file = Clock(), tmp_path / "goodput.jsonl"
    first = Goodput(file, 1, clock)
    first.start()
    train(first, clock, 1, 6, forward_backward=10.0)
    first.flush()  # the checkpoint of step 6
    train(first, clock, 7, 9, forward_backward=10.0)  # 30 s: written by itself, then killed without stop()
    clock.now += 100
    second = Goodput(file, 2, clock)
    second.start()
    clock.now += 10
    train(second, clock, 7, 10, forward_backward=10.0)
    second.stop("signal")
    life = summarize(file)
    assert life.recomputed_steps == 3
    assert life.seconds["recomputed"] == pytest.approx(30)
    assert life.seconds["down"] == pytest.approx(100)
    assert life.seconds["startup"] == pytest.approx(10)
    assert life.seconds["productive"] == pytest.approx(100)
    assert life.goodput == pytest.approx(100 / 240)
    assert sum(life.seconds.values()) == pytest.approx(life.wall)
    assert life.stops == ["killed", "signal"]


def test_a_range_cut_by_a_resume_is_divided_in_proportion(tmp_path):
    clock, file = Clock(), tmp_path / "goodput.jsonl"
    first = Goodput(file, 1, clock)
    first.start()
    train(first, clock, 1, 10, forward_backward=1.0)
    first.stop("error")
    second = Goodput(file, 2, clock)
    second.start()
    train(second, clock, 5, 10, forward_backward=1.0)
    second.stop("done")
    life = summarize(file)
    assert life.recomputed_steps == 6
    assert life.seconds["productive"] == pytest.approx(10)
    assert life.seconds["recomputed"] == pytest.approx(6)
    assert life.steps == 10


def test_going_back_within_an_attempt_is_waste_at_once(tmp_path):
    clock, file = Clock(), tmp_path / "goodput.jsonl"
    goodput = Goodput(file, 1, clock)
    goodput.start()
    train(goodput, clock, 1, 8, forward_backward=1.0)
    goodput.rewind(4)
    life = goodput.summary()
    assert (life.steps, life.recomputed_steps) == (4, 4)
    train(goodput, clock, 5, 8, forward_backward=1.0)
    goodput.stop("done")
    life = summarize(file)
    assert life.seconds["productive"] == pytest.approx(8)
    assert life.seconds["recomputed"] == pytest.approx(4)


def test_a_running_attempt_is_judged_up_to_now(tmp_path):
    clock, file = Clock(), tmp_path / "goodput.jsonl"
    goodput = Goodput(file, 1, clock)
    goodput.start()
    train(goodput, clock, 1, 10, optimizer=1.0)
    life = goodput.summary()
    assert life.goodput == pytest.approx(1.0)
    assert summarize(file, now=clock.now + 10).goodput == pytest.approx(0.5)
    assert life.stops == ["running"]


def test_a_torn_line_and_a_clock_that_lags_on_another_host_do_no_harm(tmp_path):
    clock, file = Clock(), tmp_path / "goodput.jsonl"
    first = Goodput(file, 1, clock)
    first.start()
    train(first, clock, 1, 4, forward_backward=1.0)
    first.flush()
    with open(file, "a") as torn:
        torn.write('{"event": "steps", "time": 10')
    assert summarize(file).steps == 4
    clock.now -= 3  # the second host's clock is behind
    second = Goodput(file, 2, clock)
    second.start()
    train(second, clock, 5, 6, forward_backward=1.0)
    second.stop("done")
    life = summarize(file)
    assert life.steps == 6
    assert min(life.seconds.values()) >= 0
    assert sum(life.seconds.values()) == pytest.approx(life.wall)
    assert len(read_lines(file)) == 5


def test_ranges_are_written_every_half_minute_so_a_kill_loses_little(tmp_path):
    clock, file = Clock(), tmp_path / "goodput.jsonl"
    goodput = Goodput(file, 1, clock)
    goodput.start()
    train(goodput, clock, 1, 65, forward_backward=1.0)
    written = [(r["first"], r["last"]) for r in read_lines(file) if r["event"] == "steps"]
    assert written == [(1, 30), (31, 60)]


def test_other_ranks_write_nothing_and_a_run_that_never_started_has_no_goodput(tmp_path):
    goodput = Goodput(None, 1)
    goodput.start()
    goodput.step(1, parts(optimizer=1.0))
    goodput.rewind(0)
    goodput.stop("done")
    assert goodput.summary() is None
    assert list(tmp_path.iterdir()) == []
    assert summarize(tmp_path / "goodput.jsonl") is None
