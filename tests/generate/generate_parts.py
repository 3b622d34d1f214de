"""A tiny model with random weights, and the slow, obvious way to continue a prompt with it."""

import torch

from trainer import keyed
from trainer.generate.engine import Completion
from trainer.generate.sampling import SamplingConfig, noise_words, sample
from trainer.model.config import ModelConfig
from trainer.model.init import init_weights
from trainer.model.transformer import Transformer

VOCAB = 61


def tiny(**changes) -> Transformer:
    """Weights large enough that the next token is neither certain nor uniform."""
    torch.set_num_threads(1)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "max_seq_len": 96,
        "init_std": 0.2,
    }
    model = Transformer(ModelConfig(**{**shape, **changes}))
    init_weights(model, seed=3)
    return model


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    """Ragged: lengths from 1 to `longest`."""
    return [
        [keyed.key("prompt", row, place) % VOCAB for place in range(1 + keyed.key("length", row) % longest)]
        for row in range(count)
    ]


@torch.inference_mode()
def by_full_forwards(
    model: Transformer, prompt: list[int], config: SamplingConfig, seed: int, key
) -> Completion:
    """No cache, no batch: the whole sequence through the model for each token."""
    done, ids = Completion(), list(prompt)
    row_key = torch.tensor([0]).numpy().astype("uint64") + keyed.key(seed, "sample", *key)
    while len(done.ids) < config.max_new_tokens and len(ids) < model.config.max_seq_len:
        logits_BV = model(torch.tensor([ids]))[:, -1]
        place = torch.tensor([len(ids)]).numpy()
        drawn = sample(logits_BV, config, keyed.key(seed, "gumbel"), noise_words(row_key, place))
        ids.append(int(drawn.token_B))
        done.ids.append(ids[-1])
        done.logprobs.append(float(drawn.logprob_B))
        done.sampling_logprobs.append(float(drawn.sampling_logprob_B))
    done.stop_reason = "length" if len(done.ids) == config.max_new_tokens else "context"
    return done
