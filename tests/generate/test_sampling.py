"""Truncation against `transformers`, frequencies against probabilities, noise against its keys."""

import math

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trainer import keyed
from trainer.errors import UserError
from trainer.generate.sampling import (
    SamplingConfig,
    gumbel,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    noise_words,
    sample,
    truncate,
)

LOGITS = keyed.normal(keyed.key("logits"), 0, 64 * 301).view(64, 301) * 3


def words(count: int, start: int = 0) -> np.ndarray:
    keys = np.full(count, keyed.key("row"), dtype=np.uint64)
    return noise_words(keys, np.arange(start, start + count))


@pytest.mark.parametrize("k", [1, 2, 50, 300, 301, 5000])
def test_top_k_equals_transformers(k):
    assert torch.equal(keep_top_k(LOGITS, k), TopKLogitsWarper(k)(None, LOGITS))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers(p):
    assert torch.equal(keep_top_p(LOGITS, p), TopPLogitsWarper(p)(None, LOGITS))


@pytest.mark.parametrize("p", [1e-6, 0.01, 0.3, 1.0])
def test_min_p_equals_transformers(p):
    assert torch.equal(keep_min_p(LOGITS, p), MinPLogitsWarper(p)(None, LOGITS))


def test_truncations_follow_one_another():
    config = SamplingConfig(top_k=20, top_p=0.8, min_p=0.05)
    expected = MinPLogitsWarper(0.05)(None, TopPLogitsWarper(0.8)(None, TopKLogitsWarper(20)(None, LOGITS)))
    assert torch.equal(truncate(LOGITS, config), expected)


def test_the_likeliest_token_always_stays():
    flat = torch.zeros(1, 7)
    assert int((keep_top_p(flat, 1e-9) > -math.inf).sum()) == 1
    assert int((keep_min_p(flat, 1.0) > -math.inf).sum()) == 7
    assert int((keep_top_k(flat, 1) > -math.inf).sum()) == 7  # all tie with the first: none is worse


def test_greedy_is_the_lowest_of_the_likeliest_and_certain():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    drawn = sample(logits, SamplingConfig(temperature=0, top_k=1, top_p=0.1), 1, words(1))
    assert drawn.token_B.tolist() == [1]
    assert drawn.sampling_logprob_B.tolist() == [0.0]
    assert drawn.logprob_B.item() == pytest.approx(torch.log_softmax(logits, -1)[0, 1].item())


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(), SamplingConfig(temperature=2.0), SamplingConfig(temperature=0.7, top_k=5, top_p=0.9)],
)
def test_tokens_come_as_often_as_their_probability_says(config):
    """40,000 draws of one distribution; every count within 5 standard deviations, forbidden tokens never."""
    count, logits = 40_000, LOGITS[:1, :12]
    drawn = sample(logits.expand(count, -1), config, keyed.key(9, "gumbel"), words(count))
    probs = torch.softmax(truncate(logits / config.temperature, config), -1)
    observed = torch.bincount(drawn.token_B, minlength=12).float()
    sigma = (count * probs[0] * (1 - probs[0])).sqrt()
    assert ((observed - count * probs[0]).abs() <= 5 * sigma + 1e-3).all()
    assert (observed[probs[0] == 0] == 0).all()


def test_the_two_logprobs():
    config = SamplingConfig(temperature=0.5, top_k=10)
    drawn = sample(LOGITS, config, 5, words(64))
    row = torch.arange(64)
    assert torch.equal(drawn.logprob_B, torch.log_softmax(LOGITS, -1)[row, drawn.token_B])
    limited = torch.log_softmax(TopKLogitsWarper(10)(None, LOGITS / 0.5), -1)
    torch.testing.assert_close(drawn.sampling_logprob_B, limited[row, drawn.token_B])
    plain = sample(LOGITS, SamplingConfig(), 5, words(64))
    assert torch.equal(plain.logprob_B, plain.sampling_logprob_B)


def test_noise_of_a_row_does_not_depend_on_its_company():
    together = gumbel(7, words(64), LOGITS)
    for row in (0, 13, 63):
        assert torch.equal(together[row : row + 1], gumbel(7, words(1, start=row), LOGITS[:1]))


def test_noise_is_standard_gumbel_and_differs_by_seed_key_and_position():
    noise = gumbel(7, words(4000), torch.empty(4000, 250)).double()
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=0.006)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)
    others = [
        gumbel(8, words(4000), torch.empty(4000, 250)),
        gumbel(7, words(4000, start=1), torch.empty(4000, 250)),
        gumbel(7, noise_words(np.full(4000, 5, dtype=np.uint64), np.arange(4000)), torch.empty(4000, 250)),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.double().flatten()]))[0, 1]
        assert abs(correlation) < 0.005


def test_rare_tokens_are_neither_lost_nor_favoured():
    """Draws have 24 bits; below 1e-5 they would fall on some 170 values, were the gaps between not filled."""
    noise = gumbel(7, words(3000), torch.empty(3000, 4000))
    exponential = torch.exp(-noise)  # standard, if the noise is Gumbel
    for level in (1e-4, 1e-5):
        rare = exponential[exponential < level]
        expected = noise.numel() * level
        assert abs(len(rare) - expected) < 5 * expected**0.5
    assert len(rare.unique()) == len(rare)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"stop_ids": [3, -1]}, "stop_ids"),
        ({"stop_strings": ["a", ""]}, "stop_strings"),
    ],
)
def test_wrong_values_are_named(changes, key):
    with pytest.raises(UserError, match=key):
        SamplingConfig(**changes).validate()
    SamplingConfig().validate()
