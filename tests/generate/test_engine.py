"""Decoding with a cache, in batches, against one full forward per token."""

import pytest
import torch
from generate_parts import VOCAB, by_full_forwards, prompts, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.generate import engine
from trainer.generate.engine import Generator
from trainer.generate.sampling import SamplingConfig
from trainer.model.config import RopeScaling

GREEDY = SamplingConfig(max_new_tokens=20, temperature=0)
DRAWN = SamplingConfig(max_new_tokens=20, temperature=0.9, top_k=30, top_p=0.95)
VARIANTS = {
    "gqa": {},
    "qwen": {"qk_norm": True, "qkv_bias": True, "tie_embeddings": True},
    "window": {"sliding_window": 7},
    "llama3 rope": {"rope_scaling": RopeScaling(factor=4.0, original_max_seq_len=32)},
    "mha": {"num_kv_heads": 4, "head_dim": 16},
    "flex": {"attention": "flex"},
}


@pytest.fixture(scope="module")
def model():
    return tiny()


def close(a: list[float], b: list[float]) -> None:
    assert torch.tensor(a).sub(torch.tensor(b)).abs().max().item() < 2e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_equals_a_full_forward_for_every_token(variant, sampling, monkeypatch):
    monkeypatch.setattr(engine, "SLOT_STEP", 8)  # rows cross its steps at different times
    model = tiny(**VARIANTS[variant])
    asked = prompts(9)
    keys = [(5, "row", row) for row in range(9)]
    fast = Generator(model, eos_ids=[]).generate(asked, sampling, seed=4, keys=keys)
    for prompt, key, done in zip(asked, keys, fast):
        slow = by_full_forwards(model, prompt, sampling, 4, key)
        assert done.ids == slow.ids
        assert done.stop_reason == slow.stop_reason == "length"
        close(done.logprobs, slow.logprobs)
        close(done.sampling_logprobs, slow.sampling_logprobs)


def test_logprobs_are_those_of_the_training_forward(model):
    """What a policy gradient divides by: the same number from both sides."""
    asked = prompts(6)
    for prompt, done in zip(asked, Generator(model, eos_ids=[]).generate(asked, DRAWN, seed=1)):
        ids = torch.tensor([prompt + done.ids])
        nll_BT = model(ids[:, :-1], targets_BT=ids[:, 1:], reduction="none")
        close(done.logprobs, (-nll_BT[0, len(prompt) - 1 :]).tolist())


STOPPED = SamplingConfig(max_new_tokens=12, stop_ids=[3, 8, 20, 33, 40])  # rows finish at different times


@pytest.fixture(scope="module")
def alone(model):
    one = Generator(model, eos_ids=[])
    return [one.generate([prompt], STOPPED, seed=2, keys=[(i,)])[0] for i, prompt in enumerate(prompts(16))]


@settings(max_examples=30, deadline=None)
@given(
    order=st.permutations(range(16)),
    count=st.integers(1, 16),
    max_batch=st.integers(1, 17),
    prefill_tokens=st.sampled_from([1, 50, 10_000]),
)
def test_company_changes_nothing(model, alone, order, count, max_batch, prefill_tokens):
    asked = prompts(16)
    assert len({len(done.ids) for done in alone}) > 3
    generator = Generator(model, eos_ids=[], max_batch=max_batch, prefill_tokens=prefill_tokens)
    rows = order[:count]
    together = generator.generate([asked[i] for i in rows], STOPPED, seed=2, keys=[(i,) for i in rows])
    for i, done in zip(rows, together):
        assert (done.ids, done.stop_reason) == (alone[i].ids, alone[i].stop_reason)
        close(done.logprobs, alone[i].logprobs)


def test_cost_follows_live_rows(model):
    """Finished rows are not computed any more, and waiting prompts take their place."""
    fed: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(args[0].numel()) if args[0].shape[1] == 1 else None,
        with_kwargs=True,
    )
    asked = [[1 + row, 2, 3] for row in range(24)]
    sampling = SamplingConfig(max_new_tokens=30, stop_ids=list(range(0, VOCAB, 5)))
    done = Generator(model, eos_ids=[], max_batch=8).generate(asked, sampling, seed=0)
    handle.remove()
    assert sum(fed) == sum(len(row.ids) - 1 for row in done)  # the first token comes from the prefill
    assert max(fed) <= 8
    assert len({len(row.ids) for row in done}) > 5


