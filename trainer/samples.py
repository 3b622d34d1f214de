"""Text that the model writes while it learns, from fixed prompts with fixed noise: only weights differ."""

from typing import Any

import torch

from trainer.chat.tokenizer import Tokenizer
from trainer.config import StageConfig
from trainer.engine.engine import Engine
from trainer.generate.engine import Generator
from trainer.model.transformer import Transformer


def write_samples(engine: Engine, config: StageConfig, tokenizer: Tokenizer) -> list[dict[str, Any]] | None:
    """A row for each prompt on rank 0, [] on the others; None if the logits are not finite. Collective.

    Rank 0 gets a whole copy of the weights, tensor by tensor, and writes; the others only take part in the
    gathers.
    """
    world = engine.world
    copy: Transformer | None = None
    parameters: dict[str, torch.Tensor] = {}
    if world.is_main:
        with torch.device("meta"):
            copy = Transformer(config.model)
        copy = copy.to(config.engine.compute_dtype(world.device)).to_empty(device=world.device).eval()
        parameters = dict(copy.named_parameters())
    for name, tensor in engine.full_tensors():
        engine.on_phase("sample")
        if name in parameters:
            parameters[name].detach().copy_(tensor)
    if copy is None:
        return []
    sample = config.sample
    prompts = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in sample.prompts]
    keys = [("sample", index) for index in range(len(prompts))]
    generator = Generator(copy, eos_ids=tokenizer.eos_ids, tokenizer=tokenizer)
    try:
        written = generator.generate(
            prompts,
            sample.sampling(),
            seed=config.seed,
            keys=keys,
            on_token=lambda *_: engine.on_phase("sample"),
        )
    except FloatingPointError:  # training says so by itself; a sample must not end it
        return None
    return [{"prompt": p, "completion": tokenizer.decode(c.ids)} for p, c in zip(sample.prompts, written)]
