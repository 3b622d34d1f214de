"""Batches: the same global batch however it is split, resumed or read ahead; masks, padding, evaluation."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from corpora import EOS, FIRST, numbered_row, write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.stream.batches import IGNORE, Batch, Micro, TokenBatches
from trainer.stream.config import BatchPhase, DataConfig, SourceConfig, WeightPhase
from trainer.stream.loader import Prefetcher

WEB_TOKENS, CODE_TOKENS, SEQ_LEN = 64 * 30 + 9, 64 * 5 + 1, 16


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two sources whose shards have equal names, a change of weights inside a batch, a batch ramp."""
    root = tmp_path_factory.mktemp("mixed")
    write_corpus(root / "web" / "train", WEB_TOKENS, document=10**6)
    write_corpus(root / "code" / "train", CODE_TOKENS, document=10**6, vocab_size=5000)
    return DataConfig(
        sources={"web": SourceConfig(str(root / "web"), 0.7), "code": SourceConfig(str(root / "code"), 0.3)},
        weight_schedule=[WeightPhase(77, {"web": 0.4, "code": 0.6}), WeightPhase(150, {"web": 1.0})],
        batch_ramp=[BatchPhase(3, 36), BatchPhase(6, 24)],
        shuffle_blocks=4,
    )


def token_batches(config: DataConfig, **options: object) -> TokenBatches:
    defaults = {"seed": 5, "seq_len": SEQ_LEN, "global_batch": 24, "micro_batch": 2}
    return TokenBatches(config, **(defaults | options))  # type: ignore[arg-type]


def rows(micros: list[Micro]) -> Counter[tuple[int, ...]]:
    """The rows that carry loss, as whole tuples: one per real window."""
    real = [m.tokens_BT[(m.targets_BT != IGNORE).any(1)] for m in micros]
    return Counter(tuple(row) for tokens in real for row in tokens.tolist())


def global_batch(batches: list[Batch]) -> tuple[Counter[tuple[int, ...]], int, int]:
    """(rows, hash, items) of one step over all ranks."""
    together = sum((rows(batch.micros) for batch in batches), Counter())
    micros = [micro for batch in batches for micro in batch.micros]
    return together, sum(m.rows_hash for m in micros) % 2**64, sum(m.num_items for m in micros)


STEPS = (
    16  # 24 * 3 + 36 * 3 + 24 * 10 samples: both sources begin new epochs, both phases fall inside batches
)


@pytest.fixture(scope="module")
def reference(mixed: DataConfig) -> list[tuple[Counter[tuple[int, ...]], int, int]]:
    one = token_batches(mixed)
    assert one.mixture.epochs(one.consumed(STEPS))["code"] > 2
    assert one.mixture.epochs(one.consumed(STEPS))["web"] > 1
    assert 0 < one.batch(3).first_sample < 77 < one.batch(4).first_sample
    return [global_batch([one.batch(step)]) for step in range(STEPS)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_global_batches_do_not_depend_on_the_split(
    mixed: DataConfig, reference: list, world: int, workers: int, micro_batch: int
) -> None:
    """Over epoch edges, phase edges and the batch ramp; also when 24 or 36 rows do not divide evenly."""
    options = {"world": world, "micro_batch": micro_batch}
    ranks = [token_batches(mixed, rank=rank, **options) for rank in range(world)]
    readers = [Prefetcher(rank.batch, workers) for rank in ranks]
    for step in [*range(STEPS), 5]:  # the last one is a seek back, as a resume does
        batches = [reader.get(step) for reader in readers]
        assert global_batch(batches) == reference[step]
        assert len({len(batch.micros) for batch in batches}) == 1
        assert all(len(micro.tokens_BT) == micro_batch for batch in batches for micro in batch.micros)
        assert len({(b.first_sample, b.num_samples, *b.epochs.values()) for b in batches}) == 1
    for reader in readers:
        reader.close()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_config_reads_the_samples_it_says(mixed: DataConfig, data: st.DataObject) -> None:
    """Against the rows themselves, without the reader: drawn weights, phases, ramps, splits, lengths and
    steps.
    """
    weights = st.fixed_dictionaries({"web": st.floats(0.1, 1), "code": st.floats(0.1, 1)})
    starts = sorted(data.draw(st.sets(st.integers(0, 400), max_size=3), "phase starts"))
    changes = sorted(data.draw(st.sets(st.integers(0, 12), max_size=3), "ramp steps"))
    config = DataConfig(
        sources=mixed.sources,
        weight_schedule=[WeightPhase(start, data.draw(weights)) for start in starts],
        batch_ramp=[BatchPhase(step, data.draw(st.integers(1, 40))) for step in changes],
        shuffle_blocks=data.draw(st.integers(1, 50)),
    )
    seq_len = data.draw(st.sampled_from([1, 2, 8, 16, 32, 64]))
    world, step = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 15))
    options = {"world": world, "micro_batch": data.draw(st.integers(1, 9)), "seq_len": seq_len, "seed": 9}
    ranks = [token_batches(config, rank=rank, **options) for rank in range(world)]
    got, _, _ = global_batch([rank.batch(step) for rank in ranks])

    corpora = {name: numbered_row(size, 10**6) for name, size in (("web", WEB_TOKENS), ("code", CODE_TOKENS))}
    expected: Counter[tuple[int, ...]] = Counter()
    for sample in range(ranks[0].consumed(step), ranks[0].consumed(step + 1)):
        name, _, window = ranks[0].mixture.locate(sample)
        row = corpora[name][window * seq_len : (window + 1) * seq_len].tolist()
        expected[tuple(row + [EOS] * (seq_len - len(row)))] += 1
    assert got == expected


