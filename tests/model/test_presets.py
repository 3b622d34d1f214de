"""Every preset is the published model: same number of parameters, same Hugging Face family."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from trainer.model.config import ModelConfig
from trainer.model.flops import matmul_parameters, num_parameters
from trainer.model.hf_config import hf_family
from trainer.model.transformer import Transformer

FOLDER = Path(__file__).parents[2] / "configs" / "model"
# Published: the sizes that Hugging Face shows, a tied embedding counted once. Ours: stated so that a change
# shows.
PARAMETERS = {
    "1m": (1_118_080, "llama"),
    "tiny": (4_212_992, "llama"),
    "15m": (15_160_640, "llama"),
    "60m": (63_586_816, "llama"),
    "gpt2_124m": (123_587_328, "llama"),
    "gpt2_350m": (353_944_576, "llama"),
    "smollm2_135m": (134_515_008, "llama"),
    "smollm2_360m": (361_821_120, "llama"),
    "llama_1b": (1_235_814_400, "llama"),
    "llama_3b": (3_212_749_824, "llama"),
    "llama_8b": (8_030_261_248, "llama"),
    "llama_70b": (70_553_706_496, "llama"),
    "mistral_7b": (7_241_732_096, "mistral"),
    "qwen2_0.5b": (494_032_768, "qwen2"),
    "qwen2.5_1.5b": (1_543_714_304, "qwen2"),
    "qwen2.5_7b": (7_615_616_512, "qwen2"),
    "qwen3_0.6b": (596_049_920, "qwen3"),
    "qwen3_1.7b": (1_720_574_976, "qwen3"),
    "qwen3_4b": (4_022_468_096, "qwen3"),
    "qwen3_8b": (8_190_735_360, "qwen3"),
    "qwen3_14b": (14_768_307_200, "qwen3"),
    "qwen3_32b": (32_762_123_264, "qwen3"),
}


def test_every_preset_is_listed_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset(name: str):
    raw = OmegaConf.load(FOLDER / f"{name}.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), raw))
    config.validate()
    parameters, family = PARAMETERS[name]
    assert hf_family(config) == family
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters == num_parameters(config)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    head = config.vocab_size * config.hidden_size
    assert matmul_parameters(config) == sum(module.weight.numel() for module in linear) + head
    first_line = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert f"{parameters:,} parameters" in first_line or f"{parameters / 1e6:.1f} M parameters" in first_line
