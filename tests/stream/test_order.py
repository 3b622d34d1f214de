"""The order: bijections, exact proportions, closed-form counters, independence of the sources."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.stream.mixture import CYCLE, Mixture, slots_per_cycle
from trainer.stream.order import TABLE_LIMIT, SourceOrder, permute

KEYS = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.integers(1, 300), st.integers(TABLE_LIMIT - 2, TABLE_LIMIT + 300)), KEYS)
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_is_one_to_one_far_away() -> None:
    n = 3 * 10**15 + 7
    image = permute(np.arange(n - 10_000, n), n, 5)
    assert len(set(image.tolist())) == 10_000
    assert image.min() >= 0
    assert image.max() < n
    assert abs(image.mean() / n - 0.5) < 0.02


@pytest.mark.parametrize("n", [6, TABLE_LIMIT + 1])
def test_permute_spreads_evenly(n: int) -> None:
    """Chi-square of the first position's image over many keys: far below what a biased network gives."""
    bins = 6
    images = np.array([permute(np.array([0]), n, key)[0] * bins // n for key in range(6000)])
    counts = np.bincount(images, minlength=bins)
    assert ((counts - 1000) ** 2 / 1000).sum() < 25


def test_every_small_permutation_is_reached() -> None:
    seen = {tuple(permute(np.arange(4), 4, key)) for key in range(1000)}
    assert seen == set(itertools.permutations(range(4)))


ORDERS = st.builds(
    SourceOrder,
    name=st.just("web"),
    seed=st.integers(0, 2**31),
    num_windows=st.integers(1, 700),
    windows_per_block=st.integers(1, 20),
    group_blocks=st.integers(1, 40),
)


@settings(deadline=None, max_examples=80)
@given(ORDERS, st.integers(0, 5))
def test_an_epoch_visits_every_window_once(order: SourceOrder, epoch: int) -> None:
    n = order.num_windows
    assert sorted(order.windows(epoch * n, n)) == list(range(n))


@settings(deadline=None, max_examples=80)
@given(ORDERS, st.integers(0, 2000), st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_reading_in_pieces_changes_nothing(order: SourceOrder, start: int, counts: list[int]) -> None:
    whole = order.windows(start, sum(counts))
    starts = start + np.cumsum([0, *counts[:-1]])
    parts = [order.windows(int(first), count) for first, count in zip(starts, counts)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_epochs_sources_and_seeds_are_ordered_differently() -> None:
    order = SourceOrder("web", 1, 500, 4, 16)
    first = order.windows(0, 500).tolist()
    assert first != order.windows(500, 500).tolist()
    assert first != SourceOrder("code", 1, 500, 4, 16).windows(0, 500).tolist()
    assert first != SourceOrder("web", 2, 500, 4, 16).windows(0, 500).tolist()


def test_groups_bound_what_is_read_at_a_time_and_are_never_tiny() -> None:
    order = SourceOrder("web", 1, num_windows=1000 * 8 + 3, windows_per_block=8, group_blocks=16)
    sizes = [last - first for first, last in map(order.group, range(order.num_groups))]
    assert sum(sizes) == order.num_blocks == 1001
    assert min(sizes) >= 16
    assert max(sizes) <= 17
    for g in range(order.num_groups):
        first, last = order.group(g)
        end = min(last * 8, order.num_windows)
        blocks = set((order.windows(first * 8, end - first * 8) // 8).tolist())
        assert len(blocks) == last - first


def test_the_order_is_pinned() -> None:
    """Recorded once: a change here means that no older run can go on with its data."""
    small = SourceOrder("web", 7, num_windows=23, windows_per_block=4, group_blocks=2)
    assert small.windows(20, 6).tolist() == PINNED_SMALL
    large = SourceOrder("web", 7, num_windows=10**12 + 5, windows_per_block=128, group_blocks=1024)
    assert large.windows(10**13, 3).tolist() == PINNED_LARGE
    mixture = Mixture([small, large_named("code")], [(0, {"web": 0.7, "code": 0.3})], 7)
    assert [mixture.locate(n)[0] for n in range(12)] == PINNED_SOURCES


def large_named(name: str) -> SourceOrder:
    return SourceOrder(name, 7, num_windows=10**6, windows_per_block=8, group_blocks=64)


PINNED_SMALL = [21, 20, 22, 15, 7, 14]
PINNED_LARGE = [175107742766, 880405315985, 731089559677]
PINNED_SOURCES = ["web", "web", "web", "web", "web", "code", "web", "web", "web", "web", "code", "web"]

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@settings(deadline=None)
@given(WEIGHTS)
def test_slots_are_the_exact_share_to_less_than_one_sample(weights: list[float]) -> None:
    named = {f"s{i}": max(weight, sum(weights) / 500) for i, weight in enumerate(weights)}
    slots = slots_per_cycle(named, "w")
    assert sum(slots.values()) == CYCLE
    total = sum(named.values())
    assert all(abs(slots[name] - CYCLE * weight / total) < 1 for name, weight in named.items())
    assert slots == slots_per_cycle(dict(reversed(named.items())), "w")


def test_a_weight_too_small_for_the_cycle_is_refused() -> None:
    with pytest.raises(UserError, match=r"weight 0\.0001 of rare is less than one sample in 1000"):
        slots_per_cycle({"web": 1.0, "rare": 0.0001}, "data.sources")


def mixture_of(schedule: list[tuple[int, dict[str, float]]], seed: int = 3) -> Mixture:
    sizes = {"books": 3, "code": 211, "web": 1009}
    return Mixture([SourceOrder(name, seed, size, 4, 8) for name, size in sizes.items()], schedule, seed)


SCHEDULE: list[tuple[int, dict[str, float]]] = [
    (0, {"web": 0.7, "code": 0.25, "books": 0.05}),
    (2345, {"web": 0.2, "code": 0.8}),
    (2350, {"books": 1.0, "web": 1.0}),
    (5000, {"web": 0.5, "code": 0.25, "books": 0.25}),
]


def test_proportions_are_exact_per_thousand_samples_of_a_phase() -> None:
    mixture = mixture_of(SCHEDULE)
    for start in (0, 1000, 5000, 7000, 10**12):
        names = Counter(mixture.locate(n)[0] for n in range(start, start + CYCLE))
        expected = (
            {"web": 700, "code": 250, "books": 50}
            if start < 5000
            else {"web": 500, "code": 250, "books": 250}
        )
        assert names == expected
    assert {mixture.locate(n)[0] for n in range(2345, 2350)} <= {"web", "code"}


def test_counters_are_what_counting_gives() -> None:
    """Closed form against a plain count over phase edges and the parts of cycles around them."""
    mixture = mixture_of(SCHEDULE)
    counts = dict.fromkeys(["books", "code", "web"], 0)
    for n in range(5300):
        if n % 97 == 0 or 2340 < n < 2355 or 4995 < n < 5005:
            assert mixture.counters(n) == list(counts.values())
        name, epoch, window = mixture.locate(n)
        source = mixture.sources[list(counts).index(name)]
        expected_epoch, expected = next(source.pieces(counts[name], 1))
        assert (epoch, window) == (expected_epoch, expected[0])
        counts[name] += 1


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 6000), st.integers(1, 700))
def test_a_batch_is_the_set_of_its_samples(first: int, count: int) -> None:
    mixture = mixture_of(SCHEDULE)
    source_N, window_N = mixture.batch(first, count)
    names = [source.name for source in mixture.sources]
    together = [(names[s], w) for s, w in zip(source_N.tolist(), window_N.tolist())]
    assert together == sorted(together)
    singly = [mixture.locate(n) for n in range(first, first + count)]
    assert Counter(together) == Counter((name, window) for name, _, window in singly)


def test_weights_change_the_pace_of_a_source_but_never_its_order() -> None:
    plain, changed = mixture_of(SCHEDULE[:1]), mixture_of(SCHEDULE)
    for name in ("web", "code", "books"):
        a, b = ([m.locate(n)[1:] for n in range(6000) if m.locate(n)[0] == name] for m in (plain, changed))
        assert a[: len(b)] == b[: len(a)]
        assert min(len(a), len(b)) > 150


def test_a_later_phase_and_a_new_source_leave_the_past_alone() -> None:
    old = mixture_of(SCHEDULE[:2])
    order = SourceOrder("added", 3, 50, 4, 8)
    new = Mixture([order, *old.sources], [*SCHEDULE[:2], (4000, {"added": 1.0})], 3)
    for n in range(0, 4000, 7):
        assert old.locate(n) == new.locate(n)
    assert new.locate(4000)[0] == "added"


def test_seeking_far_costs_nothing_and_counts_epochs() -> None:
    mixture = mixture_of(SCHEDULE)
    assert mixture.locate(10**15)[0] in ("web", "code", "books")
    far = 5000 + 1000 * 10**9
    assert mixture.epochs(far)["web"] == pytest.approx(500 * 10**9 / 1009, rel=1e-6)
