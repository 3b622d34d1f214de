"""Every mistake in a model's configuration is one line that names the key."""

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from trainer.errors import UserError
from trainer.model.config import ModelConfig, RopeScaling


def test_the_defaults_are_valid():
    ModelConfig().validate()
    replace(
        ModelConfig(), rope_scaling=RopeScaling(), sliding_window=1, head_dim=32, num_kv_heads=1
    ).validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 7}, r"model\.num_heads=7: must divide model\.hidden_size=256, or set model\.head_dim"),
        ({"num_heads": 0}, r"model\.num_heads=0: must be at least 1"),
        ({"num_kv_heads": 3}, r"model\.num_kv_heads=3: must divide model\.num_heads=4"),
        ({"num_kv_heads": 8}, r"model\.num_kv_heads=8: must divide model\.num_heads=4"),
        ({"head_dim": 33}, r"model\.head_dim=33: must be even"),
        ({"head_dim": 0}, r"model\.head_dim=0: must be at least 2"),
        ({"hidden_size": 12}, r"model\.head_dim=3: must be even"),
        ({"vocab_size": 0}, r"model\.vocab_size=0"),
        ({"num_layers": -1}, r"model\.num_layers=-1"),
        ({"max_seq_len": 0}, r"model\.max_seq_len=0"),
        ({"loss_chunk_tokens": 0}, r"model\.loss_chunk_tokens=0"),
        ({"attention": "flash"}, r"model\.attention=flash: choose one of sdpa, flex, varlen"),
        ({"sliding_window": 0}, r"model\.sliding_window=0"),
        ({"rope_theta": 0.0}, r"model\.rope_theta=0\.0"),
        ({"norm_eps": -1e-5}, r"model\.norm_eps=-1e-05"),
        ({"norm_eps": float("nan")}, r"model\.norm_eps=nan"),
        ({"init_std": -0.1}, r"model\.init_std=-0\.1"),
        ({"rope_scaling": RopeScaling(kind="ntk")}, r"model\.rope_scaling\.kind=ntk: choose one of llama3"),
        ({"rope_scaling": RopeScaling(factor=0.5)}, r"model\.rope_scaling\.factor=0\.5"),
        ({"rope_scaling": RopeScaling(original_max_seq_len=0)}, r"original_max_seq_len=0"),
        ({"rope_scaling": RopeScaling(high_freq_factor=1.0)}, r"high_freq_factor=1\.0: must be above"),
        ({"rope_scaling": RopeScaling(kind="yarn", beta_fast=1.0)}, r"beta_fast=1\.0: must be above"),
    ],
)
def test_a_mistake_names_its_key(change: dict, message: str):
    with pytest.raises(UserError, match=message) as error:
        replace(ModelConfig(), **change).validate()
    assert "\n" not in str(error.value)


def test_it_is_a_structured_config():
    """Hydra composes it: typed, with a scaling that appears when a preset gives one."""
    schema = OmegaConf.structured(ModelConfig)
    merged = OmegaConf.merge(schema, {"rope_scaling": {"factor": 32}, "head_dim": 64})
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    assert config.rope_scaling == RopeScaling(factor=32.0)
    assert OmegaConf.to_object(schema).rope_scaling is None
