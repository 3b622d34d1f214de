import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.observe.metrics import METRICS, PARTS, STAGES, check, find, for_stage, markdown_table
from trainer.observe.timer import StepTimer


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("train/loss", "train/loss"),
        ("speed/wait_data_s", "speed/wait_data_s"),
        ("data/epoch/web-en", "data/epoch/*"),
        ("memory/peak_allocated", "memory/*"),
        ("rl/reward", "rl/reward"),
        ("rl/reward/format", "rl/reward/*"),
        ("rl/pass@1", "rl/pass@*"),
        ("val/bpb/code", "val/bpb/*"),
    ],
)
def test_names_and_families_are_found(name, row):
    assert find(name).name == row


@pytest.mark.parametrize(
    "name", ["loss", "train/los", "data/epoch/", "data/epoch", "rl/pass@", "Train/loss", "memory/a b"]
)
def test_a_name_that_is_not_registered_is_refused_with_the_names_of_its_room(name):
    with pytest.raises(ValueError, match=r"is not in trainer/observe/metrics\.py"):
        check(["train/loss", name])


def test_the_message_shows_the_neighbours():
    with pytest.raises(ValueError, match="train/loss, train/grad_norm"):
        find("train/los")


def test_the_table_is_sound():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.best in ("min", "max", "last")
        assert metric.meaning
        assert set(metric.stages) <= set(STAGES)
    assert {f"speed/{part}_s" for part in PARTS} <= set(names)
    for required in (  # design: what is measured, and named
        "train/loss", "train/grad_norm", "train/lr", "speed/tokens_per_s",
        "speed/tokens_per_s_per_device", "speed/mfu", "speed/wait_data_s", "val/bpb",
        "memory/*", "data/epoch/*", "rl/pass@*", "rl/reward/*",
        "rl/zero_variance_groups", "rl/stop_rate", "rl/length", "rl/entropy", "rl/logprob_mismatch", "rl/kl",
    ):  # fmt: skip
        assert required in names


def test_stages_see_what_concerns_them():
    assert "val/bpb" in [m.name for m in for_stage("pretrain")]
    assert not [m for m in for_stage("pretrain") if m.name.startswith("rl/")]
    assert "rl/kl" in [m.name for m in for_stage("grpo")]
    table = markdown_table("sft")
    assert "| `train/loss` | nats/item |" in table
    assert "`rl/" not in table


def ticking(durations):
    """A clock in nanoseconds that moves on by the next duration at each reading."""
    return itertools.accumulate(durations, initial=0).__next__


def test_time_inside_parts_is_booked_on_them_and_the_rest_on_other():
    timer = StepTimer(ticking([10, 20, 30, 40, 50]))
    with timer.part("wait_data"):
        pass
    with timer.part("forward_backward"):
        pass
    step = timer.finish()
    assert step["speed/wait_data_s"] == pytest.approx(20e-9)
    assert step["speed/forward_backward_s"] == pytest.approx(40e-9)
    assert step["speed/other_s"] == pytest.approx(90e-9)
    assert step["speed/step_s"] == pytest.approx(150e-9)


def test_a_part_inside_another_is_counted_once():
    timer = StepTimer(ticking([0, 5, 7, 11, 0]))
    with timer.part("eval"), timer.part("sample"):
        pass
    step = timer.finish()
    assert step["speed/eval_s"] == pytest.approx((5 + 11) * 1e-9)
    assert step["speed/sample_s"] == pytest.approx(7e-9)


@given(st.lists(st.tuples(st.sampled_from(sorted(PARTS)), st.integers(0, 10**12)), max_size=30), st.data())
def test_the_parts_sum_to_the_wall_time_to_the_nanosecond(parts, data):
    now = [data.draw(st.integers(0, 10**15))]
    timer = StepTimer(lambda: now[0])
    wall = 0
    for _ in range(2):  # the second step begins where the first one ended
        began = now[0]
        for part, spent in parts:
            with timer.part(part):
                now[0] += spent
        now[0] += 17
        timer.move("eval", "save", data.draw(st.floats(0, 10)))
        wall = now[0] - began
        step = timer.finish()
        booked = [round(value * 1e9) for name, value in step.items() if name != "speed/step_s"]
        assert sum(booked) == wall == round(step["speed/step_s"] * 1e9)
        assert min(booked) >= 0


def test_a_part_that_raises_is_still_closed_and_booked():
    timer = StepTimer(ticking([0, 9, 0]))
    with pytest.raises(RuntimeError, match="lost"), timer.part("save"):
        raise RuntimeError("lost")
    assert timer.finish()["speed/save_s"] == pytest.approx(9e-9)


def test_misuse_is_refused():
    timer = StepTimer()
    with pytest.raises(ValueError, match="unknown part of a step 'forward'"), timer.part("forward"):
        pass
    with pytest.raises(RuntimeError, match="inside part 'eval'"), timer.part("eval"):
        timer.finish()


def test_move_books_over_no_more_than_there_is():
    timer = StepTimer(ticking([0, 100, 0, 0]))
    with timer.part("forward_backward"):
        pass
    timer.move("forward_backward", "optimizer", 1.0)
    step = timer.finish()
    assert step["speed/optimizer_s"] == pytest.approx(100e-9)
    assert step["speed/forward_backward_s"] == 0
