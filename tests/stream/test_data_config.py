"""The keys of `data`: every mistake is one line that names its key."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from trainer.errors import UserError
from trainer.stream.config import BatchPhase, DataConfig, SourceConfig, WeightPhase

TWO = {"web": SourceConfig("/data/web", 0.7), "code": SourceConfig("/data/code", 0.3)}
GROUP = Path(__file__).parents[2] / "configs" / "data"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(), "data.train is not set"),
        (DataConfig(train="/a", sources=TWO), "data.train and data.sources are both set"),
        (DataConfig(sources=TWO, val="/v"), "data.val=/v: with data.sources, give each source its own"),
        (DataConfig(sources={"a.b": SourceConfig("/a")}), "data.sources.a.b: use letters"),
        (DataConfig(sources={"web": SourceConfig()}), "data.sources.web.path is not set"),
        (DataConfig(sources={"web": SourceConfig("/a", 0)}), "data.sources.web.weight=0: must be above 0"),
        (DataConfig(sources={"web": SourceConfig("/a", -1)}), "data.sources.web.weight=-1"),
        (DataConfig(sources={"web": SourceConfig("/a", float("nan"))}), "data.sources.web.weight=nan"),
        (DataConfig(train="/a", workers=-1), "data.workers=-1: must be 0"),
        (DataConfig(train="/a", verify="md5"), "data.verify=md5: must be one of off, size, blocks"),
        (DataConfig(train="/a", shuffle_blocks=0), "data.shuffle_blocks=0"),
        (
            DataConfig(sources=TWO, weight_schedule=[WeightPhase(5, {"books": 1})]),
            "data.weight_schedule[0].weights.books: no such source; there are code, web",
        ),
        (
            DataConfig(sources=TWO, weight_schedule=[WeightPhase(5, {"web": 0})]),
            "data.weight_schedule[0].weights: at",
        ),
        (
            DataConfig(sources=TWO, weight_schedule=[WeightPhase(5, {"web": -2})]),
            "weights.web=-2: must be 0 or more",
        ),
        (
            DataConfig(
                sources=TWO, weight_schedule=[WeightPhase(5, {"web": 1}), WeightPhase(5, {"code": 1})]
            ),
            "data.weight_schedule[1].start_sample=5: must be above the one before",
        ),
        (DataConfig(sources=TWO, weight_schedule=[WeightPhase(-5, {"web": 1})]), "start_sample=-5"),
        (DataConfig(train="/a", batch_ramp=[BatchPhase(0, 0)]), "data.batch_ramp[0].global_batch=0"),
        (
            DataConfig(train="/a", batch_ramp=[BatchPhase(3, 1), BatchPhase(2, 1)]),
            "data.batch_ramp[1].step=2",
        ),
    ],
)
def test_mistakes_name_their_key(config: DataConfig, message: str) -> None:
    with pytest.raises(UserError) as error:
        config.validate()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_one_source_and_several_have_a_schedule_from_sample_zero() -> None:
    assert DataConfig(train="/a").schedule() == [(0, {"train": 1.0})]
    later = DataConfig(sources=TWO, weight_schedule=[WeightPhase(100, {"code": 1.0})])
    later.validate()
    assert later.schedule() == [(0, {"web": 0.7, "code": 0.3}), (100, {"code": 1.0})]
    assert DataConfig(sources=TWO, weight_schedule=[WeightPhase(0, {"web": 1.0})]).schedule() == [
        (0, {"web": 1.0})
    ]


def test_the_yaml_of_the_group_states_the_defaults() -> None:
    """A default that is changed in one place only would make the documented keys lie."""
    defaults = OmegaConf.structured(DataConfig)
    written = OmegaConf.load(GROUP / "tokens.yaml")
    assert set(written) == set(defaults)
    assert OmegaConf.to_container(OmegaConf.merge(defaults, written)) == OmegaConf.to_container(defaults)


def from_command_line(*overrides: str) -> DataConfig:
    """As Hydra reads `data.KEY=VALUE`."""
    parsed = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(list(overrides))}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), parsed))  # type: ignore[return-value]


def test_the_command_line_forms_compose() -> None:
    assert from_command_line("train=/data/fineweb") == DataConfig(train="/data/fineweb")
    several = from_command_line(
        "sources={web:{path:/data/web,weight:0.7},code:{path:/data/code,weight:0.3}}",
        "weight_schedule=[{start_sample:1000,weights:{web:1.0}}]",
    )
    assert several == DataConfig(sources=TWO, weight_schedule=[WeightPhase(1000, {"web": 1.0})])
