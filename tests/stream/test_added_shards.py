"""Shards that were added between two attempts of a run: refused in place, taken as a source of their own."""

import json
from pathlib import Path

import pytest
from corpora import write_corpus

from trainer.errors import UserError
from trainer.stream.batches import TokenBatches
from trainer.stream.config import DataConfig, SourceConfig, WeightPhase

STEP, GLOBAL = 5, 24


def batches_of(config: DataConfig) -> TokenBatches:
    return TokenBatches(config, seed=5, seq_len=16, global_batch=GLOBAL, micro_batch=2)


def hashes(batches: TokenBatches, steps: range) -> list[int]:
    return [sum(micro.rows_hash for micro in batches.batch(step).micros) % 2**64 for step in steps]


@pytest.fixture
def begun(tmp_path: Path) -> tuple[DataConfig, dict, list[int]]:
    """A run on data.train, its state after 5 steps, and its batches."""
    write_corpus(tmp_path / "web" / "train", 64 * 20)
    config = DataConfig(train=str(tmp_path / "web"))
    batches = batches_of(config)
    return config, json.loads(json.dumps(batches.state(STEP))), hashes(batches, range(12))


def test_a_data_set_that_grew_is_refused_with_the_way_on(
    begun: tuple[DataConfig, dict, list[int]], tmp_path: Path
) -> None:
    config, state, _ = begun
    write_corpus(tmp_path / "web" / "train", 64 * 40, overwrite=True)
    with pytest.raises(UserError) as error:
        batches_of(config).check_state(state, STEP)
    text = str(error.value)
    assert text.startswith(f"data.train={tmp_path / 'web' / 'train'}: 6 shards where this run began with 3 (")
    assert "name added ones as another of data.sources" in text
    assert "start_sample=120 on, or begin a new run with init_from" in text
    assert "\n" not in text
    assert batches_of(config).batch(0).num_samples == GLOBAL  # a new run takes them


def test_added_shards_come_in_as_a_source_from_the_next_sample_on(
    begun: tuple[DataConfig, dict, list[int]], tmp_path: Path
) -> None:
    config, state, before = begun
    write_corpus(tmp_path / "added", 64 * 20, document=5)
    sources = {"train": SourceConfig(config.train or ""), "added": SourceConfig(str(tmp_path / "added"))}
    at = STEP * GLOBAL
    phases = [WeightPhase(0, {"train": 1.0}), WeightPhase(at, {"train": 0.5, "added": 0.5})]
    more = batches_of(DataConfig(sources=sources, weight_schedule=phases))
    more.check_state(state, STEP)
    after = hashes(more, range(12))
    assert after[:STEP] == before[:STEP]
    assert not set(after[STEP:]) & set(before[STEP:])
    assert more.state(0)["fingerprint"] == state["fingerprint"]  # what the run began with has not changed
    assert more.batch(STEP).epochs["added"] > 0
    places = [more.mixture.locate(sample) for sample in range(at, at + 1000)]
    assert sum(name == "added" for name, _, _ in places) == 500
    train = [place[1:] for place in places if place[0] == "train"]
    plain = [batches_of(config).mixture.locate(n)[1:] for n in range(at, at + 500)]
    assert train == plain  # the old source goes on where it stood, at half the pace

    later = json.loads(json.dumps(more.state(8)))  # both are its past now
    assert set(later["sources"]) == {"added", "train"}
    with pytest.raises(
        UserError, match=r"data\.sources\.added is missing: this run read it before sample 192"
    ):
        batches_of(config).check_state(later, 8)


@pytest.mark.parametrize("phases", [[], [WeightPhase(100, {"train": 0.5, "added": 0.5})]])
def test_a_source_that_would_have_changed_the_past_is_refused(
    begun: tuple[DataConfig, dict, list[int]], tmp_path: Path, phases: list[WeightPhase]
) -> None:
    config, state, _ = begun
    write_corpus(tmp_path / "added", 64 * 20, document=5)
    sources = {"train": SourceConfig(config.train or ""), "added": SourceConfig(str(tmp_path / "added"))}
    with pytest.raises(
        UserError, match=r"data\.weight_schedule: .* add a phase with start_sample=120 or later"
    ):
        batches_of(DataConfig(sources=sources, weight_schedule=phases)).check_state(state, STEP)


def test_another_name_for_the_old_source_is_refused(begun: tuple[DataConfig, dict, list[int]]) -> None:
    """The order is keyed by the name, so it would be another one."""
    config, state, _ = begun
    with pytest.raises(
        UserError, match=r"data\.sources\.train is missing: this run read it before sample 120"
    ):
        batches_of(DataConfig(sources={"web": SourceConfig(config.train or "")})).check_state(state, STEP)
