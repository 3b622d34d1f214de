"""Speed of the model against a bare one, in one process and interleaved: read the ratios, not the absolute
numbers.

    OMP_NUM_THREADS=2 python -m tests.bench.bench_model [step] [head] [attention]

`step`: a training step (forward, backward, AdamW) of 4 layers, width 256, vocabulary 4,096, 8 sequences of
512 tokens, against a minimal model with fused projections, compiled as a whole, with full logits.
`head`: the chunked loss against F.cross_entropy over full logits, by chunk size.
`attention`: grouped heads as they are against repeating them.
Times are the best of the rounds, for other processes can only make a run slower; on one thread, CPU time.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.attention import attend
from trainer.model.config import ModelConfig
from trainer.model.flops import peak_flops, train_flops_per_token
from trainer.model.init import init_weights
from trainer.model.loss import linear_cross_entropy, linear_cross_entropy_sum
from trainer.model.transformer import Transformer

SHAPE = {"vocab_size": 4096, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4}
CONFIG = ModelConfig(**SHAPE, intermediate_size=688)
BATCH, LENGTH = 8, 512


class BareBlock(nn.Module):
    """The same arithmetic with fewer, larger matrix products and no options."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads = c.num_heads
        self.norm1, self.norm2 = nn.RMSNorm(c.hidden_size), nn.RMSNorm(c.hidden_size)
        self.q, self.o = (nn.Linear(c.hidden_size, c.hidden_size, bias=False) for _ in range(2))
        self.kv = nn.Linear(c.hidden_size, 2 * c.hidden_size, bias=False)
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def turn(a: Tensor) -> Tensor:
            first, second = a.chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        y = self.norm1(x)
        q = self.q(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Bare(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.width = c.head_size
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList([BareBlock(c) for _ in range(c.num_layers)])
        self.norm = nn.RMSNorm(c.hidden_size)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        frequency = 10000.0 ** (-torch.arange(0, self.width, 2) / self.width)
        angle = torch.outer(torch.arange(tokens.shape[1]), frequency)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, angle.cos(), angle.sin())
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def best_of(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest call of each; the runs take turns, so that all meet the same disturbance."""
    for run in runs.values():
        run()
        run()
    best = dict.fromkeys(runs, float("inf"))
    # CPU time is the better clock on a busy machine, but several threads also count waiting for each other.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(rounds):
        for name, run in runs.items():
            begin = clock()
            run()
            best[name] = min(best[name], clock() - begin)
    return best


def show(title: str, best: dict[str, float], reference: str, unit: float, unit_name: str) -> None:
    print(f"\n{title}")
    for name, seconds in best.items():
        ratio = best[reference] / seconds
        speed = f"{seconds * 1e3:8.1f} ms {unit / seconds:12,.0f} {unit_name}"
        print(f"  {name:28s} {speed}   {ratio:5.2f} x {reference}")


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_step(rounds: int = 12) -> None:
    tokens = torch.randint(0, CONFIG.vocab_size, (BATCH, LENGTH))
    targets = tokens.roll(-1, 1)

    def bare(compiled: bool) -> Callable[[], None]:
        model = Bare(CONFIG)
        forward = torch.compile(model) if compiled else model
        return training_step(model, lambda: forward(tokens, targets))

    def ours(compiled: bool) -> Callable[[], None]:
        model = Transformer(CONFIG)
        init_weights(model, 0)
        if compiled:
            for block in model.blocks:
                block.compile()
        return training_step(model, lambda: model(tokens, targets_BT=targets) / tokens.numel())

    runs = {"bare, eager": bare(False), "ours, eager": ours(False)}
    runs |= {"bare, compiled whole": bare(True), "ours, compiled per block": ours(True)}
    best = best_of(runs, rounds)
    title = f"training step, fp32, {torch.get_num_threads()} threads, {BATCH} x {LENGTH} tokens"
    show(title, best, "bare, compiled whole", tokens.numel(), "tokens/s")
    peak = peak_flops("cpu", torch.float32) or float("nan")
    work = {name: train_flops_per_token(CONFIG, LENGTH, name) for name in ("full", "causal")}
    speed = tokens.numel() / best["ours, compiled per block"]
    print(
        f"  MFU of {peak / 1e9:.0f} GFLOP/s matmul peak: "
        + ", ".join(f"{v * speed / peak:.2f} ({k})" for k, v in work.items())
    )


def bench_head() -> None:
    for tokens, width, vocabulary in ((4096, 256, 4096), (2048, 512, 32000)):
        bench_one_head(tokens, width, vocabulary)


def bench_one_head(tokens: int, width: int, vocabulary: int, rounds: int = 7) -> None:
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) * 0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))

    def summed(chunk: int) -> None:
        linear_cross_entropy_sum(hidden, weight, targets, chunk).backward()

    def by_token(chunk: int) -> None:
        linear_cross_entropy(hidden, weight, targets, chunk).sum().backward()

    runs: dict[str, Callable[[], object]] = {
        "full logits": lambda: F.cross_entropy(hidden @ weight.t(), targets, reduction="sum").backward(),
        "token losses, chunk 1024": partial(by_token, 1024),
    }
    for chunk in (128, 256, 512, 1024, 2048):
        runs[f"sum, chunk {chunk}"] = partial(summed, chunk)
    compiled = torch.compile(linear_cross_entropy_sum)
    runs["sum, chunk 1024, compiled"] = lambda: compiled(hidden, weight, targets, 1024).backward()
    title = f"head, {tokens} tokens, width {width}, vocabulary {vocabulary}"
    show(title, best_of(runs, rounds), "full logits", tokens, "tokens/s")


def bench_attention(rounds: int = 9) -> None:
    q, k, v = (torch.randn(4, 512, heads, 64, requires_grad=True) for heads in (8, 2, 2))
    mask = torch.ones(512, 512, dtype=torch.bool).tril()[None, None]

    def repeated() -> Tensor:
        return attend(q, k.repeat_interleave(4, 2), v.repeat_interleave(4, 2), None)

    runs: dict[str, Callable[[], object]] = {
        "grouped as they are": lambda: attend(q, k, v, None).sum().backward(),
        "repeated": lambda: repeated().sum().backward(),
        "grouped, bool mask": lambda: attend(q, k, v, mask).sum().backward(),
    }
    show("attention, 4 x 512 tokens, 8 heads over 2", best_of(runs, rounds), "repeated", 2048, "tokens/s")


def main() -> None:
    torch.manual_seed(0)
    parts = {"step": bench_step, "head": bench_head, "attention": bench_attention}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
