"""Randomness as a pure function of a key and a position: no generator state, so nothing to save or to
restore.

Weights, data order and sampling noise are all drawn from here. Because element `i` depends on (key, i)
alone, a rank can draw just its own slice and any other sharding draws the same numbers: the n-th weight of a
tensor is the same on 1 rank and on 1,024. The mixer is splitmix64's finaliser (Steele, Lea, Flood 2014,
"Fast splittable pseudorandom number generators"); the same integer arithmetic runs in numpy (`mix64`) and in
torch on any device (`_mix64_torch`).
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
CHUNK = 1 << 20  # elements drawn at a time: bounds the temporary int64 memory at about 50 MB


def key(*parts: str | int) -> int:
    """A 64-bit key for a role, e.g. `key(seed, "init", "blocks.0.mlp.up.weight")`. Stable across
    processes.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64 finaliser over a uint64 array; a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))


def _signed(word: int) -> int:
    """The int64 that has the same bits: torch has no uint64 arithmetic, but int64 wraps the same way."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 drags the sign bit along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64_torch(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(MIX_2)
    return x ^ _shift_right(x, 31)


def _words(key: int, positions: Tensor) -> Tensor:
    """One mixed 64-bit word per position (int64 tensor of any shape)."""
    return _mix64_torch(_mix64_torch(positions * _signed(GOLDEN)) + _signed(key))


def uniform_at(key: int, positions: Tensor) -> Tensor:
    """fp32 uniforms in the open interval (0, 1), same shape as `positions` (int64), 24 random bits each."""
    bits = _shift_right(_words(key, positions), 40)
    return (bits.to(torch.float32) + 0.5) * (1.0 / (1 << 24))


def uniform(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements `start .. start+count-1` of the infinite uniform sequence of `key`; fp32 [count]."""
    out = torch.empty(count, dtype=torch.float32, device=device)
    for begin in range(0, count, CHUNK):
        end = min(count, begin + CHUNK)
        out[begin:end] = uniform_at(key, torch.arange(start + begin, start + end, device=device))
    return out


def normal(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements `start .. start+count-1` of the infinite standard normal sequence of `key`; fp32 [count].

    Box-Muller on two halves of one mixed word: every element stands alone, so any slice can be drawn by
    itself.
    """
    out = torch.empty(count, dtype=torch.float32, device=device)
    for begin in range(0, count, CHUNK):
        end = min(count, begin + CHUNK)
        words = _words(key, torch.arange(start + begin, start + end, device=device))
        radius = (_shift_right(words, 40).to(torch.float32) + 0.5) * (1.0 / (1 << 24))
        angle = (words & 0xFFFFFF).to(torch.float32) * (2 * math.pi / (1 << 24))
        out[begin:end] = torch.sqrt(-2.0 * torch.log(radius)) * torch.cos(angle)
    return out