def test_resume_on_another_world_reads_on_where_it_stopped(mixed: DataConfig, reference: list) -> None:
    saved = token_batches(mixed, world=2).state(7)
    ranks = [token_batches(mixed, world=6, rank=rank, micro_batch=4) for rank in range(6)]
    for rank in ranks:
        rank.check_state(saved, 7)
    for step in range(7, STEPS):
        assert global_batch([rank.batch(step) for rank in ranks]) == reference[step]


def test_ranks_divide_an_epoch_without_overlap(tmp_path: Path) -> None:
    """One epoch: the union over ranks and steps is the corpus, every window exactly once."""
    write_corpus(tmp_path, 64 * 12, document=10**6)
    config = DataConfig(train=str(tmp_path), shuffle_blocks=3)
    ranks = [token_batches(config, world=3, rank=rank) for rank in range(3)]
    num_windows = 48
    seen: Counter[int] = Counter()
    for step in range(2):
        for rank in ranks:
            for micro in rank.batch(step).micros:
                seen.update((micro.tokens_BT[:, 0] - FIRST).tolist())
    assert seen == Counter(range(0, num_windows * SEQ_LEN, SEQ_LEN))
    again = Counter(row for rank in ranks for m in rank.batch(2).micros for row in m.tokens_BT[:, 0].tolist())
    assert sum(again.values()) == 24
    assert ranks[0].batch(1).epochs == {"train": 1.0}


def test_targets_are_the_next_tokens_and_padding_carries_no_loss(tmp_path: Path) -> None:
    tokens = 64 * 3 + 40
    write_corpus(tmp_path, tokens, document=10**6)
    one = token_batches(DataConfig(train=str(tmp_path)), global_batch=15, micro_batch=4)
    row = numbered_row(tokens, 10**6)
    batch = one.batch(0)
    assert len(batch.micros) == 4
    predicted = []
    for micro in batch.micros:
        for tensor in (micro.tokens_BT, micro.targets_BT):
            assert tensor.dtype == torch.int64
            assert tensor.is_contiguous()
        for tokens_T, targets_T in zip(micro.tokens_BT, micro.targets_BT):
            n = int((targets_T != IGNORE).sum())
            assert (targets_T[n:] == IGNORE).all()
            assert (targets_T[:n] == tokens_T[:n] + 1).all()
            predicted += targets_T[:n].tolist()
        assert micro.num_items == int((micro.targets_BT != IGNORE).sum())
        assert micro.positions_BT is None
        assert micro.documents_BT is None
    assert sorted(predicted) == row[1:].tolist()


def plain_documents(tokens: list[int]) -> tuple[list[int], list[int]]:
    """Positions and documents of one row, the slow and obvious way."""
    positions, documents, place, number = [], [], 0, 0
    for token in tokens:
        positions.append(place)
        documents.append(number)
        place += 1
        if token == EOS:
            place, number = 0, number + 1
    return positions, documents


