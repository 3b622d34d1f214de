"""Rotary position embedding (Su et al. 2021) in Hugging Face's half-rotation form, so weights map one to one.

Shapes: B batch, T tokens, N heads, H head width, F = H/2 frequencies.

Nothing is kept between calls: tables are computed from positions at every forward, in fp32. A buffer would be
lost in a meta-device build, cast by an engine that lowers precision, or cached as a fake tensor by a
simulation.
"""

import math

import torch
from torch import Tensor

from trainer.model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Radians per token of each of the F rotating pairs (fp32 [F]), and the scale of cos and sin."""
    exponents = (
        torch.arange(0, config.head_size, 2, dtype=torch.int64, device=device).float() / config.head_size
    )
    inv_freq = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    return _yarn(inv_freq, scaling, config), 0.1 * math.log(scaling.factor) + 1.0


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Wavelengths above original/low_freq_factor are stretched, below original/high_freq_factor kept."""
    wavelength = 2 * math.pi / inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((scaling.original_max_seq_len / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / scaling.factor + keep * inv_freq


def _yarn(inv_freq: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """Pairs turning over beta_fast times in the original length are kept, under beta_slow stretched."""

    def pair_turning(times: float) -> float:
        wavelength = scaling.original_max_seq_len / (times * 2 * math.pi)
        return config.head_size * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_turning(scaling.beta_slow)), config.head_size - 1)
    width = max(last - first, 0.001)  # avoids 0/0, as the reference does
    pairs = torch.arange(len(inv_freq), dtype=torch.float32, device=inv_freq.device)
    ramp = ((pairs - first) / width).clamp(0, 1)
    return inv_freq / scaling.factor * ramp + inv_freq * (1 - ramp)


def rope_tables(config: ModelConfig, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(cos_BTF, sin_BTF) in fp32 for int positions [B or 1, T]."""
    inv_freq_F, scale = inverse_frequencies(config, positions_BT.device)
    angle_BTF = positions_BT[..., None].float() * inv_freq_F
    return angle_BTF.cos() * scale, angle_BTF.sin() * scale


def rotate(x_BTNH: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + H/2]) by its angle, computing in the tables' precision.

    With fp32 tables a bf16 x is turned in fp32: bf16 tables lose the position at long context (Wang et al.
    2024).
    """
    cos, sin = cos_BTF[:, :, None, :], sin_BTF[:, :, None, :]
    first, second = x_BTNH.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTNH.dtype)
