"""The ledger: over whole epochs each window is read exactly once, by exactly one rank."""

from collections import Counter
from pathlib import Path

import pytest
from corpora import FIRST, write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.stream.batches import IGNORE, TokenBatches
from trainer.stream.config import BatchPhase, DataConfig, SourceConfig, WeightPhase

SEQ_LEN, SHIFT = 16, 1 << 16
TOKENS = {"books": 64 * 3 + 1, "code": 64 * 5 + 9, "web": 64 * 13 + 40}  # ragged last blocks and windows
FIRST_TOKEN = {name: SHIFT * number for number, name in enumerate(TOKENS)}
WINDOWS = {name: -(-(tokens - 1) // SEQ_LEN) for name, tokens in TOKENS.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of equal file names, whose tokens are far from each other's."""
    directory = tmp_path_factory.mktemp("ledger")
    for name, tokens in TOKENS.items():
        write_corpus(directory / name, tokens, document=10**6, offset=FIRST_TOKEN[name])
    return directory


def entries(ranks: list[TokenBatches], step: int) -> tuple[list[tuple[str, int]], int, int]:
    """([(source, window)] that carry loss, over all ranks; items; micro-batches of a rank) of a step."""
    batches = [rank.batch(step) for rank in ranks]
    found = []
    for batch in batches:
        for micro in batch.micros:
            for tokens, targets in zip(micro.tokens_BT, micro.targets_BT):
                if (targets != IGNORE).any():
                    number, place = divmod(int(tokens[0]) - FIRST, SHIFT)
                    assert place % SEQ_LEN == 0
                    found.append((list(TOKENS)[number], place // SEQ_LEN))
    (num_micros,) = {len(batch.micros) for batch in batches}
    return found, sum(m.num_items for batch in batches for m in batch.micros), num_micros


def open_ranks(config: DataConfig, world: int, micro_batch: int, global_batch: int) -> list[TokenBatches]:
    fixed = {"seed": 3, "seq_len": SEQ_LEN, "global_batch": global_batch, "micro_batch": micro_batch}
    return [TokenBatches(config, rank=rank, world=world, **fixed) for rank in range(world)]


def check_ledger(
    config: DataConfig, splits: list[tuple[int, int, int]], global_batch: int, until: int
) -> None:
    """splits: (from step, world, micro_batch), each one a resume. Until every source was read `until` times:
    whenever a source has given n whole epochs, each of its windows was read n times.
    """
    ledger: dict[str, Counter[int]] = {name: Counter() for name in config.sources}
    step, state = 0, None
    while True:
        if splits and splits[0][0] <= step:
            _, world, micro_batch = splits.pop(0)
            ranks = open_ranks(config, world, micro_batch, global_batch)
            for rank in ranks if state else []:
                rank.check_state(state, step)
        found, items, num_micros = entries(ranks, step)
        size = ranks[0].consumed(step + 1) - ranks[0].consumed(step)
        assert len(found) == size  # once over all ranks: nobody left one out, no two read the same
        assert num_micros == -(-size // (world * micro_batch))
        real = {name: TOKENS[name] - 1 for name in TOKENS}
        assert items == sum(min(SEQ_LEN, real[name] - SEQ_LEN * window) for name, window in found)
        for name, window in found:
            ledger[name][window] += 1
        step += 1
        state = ranks[0].state(step)
        counters = dict(zip(sorted(config.sources), ranks[0].mixture.counters(ranks[0].consumed(step))))
        for name, count in counters.items():
            epochs, rest = divmod(count, WINDOWS[name])
            assert sum(ledger[name].values()) == count
            assert set(ledger[name].values()) <= {epochs, epochs + 1}
            assert sum(times == epochs + 1 for times in ledger[name].values()) == rest
            assert epochs == 0 or len(ledger[name]) == WINDOWS[name]
        if min(count // WINDOWS[name] for name, count in counters.items()) >= until:
            return


def three(root: Path, **options: object) -> DataConfig:
    weights = {"web": 0.6, "code": 0.3, "books": 0.1}
    sources = {name: SourceConfig(str(root / name), weight) for name, weight in weights.items()}
    return DataConfig(sources=sources, shuffle_blocks=3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("document_mask", [False, True])
def test_every_world_reads_each_window_once(root: Path, world: int, document_mask: bool) -> None:
    """Over two epochs, on an unchanged world, with a batch that few worlds divide."""
    config = three(root, document_mask=document_mask, batch_ramp=[BatchPhase(2, 30), BatchPhase(4, 21)])
    check_ledger(config, [(0, world, 2)], 9, until=2)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_resumes_on_other_worlds_leave_no_gap_and_no_overlap(root: Path, draw: st.DataObject) -> None:
    """Drawn: where the run is cut, the worlds and micro-batches after it, a ramp, a change of weights."""
    world, micro = st.integers(1, 8), st.integers(1, 5)
    cuts = sorted(draw.draw(st.sets(st.integers(1, 8), max_size=3), "cuts"))
    splits = [(step, draw.draw(world), draw.draw(micro)) for step in (0, *cuts)]
    ramp = sorted(draw.draw(st.sets(st.integers(0, 8), max_size=2), "ramp"))
    weights = {name: draw.draw(st.floats(0.2, 1), name) for name in TOKENS}
    config = three(
        root,
        document_mask=draw.draw(st.booleans(), "mask"),
        batch_ramp=[BatchPhase(step, draw.draw(st.integers(1, 40))) for step in ramp],
        weight_schedule=[WeightPhase(draw.draw(st.integers(1, 90), "phase"), weights)],
    )
    check_ledger(config, splits, draw.draw(st.integers(5, 40), "global batch"), until=1)
