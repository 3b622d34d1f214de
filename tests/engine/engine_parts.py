"""A small model, ragged batches with masked tokens, and a plain single-process loop to compare every engine
with.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.engine.build import build_engine
from trainer.engine.config import EngineConfig
from trainer.engine.engine import Engine, LossSum
from trainer.engine.schedule import OptimConfig
from trainer.engine.world import World
from trainer.model.config import ModelConfig
from trainer.model.init import init_weights
from trainer.model.transformer import IGNORE, Transformer

SEQUENCES, LENGTH, VOCAB = 12, 48, 256
OPTIM = OptimConfig(lr=1e-3, max_grad_norm=0.3)  # below the norms seen, so that clipping is active


@dataclass
class Piece:
    tokens_BT: Tensor
    targets_BT: Tensor
    num_items: int
    rows_hash: int


@dataclass
class Case:
    """One cell of the matrix. `split`: rows of a micro-batch."""

    kind: str = "fsdp"
    split: int = 2
    steps: int = 4
    tied: bool = True
    vocab: int = VOCAB
    options: dict[str, Any] = field(default_factory=dict)


def model_config(tied: bool = True, vocab: int = VOCAB) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=64,
        max_seq_len=64,
        tie_embeddings=tied,
        loss_chunk_tokens=64,
    )


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Rows of unequal numbers of supervised tokens; the first three rows of even steps have none at all."""
    generator = torch.Generator().manual_seed(step)
    window = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
    targets = window[:, 1:].clone()
    for row in range(SEQUENCES):
        targets[row, : 3 * row] = IGNORE
    if step % 2 == 0:
        targets[:6] = IGNORE  # on 2 ranks, rank 0 has no supervised token
    return window[:, :-1].contiguous(), targets


def pieces(step: int, rank: int, world: int, split: int) -> list[Piece]:
    tokens, targets = global_batch(step)
    mine = slice(rank * SEQUENCES // world, (rank + 1) * SEQUENCES // world)
    found = []
    for a, b in zip(tokens[mine].split(split), targets[mine].split(split)):
        found.append(Piece(a, b, int((b != IGNORE).sum()), hash(tuple(a.flatten().tolist())) % (1 << 64)))
    return found


def loss(model: Any, piece: Piece) -> LossSum:
    return LossSum(
        model(piece.tokens_BT, targets_BT=piece.targets_BT),
        {"rows": torch.tensor(float(len(piece.tokens_BT)))},
    )


def make(world: World, case: Case, seed: int = 0) -> Engine:
    options = {"persistence_threshold": 0, "device": "cpu", **case.options}
    return build_engine(
        model_config(case.tied, case.vocab), EngineConfig(kind=case.kind, **options), OPTIM, world, seed
    )


def steps(engine: Engine, world: World, case: Case, first: int, count: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of `count` updates."""
    curve = []
    for step in range(first, first + count):
        result = engine.train_step(pieces(step, world.rank, world.size, case.split), loss, OPTIM.lr)
        assert result.sums["rows"] == SEQUENCES
        curve.append((result.loss, result.grad_norm))
    return curve


def plain_loop(
    count: int, tied: bool = True, dtype: torch.dtype = torch.float32
) -> list[tuple[float, float]]:
    """The reference: one process, the whole batch at once, torch's own loss, clipping and AdamW. No
    engine.
    """
    assert dtype == torch.float32
    model = Transformer(model_config(tied))
    init_weights(model, 0)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": OPTIM.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    curve = []
    for step in range(count):
        tokens, targets = global_batch(step)
        logits = model(tokens)
        value = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE
        )
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((value.item(), norm.item()))
    return curve


def assert_close(
    one: list[tuple[float, float]], other: list[tuple[float, float]], relative: float = 1e-5
) -> None:
    assert len(one) == len(other)
    for step, (a, b) in enumerate(zip(one, other)):
        for name, x, y in zip(("loss", "gradient norm"), a, b):
            assert abs(x - y) <= relative * abs(y), f"step {step}: {name} {x} is not {y}"
