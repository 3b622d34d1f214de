"""Initial weights as a pure function of (seed, parameter name, flat index): no sharding changes them.

A rank draws exactly the flat slice that it owns, on its own device, without ever holding the whole tensor; 1
rank and 1,024 ranks start from the same model, and so does a run that is restarted on the other engine.
"""

import math

import torch
from torch import Tensor

from trainer import keyed
from trainer.model.config import ModelConfig
from trainer.model.transformer import Transformer

RESIDUAL_OUTPUTS = ("attn.o.weight", "mlp.down.weight")  # what a block adds to the residual stream


def init_std(config: ModelConfig, name: str) -> float | None:
    """Standard deviation of parameter `name` at initialisation; 0.0 means zeros, None means ones.

    Projections that write into the residual stream are scaled by 1/sqrt(2 * num_layers), so that the stream's
    variance does not grow with depth (GPT-2, Radford et al. 2019, section 2.3).
    """
    if name.endswith("norm.weight"):
        return None
    if name.endswith(".bias"):
        return 0.0
    if name.endswith(RESIDUAL_OUTPUTS):
        return config.init_std / math.sqrt(2 * config.num_layers)
    return config.init_std


def init_range(
    config: ModelConfig,
    name: str,
    shape: torch.Size | tuple[int, ...],
    start: int,
    count: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Elements `start .. start+count-1` of the flattened initial value of parameter `name`; fp32 [count].

    `shape` is the whole parameter's; a slice outside it is a programming error (ValueError).
    """
    if start < 0 or count < 0 or start + count > math.prod(shape):
        raise ValueError(f"{name}: slice {start}+{count} is outside a tensor of shape {tuple(shape)}")
    if config.tie_embeddings and name == "head.weight":
        name = "embed.weight"  # one tensor, whichever of its two names an engine uses
    std = init_std(config, name)
    if std is None:
        return torch.ones(count, dtype=torch.float32, device=device)
    if std == 0.0:
        return torch.zeros(count, dtype=torch.float32, device=device)
    return keyed.normal(keyed.key(seed, "init", name), start, count, device).mul_(std)


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill every parameter of a whole (unsharded) model in place, also just after `to_empty`."""
    for name, parameter in model.named_parameters():
        flat = init_range(model.config, name, parameter.shape, 0, parameter.numel(), seed, parameter.device)
        parameter.copy_(flat.view(parameter.shape))