def test_stop_reasons(model):
    prompt = prompts(3)[2]
    generator = Generator(model, eos_ids=[])
    free = generator.generate([prompt], GREEDY, seed=0)[0].ids
    third = free[2]
    first = free.index(third)
    for stopping in (
        Generator(model, eos_ids=[60, third]).generate([prompt], GREEDY, seed=0)[0],
        generator.generate([prompt], SamplingConfig(20, 0, stop_ids=[third]), seed=0)[0],
    ):
        assert stopping.ids == free[: first + 1]  # the stop id was sampled, so it is there
        assert len(stopping.logprobs) == len(stopping.sampling_logprobs) == first + 1
        assert stopping.stop_reason == "stop"
    going = SamplingConfig(20, 0, ignore_eos=True)
    assert Generator(model, eos_ids=[third]).generate([prompt], going, seed=0)[0].ids == free
    long = SamplingConfig(max_new_tokens=500, temperature=0)
    full = generator.generate([prompt, [1]], long, seed=0)
    assert [len(full[0].ids) + len(prompt), len(full[1].ids) + 1] == [96, 96]
    assert {row.stop_reason for row in full} == {"context"}
    exact = SamplingConfig(max_new_tokens=96 - len(prompt), temperature=0)
    assert generator.generate([prompt], exact, seed=0)[0].stop_reason == "length"
    assert len(generator.generate([[2] * 95], long, seed=0)[0].ids) == 1


def test_keys_name_the_noise(model):
    generator, prompt = Generator(model, eos_ids=[]), prompts(1)[0]
    drawn = SamplingConfig(max_new_tokens=20)
    by_index = generator.generate([prompt, prompt], drawn, seed=6)
    by_key = generator.generate([prompt, prompt], drawn, seed=6, keys=[(1,), (0,)])
    assert [row.ids for row in by_index] == [row.ids for row in reversed(by_key)]
    assert by_index[0].ids != by_index[1].ids
    assert generator.generate([prompt], drawn, seed=7)[0].ids != by_index[0].ids


def test_tokens_are_told_as_they_come(model):
    told: dict[int, list[tuple[int, float]]] = {row: [] for row in range(5)}
    done = Generator(model, eos_ids=[], max_batch=2).generate(
        prompts(5), DRAWN, seed=0, on_token=lambda row, token, logprob: told[row].append((token, logprob))
    )
    assert [list(zip(row.ids, row.logprobs)) for row in done] == [told[row] for row in range(5)]


def test_the_model_can_train_afterwards(model):
    assert model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Generator(model, eos_ids=[]).generate(prompts(3), DRAWN, seed=0)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    tokens = torch.tensor([[1, 2, 3, 4]])
    model(tokens[:, :-1], targets_BT=tokens[:, 1:]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


def test_next_logits(model):
    prompt = prompts(2)[1]
    torch.testing.assert_close(
        Generator(model, eos_ids=[]).next_logits(prompt), model(torch.tensor([prompt])).detach()[0, -1]
    )


def test_low_precision_weights_keep_a_cache_of_their_kind():
    model = tiny().bfloat16()
    done = Generator(model, eos_ids=[]).generate(prompts(4), DRAWN, seed=0)
    assert [len(row.ids) for row in done] == [20] * 4
    assert done[0].ids == Generator(model, eos_ids=[]).generate(prompts(1), DRAWN, seed=0)[0].ids


def test_nothing_asked_nothing_done(model):
    assert Generator(model, eos_ids=[]).generate([], GREEDY, seed=0) == []


def test_mistakes(model):
    generator = Generator(model, eos_ids=[])
    with pytest.raises(UserError, match="prompt 1 has 96 tokens, but the model's context is 96"):
        generator.generate([[1], [1] * 96], GREEDY, seed=0)
    with pytest.raises(UserError, match="temperature"):
        generator.generate([[1]], SamplingConfig(temperature=-1), seed=0)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generator.generate([[]], GREEDY, seed=0)
    with pytest.raises(ValueError, match="outside of 0"):
        generator.generate([[61]], GREEDY, seed=0)
    with pytest.raises(ValueError, match="2 keys for 1 prompts"):
        generator.generate([[1]], GREEDY, seed=0, keys=[(1,), (2,)])
    with pytest.raises(ValueError, match="tokenizer"):
        generator.generate([[1]], SamplingConfig(stop_strings=["a"]), seed=0)


def test_a_broken_checkpoint_is_not_sampled_from():
    model = tiny()
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="not numbers"):
        Generator(model, eos_ids=[]).generate([[1, 2]], DRAWN, seed=0)
