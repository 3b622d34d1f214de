"""Decoding and encoding speed as ratios within one run: python tests/bench/bench_generate.py

Ratios, since absolute numbers belong to a machine. Every figure is the best of three.
"""

import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from trainer.generate.engine import Generator
from trainer.generate.sampling import SamplingConfig
from trainer.model.config import ModelConfig
from trainer.model.init import init_weights
from trainer.model.transformer import Transformer

SHAPE = ModelConfig(
    vocab_size=4096, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=4, intermediate_size=688
)
ROWS, NEW = 16, 64


def best(work: Callable[[], int]) -> float:
    """Units (tokens, bytes) per second of the fastest of three runs; `work` returns how many it did."""
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - start))
    return max(rates)


def row(name: str, value: float, unit: str, ratio: float | None = None, note: str = "") -> None:
    print(f"{name:<46}{value:>12,.1f} {unit:<10}{'' if ratio is None else f'{ratio:6.2f}x'}  {note}")


def prompts(rows: int) -> list[list[int]]:
    return [[(7 * r + 13 * t) % SHAPE.vocab_size for t in range(8 + 4 * (r % 16))] for r in range(rows)]


def bench_decoding() -> None:
    model = Transformer(SHAPE)
    init_weights(model, seed=0)
    generator = Generator(model, eos_ids=[])
    asked, greedy = prompts(ROWS), SamplingConfig(NEW, temperature=0)

    def together(config: SamplingConfig) -> Callable[[], int]:
        return lambda: sum(len(done.ids) for done in generator.generate(asked, config, seed=0))

    def one_by_one() -> int:
        return sum(len(generator.generate([prompt], greedy, seed=0)[0].ids) for prompt in asked)

    def without_cache() -> int:
        ids = torch.tensor(asked[0])[None]
        with torch.inference_mode():
            for _ in range(NEW):
                ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
        return NEW

    alone, naive, batched = best(one_by_one), best(without_cache), best(together(greedy))
    row("greedy, one prompt, no cache", naive, "tokens/s")
    row("greedy, one prompt at a time", alone, "tokens/s", alone / naive, "of no cache")
    row(
        f"greedy, {ROWS} prompts together",
        batched,
        "tokens/s",
        batched / alone,
        "of one at a time (target >= 3)",
    )
    for name, config in {
        "temperature 1": SamplingConfig(NEW),
        "temperature 0.8, top-k 50": SamplingConfig(NEW, 0.8, 50),
        "temperature 0.8, top-k 50, top-p 0.9": SamplingConfig(NEW, 0.8, 50, 0.9),
    }.items():
        rate = best(together(config))
        row(f"{name}, {ROWS} together", rate, "tokens/s", rate / batched, "of greedy")
    bench_uneven(model, greedy)
    bench_transformers(asked, batched)


def bench_uneven(model: Transformer, greedy: SamplingConfig) -> None:
    """Many prompts through few places: always full batches, against waiting for the slowest of each."""
    asked = prompts(96)
    stops = replace(SamplingConfig(4 * NEW), stop_ids=list(range(0, SHAPE.vocab_size, 50)))
    refilled = Generator(model, eos_ids=[], max_batch=ROWS)

    def continuous() -> int:
        return sum(len(done.ids) for done in refilled.generate(asked, stops, seed=0))

    def batch_by_batch() -> int:
        parts = (asked[i : i + ROWS] for i in range(0, len(asked), ROWS))
        return sum(len(done.ids) for part in parts for done in refilled.generate(part, stops, seed=0))

    slow, fast = best(batch_by_batch), best(continuous)
    row(f"96 texts of uneven length, {ROWS} by {ROWS}", slow, "tokens/s")
    row(
        f"96 texts of uneven length, {ROWS} places refilled",
        fast,
        "tokens/s",
        fast / slow,
        "of batch by batch",
    )


def bench_transformers(asked: list[list[int]], ours: float) -> None:
    """The same shape in `transformers`, its own generate(), left-padded as it wants it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        intermediate_size=SHAPE.intermediate_size,
        max_position_embeddings=SHAPE.max_seq_len,
    )
    model = LlamaForCausalLM(config).eval()
    width = max(map(len, asked))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked])
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def generate() -> int:
        return len(asked) * (model.generate(ids, attention_mask=mask, **settings).shape[1] - width)

    theirs = best(generate)
    row(
        f"transformers generate(), {ROWS} together",
        theirs,
        "tokens/s",
        ours / theirs,
        "ours to theirs, greedy",
    )


def bench_encoding() -> None:
    import tempfile

    import rustbpe
    from tokenizers import Tokenizer as HF

    from trainer.chat.save import save_tokenizer
    from trainer.chat.tokenizer import SPLIT_PATTERN

    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("torch.nn")][:150]
    texts = [inspect.getsource(module) for module in modules if getattr(module, "__file__", "")]
    size = sum(len(text.encode()) for text in texts)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), 4096, pattern=SPLIT_PATTERN)
    with tempfile.TemporaryDirectory() as directory:
        ours = save_tokenizer(directory, trainer.get_mergeable_ranks())
        hf = HF.from_file(f"{directory}/tokenizer.json")

    def by(encode: Callable[[str], object]) -> Callable[[], int]:
        def work() -> int:
            for text in texts:
                encode(text)
            return size

        return work

    theirs, fast = best(by(lambda text: hf.encode(text).ids)), best(by(ours.encode))
    row("encode with tokenizers, one thread", theirs / 1e6, "MB/s")
    row("encode with Trivium, one thread", fast / 1e6, "MB/s", fast / theirs, "of tokenizers (target >= 5)")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # weights of the transformers model; its speed does not depend on them
    bench_decoding()
    bench_encoding()


if __name__ == "__main__":
    main()
