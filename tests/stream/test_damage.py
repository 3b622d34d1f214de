"""Damaged blocks: halting, and a quarantine that is the same on every rank, world size and resume."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from corpora import FIRST, write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.stream.batches import Batch, TokenBatches
from trainer.stream.config import BatchPhase, DataConfig, SourceConfig
from trainer.stream.damage import Quarantine
from trainer.stream.index import Index
from trainer.stream.loader import Prefetcher

BLOCKS, GLOBAL, SEQ_LEN, STEPS = 20, 24, 16, 8  # 80 windows and a piece, 24 a step: over two epochs
PER_BLOCK = 64 // SEQ_LEN


def hurt(directory: Path, *blocks: int) -> None:
    """Flip a bit in each of these blocks of the row; once more mends them."""
    index = Index.load(directory)
    for block in blocks:
        number = int(np.searchsorted(index.shards.first_block, block, side="right")) - 1
        shard = index.shards[number]
        with open(directory / shard.file, "r+b") as file:
            file.seek(shard.base + (block - shard.first_block) * shard.stride + 5)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 16]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "data" / "train", 64 * BLOCKS + 9, document=10**6)
    write_corpus(tmp_path / "data" / "val", 64 * 5 + 1, document=10**6)
    return tmp_path / "data"


def config_of(data: Path, **options: object) -> DataConfig:
    return DataConfig(train=str(data), shuffle_blocks=4, **{"on_damage": "quarantine", **options})  # type: ignore[arg-type]


def ranks_of(config: DataConfig, world: int = 1, **options: object) -> list[TokenBatches]:
    fixed: dict = {"seed": 5, "seq_len": SEQ_LEN, "global_batch": GLOBAL, "micro_batch": 2, "world": world}
    return [TokenBatches(config, rank=rank, **(fixed | options)) for rank in range(world)]


def agreed(
    ranks: Sequence[TokenBatches], readers: Sequence[Prefetcher[Batch]], step: int
) -> tuple[list[Batch], list[dict]]:
    """What the loop does before it trains: get, tell each other, and anew while anything was found."""
    told: list[dict] = []
    while True:
        batches = [reader.get(step) for reader in readers]
        found = [damage for rank in ranks for damage in rank.new_damage()]
        if not found:
            return batches, told
        told += json.loads(json.dumps(found))
        for rank, reader in zip(ranks, readers):
            rank.adopt_damage(found)
            reader.drop()


def train(
    ranks: Sequence[TokenBatches], steps: range, workers: int = 0
) -> tuple[list[list[int]], list[dict]]:
    """The first tokens of the rows of every step over all ranks, sorted, and the damage told."""
    readers = [Prefetcher(rank.batch, workers) for rank in ranks]
    rows, told = [], []
    for step in steps:
        batches, found = agreed(ranks, readers, step)
        real = [m.tokens_BT[(m.targets_BT >= 0).any(1)][:, 0] for batch in batches for m in batch.micros]
        rows.append(sorted(int(token) for part in real for token in part))
        told += found
    for reader in readers:
        reader.close()
    return rows, told


@pytest.fixture
def whole(data: Path) -> list[list[int]]:
    """What is read while nothing is damaged."""
    return train(ranks_of(config_of(data)), range(STEPS))[0]


def test_halting_is_the_default_and_names_shard_block_and_offset(data: Path) -> None:
    hurt(data / "train", 8)
    (rank,) = ranks_of(DataConfig(train=str(data)))
    shard = rank.index.shards[1]
    with pytest.raises(UserError) as error:
        train([rank], range(4))
    assert f"{shard.file}: block 1 at byte {shard.base + shard.stride} has hash" in str(error.value)
    assert "data.on_damage=quarantine" in str(error.value)
    assert "\n" not in str(error.value)
    assert rank.new_damage() == []


def test_what_is_told_of_a_damaged_block(data: Path) -> None:
    hurt(data / "train", 8)
    (rank,) = ranks_of(config_of(data))
    _, (damage,) = train([rank], range(STEPS))
    shard = rank.index.shards[1]
    place = {"split": "train", "source": "train", "shard": shard.file, "block": 1}
    assert damage.items() >= place.items()
    assert damage["offset"] == shard.base + shard.stride
    assert damage["file"] == str(data / "train" / shard.file)
    raw = (data / "train" / "blocks.xxh3").read_bytes()[64:72]
    assert damage["expected"] == raw[::-1].hex() != damage["found"]
    step = damage["from_sample"] // GLOBAL
    touched = [n for n in range(80) if rank.mixture.locate(n)[2] // PER_BLOCK == 8]
    assert damage["samples"] == [n for n in touched if n // GLOBAL == step] != []
    assert touched[0] // GLOBAL == step


@pytest.mark.parametrize("hurt_blocks", [(8,), (0, 3, 19), tuple(range(2, 15)), (20,)])
def test_every_world_reads_the_same_substitutes(
    data: Path, whole: list[list[int]], hurt_blocks: tuple[int, ...]
) -> None:
    """Of the damaged blocks nothing is read, of the others what was read before; also when most are damaged,
    so that substitutes are damaged too, and when the block is the last one, which is not full.
    """
    hurt(data / "train", *hurt_blocks)
    reference, told = train(ranks_of(config_of(data)), range(STEPS))
    assert len({(d["shard"], d["block"]) for d in told}) == len(told) == len(hurt_blocks)
    starts = {FIRST + SEQ_LEN * w: w // PER_BLOCK for w in range(81)}
    for before, after in zip(whole, reference):
        good = Counter(token for token in before if starts[token] not in hurt_blocks)
        assert not good - Counter(after)
        assert len(before) == len(after)
        assert not any(starts[token] in hurt_blocks for token in after)
    for world in (2, 3, 5):
        for workers in (0, 2):
            rows, told_too = train(ranks_of(config_of(data), world), range(STEPS), workers)
            assert rows == reference
            assert len({(d["shard"], d["block"]) for d in told_too}) == len(hurt_blocks)


def test_a_run_that_is_killed_goes_on_alike_though_the_shard_was_mended(
    data: Path, whole: list[list[int]]
) -> None:
    """Whether the damage is in the checkpoint, or only in what was written down when it was found."""
    hurt(data / "train", 8, 13)
    reference, told = train(ranks_of(config_of(data)), range(STEPS))
    assert reference != whole
    first, told_first = train(before := ranks_of(config_of(data), 3), range(4), workers=2)
    state = json.loads(json.dumps(before[0].state(4)))
    # Killed here, after more was read ahead; the loop has written down all that it was told of.
    hurt(data / "train", 8, 13)
    for world in (1, 2, 4):
        after = ranks_of(config_of(data), world)
        for rank in after:
            rank.check_state(state, 4)
            rank.restore(state)
            rank.adopt_damage(told)
        assert first + train(after, range(4, STEPS))[0] == reference
        from_start = ranks_of(config_of(data, on_damage="halt"), world)  # what was adopted holds there, too
        for rank in from_start:
            rank.adopt_damage(told)
        assert train(from_start, range(STEPS))[0] == reference
    assert {d["block"] for d in told_first} <= {d["block"] for d in told}


def test_damage_that_only_one_node_sees_holds_for_all_and_never_for_the_past(
    data: Path, whole: list[list[int]]
) -> None:
    """One rank of three reads a file that the others read whole, and only for a while."""
    for bad_rank in range(3):
        hurt(data / "train", 8)
        ranks = ranks_of(config_of(data), 3)
        broken = ranks[bad_rank]
        broken.readers["train"]._shard(1)  # mapped before, like a page that went bad in this node's memory
        hurt(data / "train", 8)
        blocks = broken.readers["train"]._shard(1).blocks.copy()
        blocks[1, 5] ^= 1
        broken.readers["train"]._shard(1).blocks = blocks
        rows, told = train(ranks, range(STEPS), workers=1)
        assert len(told) <= 1
        for damage in told:
            step = damage["from_sample"] // GLOBAL
            assert rows[:step] == whole[:step]
            assert rows[step] != whole[step]
        again = ranks_of(config_of(data), 2)
        for rank in again:
            rank.adopt_damage(told)
        assert train(again, range(STEPS))[0] == rows


def test_too_much_damage_halts_whoever_finds_it(data: Path) -> None:
    hurt(data / "train", *range(5))
    with pytest.raises(UserError, match=r"data\.max_damaged=4: 5 blocks are damaged, the last one block"):
        train(ranks_of(config_of(data, max_damaged=4), 2), range(STEPS))
    _, told = train(ranks_of(config_of(data, max_damaged=5), 2), range(STEPS))
    (rank,) = ranks_of(config_of(data, max_damaged=4))
    with pytest.raises(UserError, match=r"data\.max_damaged=4: 5 blocks"):
        rank.adopt_damage(told)


def test_a_source_without_a_whole_block_halts(data: Path, tmp_path: Path) -> None:
    hurt(data / "train", *range(BLOCKS))
    with pytest.raises(UserError, match="no whole one is left to take their place"):
        train(ranks_of(config_of(data)), range(STEPS))
    write_corpus(tmp_path / "short", 30)
    hurt(tmp_path / "short", 0)
    with pytest.raises(UserError, match="no whole one is left"):
        train(ranks_of(config_of(tmp_path / "short")), range(1))


def test_validation_has_a_quarantine_of_its_own(data: Path) -> None:
    """Block 2 of both splits is called alike: only the one that is damaged is replaced."""
    hurt(data / "val", 2)

    def val_rows(ranks: list[TokenBatches]) -> list[int]:
        micros = [m for rank in ranks for m in rank.eval_batches(1000)]
        real = [m.tokens_BT[(m.targets_BT >= 0).any(1)][:, 0] for m in micros]
        return sorted(int(token) for part in real for token in part)

    one = ranks_of(config_of(data))
    expected = val_rows(one)
    (damage,) = one[0].new_damage()
    assert (damage["split"], damage["block"], damage["from_sample"], damage["samples"]) == ("val", 2, 0, [])
    assert len(expected) == 20
    assert not {FIRST + SEQ_LEN * window for window in range(8, 12)} & set(expected)
    assert val_rows(one) == expected
    assert val_rows(ranks_of(config_of(data), 3)) == expected
    rows, told = train(one, range(STEPS))
    assert rows == train(ranks_of(config_of(data)), range(STEPS))[0]
    assert told == []
    hurt(data / "val", 2)
    mended = ranks_of(config_of(data), 2)
    for rank in mended:
        rank.adopt_damage([damage])  # before the validation split is opened
    assert val_rows(mended) == expected
    hurt(data / "val", 2)
    with pytest.raises(UserError, match="has hash"):
        val_rows(ranks_of(DataConfig(train=str(data))))


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_any_damage_any_split_any_resume(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    """Two sources, a batch ramp, documents kept apart: the rows of every step are those of one rank that
    knows of all damage from the start.
    """
    root = tmp_path_factory.mktemp("drawn")
    for name, blocks in (("a", BLOCKS), ("b", 6)):
        write_corpus(root / name, 64 * blocks + 5, document=10**6)
        hurt(root / name, *draw.draw(st.sets(st.integers(0, blocks), max_size=blocks // 2), name))
    sources = {"a": SourceConfig(str(root / "a"), 0.7), "b": SourceConfig(str(root / "b"), 0.3)}
    config = DataConfig(
        sources=sources, batch_ramp=[BatchPhase(2, 17)], shuffle_blocks=3, on_damage="quarantine",
        document_mask=True,
    )  # fmt: skip
    reference, _ = train(ranks_of(config), range(STEPS))
    worlds = st.integers(1, 5)
    ranks = ranks_of(config, draw.draw(worlds, "world"))
    cut = draw.draw(st.integers(0, STEPS), "cut")
    rows, _ = train(ranks, range(cut), draw.draw(st.integers(0, 2), "workers"))
    state = ranks[0].state(cut)
    assert all(rank.state(cut) == state for rank in ranks)
    ranks = ranks_of(config, draw.draw(worlds, "world after"))
    for rank in ranks:
        rank.check_state(state, cut)
        rank.restore(state)
    assert rows + train(ranks, range(cut, STEPS))[0] == reference


def test_the_union_does_not_depend_on_its_order(data: Path) -> None:
    shards = Index.load(data / "train").shards
    place = {"split": "train", "source": "train", "shard": shards.files[0]}
    damages = [place | {"block": block, "from_sample": n} for block, n in ((1, 50), (1, 20), (2, 9), (1, 70))]
    states = []
    for order in itertools.permutations(damages):
        for size in (1, 4):
            quarantine = Quarantine("quarantine", 9, 1)
            part = quarantine.source("train", "train", shards, BLOCKS)
            for begin in range(0, 4, size):
                quarantine.adopt(order[begin : begin + size])
            states.append((quarantine.state(10**6), part.damaged))
    assert all(state == states[0] for state in states)
    assert states[0][1] == {1: 20, 2: 9}


def test_keys_of_the_quarantine_are_checked(data: Path) -> None:
    for options, message in (
        ({"on_damage": "ignore"}, r"data\.on_damage=ignore: must be one of halt, quarantine"),
        ({"verify": "size"}, r"data\.on_damage=quarantine: with data\.verify=size damage is not looked for"),
        ({"max_damaged": 0}, r"data\.max_damaged=0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            config_of(data, **options).validate()
    (rank,) = ranks_of(config_of(data))
    gone = {"split": "train", "source": "train", "shard": "x.tar", "block": 1, "from_sample": 0}
    with pytest.raises(UserError, match=r"x\.tar: quarantined in source train, which holds no such shard"):
        rank.adopt_damage([gone])