@pytest.mark.parametrize("document", [1, 2, 5, 16, 17, 300])
def test_document_mask_follows_eos(tmp_path: Path, document: int) -> None:
    """Rows that begin inside a document, one-token documents, documents longer than a block."""
    write_corpus(tmp_path, 64 * 5 + 7, document=document)
    config = DataConfig(train=str(tmp_path), document_mask=True)
    plain = token_batches(DataConfig(train=str(tmp_path)), global_batch=21, micro_batch=21).batch(0).micros[0]
    micro = token_batches(config, global_batch=21, micro_batch=21).batch(0).micros[0]
    assert micro.tokens_BT.equal(plain.tokens_BT)
    assert micro.positions_BT is not None
    assert micro.documents_BT is not None
    for row, tokens in enumerate(micro.tokens_BT.tolist()):
        positions, documents = plain_documents(tokens)
        assert micro.positions_BT[row].tolist() == positions
        assert micro.documents_BT[row].tolist() == documents
    ends = micro.tokens_BT == EOS
    assert (micro.targets_BT[ends] == IGNORE).all()
    assert micro.targets_BT[~ends].equal(plain.targets_BT[~ends])
    assert micro.num_items == int((micro.targets_BT != IGNORE).sum())


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("wanted", [1, 10, 21, 500])
def test_evaluation_covers_each_window_once(tmp_path: Path, world: int, wanted: int) -> None:
    write_corpus(tmp_path / "train", 64 * 9)
    write_corpus(tmp_path / "val", 64 * 5 + 7, document=10**6)
    config = DataConfig(train=str(tmp_path))
    shares = [
        token_batches(config, world=world, rank=rank, micro_batch=4).eval_batches(wanted)
        for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    got = sum((rows(share) for share in shares), Counter())
    expected = [FIRST + window * SEQ_LEN for window in range(min(wanted, 21))]
    assert sorted(row[0] for row in got.elements()) == expected
    items = sum(micro.num_items for share in shares for micro in share)
    assert items == min(64 * 5 + 6, wanted * SEQ_LEN)


def test_evaluation_of_several_sources(tmp_path: Path) -> None:
    for name, tokens in (("a", 64 * 5 + 1), ("b", 64 * 5 + 1), ("c", 33)):
        write_corpus(tmp_path / name / "train", 100)
        write_corpus(tmp_path / name / "val", tokens)
    write_corpus(tmp_path / "elsewhere", 64 * 5 + 1, vocab_size=2000, document=5)
    sources = {
        name: SourceConfig(str(tmp_path / name), weight)
        for name, weight in (("a", 0.6), ("b", 0.2), ("c", 0.2))
    }
    sources["b"].val = str(tmp_path / "elsewhere")
    one = token_batches(DataConfig(sources=sources))
    assert one._quotas(one.val_readers, 10) == [6, 2, 2]
    assert one._quotas(one.val_readers, 18) == [12, 4, 2]
    assert one._quotas(one.val_readers, 1000) == [20, 20, 2]
    assert sum(rows(one.eval_batches(18)).values()) == 18
    only_b = rows(one.eval_batches(1000, source="b"))
    assert sum(only_b.values()) == 20
    assert all(EOS in row for row in only_b)


def test_no_validation_split_says_how_to_give_one(tmp_path: Path) -> None:
    write_corpus(tmp_path, 1000)
    one = token_batches(DataConfig(train=str(tmp_path)))
    assert one.val_readers == {}
    with pytest.raises(
        UserError, match=r"data\.val is not set and .* set data\.val=/path or turn evaluation off"
    ):
        one.eval_batches(4)


def test_a_val_split_can_be_read_like_a_train_split(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a" / "train", 1000)
    write_corpus(tmp_path / "a" / "val", 64 * 6, document=10**6)
    one = token_batches(DataConfig(train=str(tmp_path / "a")), split="val")
    seen = Counter(m.tokens_BT[i, 0].item() - FIRST for m in one.batch(0).micros for i in range(2))
    assert seen == Counter(range(0, 64 * 6, SEQ_LEN))
    write_corpus(tmp_path / "b", 1000)
    sources = {name: SourceConfig(str(tmp_path / name)) for name in "ab"}
    with pytest.raises(UserError, match=r"b: holds no val/index\.json"):
        token_batches(DataConfig(sources=sources), split="val")
    assert sum(rows(token_batches(DataConfig(sources=sources)).eval_batches(100)).values()) == 24


def test_consumed_is_the_sum_of_the_ramp(mixed: DataConfig) -> None:
    one = token_batches(mixed)
    sizes = [24, 24, 24, 36, 36, 36, *[24] * 20]
    assert [one.consumed(step) for step in range(27)] == [sum(sizes[:step]) for step in range(27)]
    assert one.batch(4).num_samples == 36


def test_hash_names_the_rows(mixed: DataConfig, reference: list) -> None:
    assert len({step[1] for step in reference}) == STEPS
    assert global_batch([token_batches(mixed, seed=6).batch(0)])[1] != reference[0][1]


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 1000)
    write_corpus(tmp_path / "b", 1000, tokenizer_sha256="another")
    with pytest.raises(UserError, match=r"data\.train=.*a: written with another tokenizer"):
        token_batches(DataConfig(train=str(tmp_path / "a")), tokenizer_sha256="mine")
    sources = {name: SourceConfig(str(tmp_path / name)) for name in "ab"}
    with pytest.raises(UserError, match=r"data\.sources\.b\.path=.*b: written with another tokenizer"):
        token_batches(DataConfig(sources=sources))
    with pytest.raises(UserError, match=r"data\.val=.*b: written with another tokenizer"):
        token_batches(DataConfig(train=str(tmp_path / "a"), val=str(tmp_path / "b"))).eval_batches(1)


def test_a_model_with_too_few_ids_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path, 1000, vocab_size=3000)
    with pytest.raises(
        UserError, match=r"model\.vocab_size=2999: less than the 3000 ids .* set model\.vocab_size=3000"
    ):
        token_batches(DataConfig(train=str(tmp_path)), vocab_size=2999)
    token_batches(DataConfig(train=str(tmp_path)), vocab_size=3072)


