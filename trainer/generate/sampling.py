"""Logits to a token, in small pure functions: logits -> truncated logits -> noise -> token and its logprobs.

Two log-probabilities belong to a sampled token, and they are different things:
- `logprob`: under the model as it is, temperature 1, nothing truncated. What a training forward computes.
- `sampling_logprob`: under the distribution that the token was drawn from, after temperature and truncation
(0 when
  greedy). Equal to `logprob` at temperature 1 with no truncation, the only setting where a policy-gradient
  ratio against `logprob` is unbiased (TRL #7269: with top_p 0.8 half of all ratios leave [0.9, 1.1]).

Noise is a pure function of (seed, key of the row, position, token id): a row draws the same tokens alone, in
any batch and on any rank. The Gumbel-max trick rather than inverting the distribution function: where two
forwards differ in the last bits, only near ties can come out differently, while the inverse shifts at every
id.

Shapes: B rows, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer import keyed
from trainer.generate.config import SamplingConfig

RESOLUTION = 1.0 / (1 << 24)  # of `keyed.uniform_at`


class Sampled(NamedTuple):
    """One token per row with its two log-probabilities, fp32 [B] each (see the top of this file)."""

    token_B: Tensor
    logprob_B: Tensor
    sampling_logprob_B: Tensor


def sample(logits_BV: Tensor, config: SamplingConfig, seed_key: int, words_B: np.ndarray) -> Sampled:
    """Draws one token per row of logits; `words_B` comes from `noise_words`. Greedy ties: the lowest id."""
    full_BV = torch.log_softmax(logits_BV.float(), dim=-1)
    if config.temperature == 0:
        token_B = logits_BV.argmax(dim=-1)
        logprob_B = pick(full_BV, token_B)
        return Sampled(token_B, logprob_B, torch.zeros_like(logprob_B))
    if config.temperature == 1 and not truncates(config):
        scores_BV = full_BV
    else:
        scores_BV = torch.log_softmax(truncate(logits_BV.float() / config.temperature, config), dim=-1)
    token_B = (scores_BV + gumbel(seed_key, words_B, scores_BV)).argmax(dim=-1)
    return Sampled(token_B, pick(full_BV, token_B), pick(scores_BV, token_B))


def pick(values_BV: Tensor, token_B: Tensor) -> Tensor:
    """values_BV[b, token_B[b]] for every row."""
    return values_BV.gather(-1, token_B[:, None])[:, 0]


def truncates(config: SamplingConfig) -> bool:
    """Whether any token can be ruled out."""
    return config.top_k > 0 or config.top_p < 1 or config.min_p > 0


def truncate(logits_BV: Tensor, config: SamplingConfig) -> Tensor:
    """Logits, already divided by the temperature, with -inf where top-k, then top-p, then min-p forbid."""
    if config.top_k > 0:
        logits_BV = keep_top_k(logits_BV, config.top_k)
    if config.top_p < 1:
        logits_BV = keep_top_p(logits_BV, config.top_p)
    if config.min_p > 0:
        logits_BV = keep_min_p(logits_BV, config.min_p)
    return logits_BV


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """The k highest logits, and those that tie with the k-th."""
    k = min(k, logits_BV.shape[-1])
    kth_B1 = logits_BV.topk(k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """The fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2019); never none."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = torch.softmax(sorted_BV, dim=-1)
    before_BV = probs_BV.cumsum(dim=-1) - probs_BV  # 0 for the likeliest, which is always kept
    drop_BV = (before_BV >= p).scatter(-1, order_BV, before_BV >= p)
    return logits_BV.masked_fill(drop_BV, float("-inf"))


def keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Tokens at least `p` times as likely as the likeliest (Nguyen et al. 2024)."""
    limit_B1 = logits_BV.max(dim=-1, keepdim=True).values + torch.tensor(p).log().to(logits_BV)
    return logits_BV.masked_fill(logits_BV < limit_B1, float("-inf"))


def noise_words(row_keys_B: np.ndarray, positions_B: np.ndarray) -> np.ndarray:
    """One 64-bit word for each (key of the row, position of the sampled token); uint64 [B]."""
    with np.errstate(over="ignore"):  # wrapping around is the arithmetic that is meant
        steps_B = positions_B.astype(np.uint64) * np.uint64(keyed.GOLDEN)
        return keyed.mix64(row_keys_B.astype(np.uint64) + steps_B)


def gumbel(seed_key: int, words_B: np.ndarray, like_BV: Tensor) -> Tensor:
    """Standard Gumbel noise, fp32, of the shape of `like_BV`; element (b, v) depends on (seed_key, word b, v)
    only.

    `keyed.uniform_at` has 24 bits, too coarse near 0 for tokens of probability 1e-7 and below; one more draw
    for the row fills the gap between its steps, so that every token alone has the exact distribution.
    """
    words_B1 = torch.from_numpy(words_B.view(np.int64)).to(like_BV.device)[:, None]
    ids_V = torch.arange(like_BV.shape[-1], device=like_BV.device)
    coarse_BV = keyed.uniform_at(seed_key, words_B1 + ids_V)
    fine_B1 = keyed.uniform_at(seed_key, words_B1 - 1) - 0.5
    uniform_BV = (coarse_BV + fine_B1 * RESOLUTION).clamp(max=1.0 - RESOLUTION)
    return -torch.log(-torch.log1p(-uniform_BV))