def test_state_refuses_another_past_and_allows_another_future(mixed: DataConfig, tmp_path: Path) -> None:
    one = token_batches(mixed)
    state = json.loads(json.dumps(one.state(5)))  # as it comes back from a checkpoint
    assert state["consumed"] == 24 * 3 + 36 * 2
    one.check_state(state, 5)

    def changed(**changes: object) -> DataConfig:
        return DataConfig(**{**mixed.__dict__, **changes})

    later = changed(weight_schedule=[mixed.weight_schedule[0], WeightPhase(144, {"code": 1.0})])
    token_batches(later).check_state(state, 5)
    token_batches(changed(batch_ramp=[BatchPhase(3, 36), BatchPhase(5, 48)])).check_state(state, 5)

    write_corpus(tmp_path / "web", 64 * 31)
    other = {**mixed.sources, "web": SourceConfig(str(tmp_path / "web"), 0.7)}
    refused = [
        (token_batches(changed(weight_schedule=[WeightPhase(78, {"web": 1.0})])), r"data\.weight_schedule: "),
        (
            token_batches(changed(batch_ramp=[])),
            r"global_batch or data\.batch_ramp: steps before 5 read 144 samples",
        ),
        (token_batches(changed(shuffle_blocks=8)), r"data\.shuffle_blocks=8: this run was begun with 4"),
        (token_batches(mixed, seed=6), r"seed=6: this run was begun with 5"),
        (token_batches(mixed, seq_len=32), r"seq_len=32: this run was begun with 16"),
        (
            token_batches(changed(sources=other)),
            r"data\.sources\.web\.path=.*: not the shards this run began with",
        ),
    ]
    for batches, message in refused:
        with pytest.raises(UserError, match=message):
            batches.check_state(state, 5)
    with pytest.raises(UserError, match="stream state of version 3"):
        one.check_state({**state, "v": 3}, 5)


def test_fingerprint_of_one_source_is_that_of_its_index(tmp_path: Path) -> None:
    index = write_corpus(tmp_path, 1000)
    assert token_batches(DataConfig(train=str(tmp_path))).fingerprint == index.fingerprint
    assert index.fingerprint.startswith("sha256:")
