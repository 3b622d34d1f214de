"""One optimizer update, the same number on every back end.

`Engine.train_step` is the whole contract of training: count the supervised items of the step over all ranks
and all micro-batches, let the back end accumulate gradients of `loss / count`, clip, update. Nobody else
divides: a loss function returns sums, back-end averaging is turned off (FSDP2) or undone (DeepSpeed), so
loss and gradient do not depend on how the samples were split over ranks and micro-batches.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engine.config import EngineConfig
from trainer.engine.optim import set_updates_done, updates_done
from trainer.engine.ranges import FlatRange
from trainer.engine.schedule import OptimConfig
from trainer.engine.world import World
from trainer.model.config import ModelConfig
from trainer.model.init import init_range


@dataclass
class LossSum:
    """What a stage's loss function returns: sums over supervised items, never a mean.

    `total`: scalar with a gradient. `metrics`: further scalar sums (detached), added up over micro-batches
    and ranks.
    """

    total: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Micro(Protocol):
    """A micro-batch: whatever the stage's loss understands, plus what the engine must know beforehand."""

    num_items: int  # supervised items in it; the denominator is their sum over the whole step
    rows_hash: int  # order-free hash of its rows, so that equal global batches can be recognised in any split


LossFunction = Callable[[nn.Module, Any], LossSum]
Accept = Callable[[float, float], bool]  # (loss, gradient norm before clipping) -> is this step good?


def finite(loss: float, grad_norm: float) -> bool:
    """The least that a step must be."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


@dataclass(frozen=True)
class StepResult:
    """One update, in numbers that are equal on every rank.

    `loss`: mean over all supervised items. `grad_norm`: global 2-norm before clipping (inf if it was not
    finite). `skipped`: the update was left out. `sums`: the loss function's metrics summed over the step.
    `seconds`: where this rank's time went.
    """

    loss: float
    grad_norm: float
    num_items: int
    skipped: bool
    batch_hash: str
    sums: dict[str, float]
    seconds: dict[str, float]


class Engine(ABC):
    """What both back ends share. A back end builds the sharded model and its optimizer and fills in the
    abstract part.
    """

    model: nn.Module  # called as model(tokens, ...); what the loss function gets
    optimizer: torch.optim.Optimizer  # the AdamW that holds the moments

    def __init__(self, model_config: ModelConfig, config: EngineConfig, optim: OptimConfig, world: World):
        self.model_config = model_config
        self.config = config
        self.optim = optim
        self.world = world
        self.on_phase: Callable[[str], None] = lambda phase: None  # told what this rank is about to do

    # What a back end must say
    # ------------------------------------------------------------------------------------

    @abstractmethod
    def _backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of `loss`, summed (not averaged) over ranks. `last`: of this step."""

    @abstractmethod
    def _update(self, lr: float, agree: Callable[[float], bool]) -> float:
        """Clip and apply the accumulated gradient if `agree(norm before clipping)`, then drop it. Returns
        that norm, inf if it was not finite.

        `agree` is a collective: it must be called on every rank or, when all ranks know that the gradient is
        not finite, on none.
        """

    @abstractmethod
    def shards(self, moments: bool = True) -> dict[str, FlatRange]:
        """This rank's ranges of the fp32 master weights (`NAME/param`) and moments (`NAME/exp_avg` ...)."""

    @property
    def replica(self) -> tuple[int, int]:
        """(index, count): which of how many equal copies of its ranges this rank holds."""
        return 0, 1

    def ranges_to_save(self) -> dict[str, FlatRange]:
        """What this rank writes into a checkpoint: of equal copies each holder takes an equal part, so all
        write at once and nobody stages what another one writes.
        """
        index, count = self.replica
        found = {}
        for name, shard in self.shards().items():
            size = shard.local.numel()
            begin, end = index * size // count, (index + 1) * size // count
            found[name] = FlatRange(shard.local[begin:end], shard.start + begin, shard.whole_shape)
        return found

    @abstractmethod
    def load_shards(self, shards: dict[str, FlatRange]) -> None:
        """Take over ranges that were filled from a checkpoint, and refresh every copy made from them."""

    @abstractmethod
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Unsharded fp32 master weights one by one, same order on every rank. Collective: exhaust it on
        every rank.
        """

    # What all share
    # ----------------------------------------------------------------------------------------------

    def train_step(
        self, micros: Sequence[Micro], loss: LossFunction, lr: float, accept: Accept = finite
    ) -> StepResult:
        """One optimizer update from this rank's micro-batches (equally many on every rank).

        A step that `accept` refuses on any rank is skipped on all: the ranks vote between the gradient norm
        and the update. A non-finite loss makes its own gradient NaN and the norm is global, so a step that is
        not finite anywhere is never accepted.
        """
        started = time.perf_counter()
        counted = self.world.sum_words(
            [sum(m.num_items for m in micros), sum(m.rows_hash for m in micros) % (1 << 64)]
        )
        num_items, batch_hash = counted
        scale = 1.0 / max(num_items, 1)  # a step without a supervised token has a gradient of exactly zero
        self.model.train()
        sums: dict[str, Tensor] = {}
        for index, micro in enumerate(micros):
            self.on_phase("forward")
            result = loss(self.model, micro)
            poison = result.total.detach() * 0.0  # 0, or NaN where the loss is inf or NaN
            self.on_phase("backward")
            self._backward(result.total * (scale + poison), last=index == len(micros) - 1)
            _accumulate(sums, {"loss": result.total.detach(), **result.metrics})
        totals = self._reduce(sums)
        mean = totals.pop("loss") * scale
        backward_done = time.perf_counter()
        self.on_phase("optimizer")
        skipped = True

        def agree(norm: float) -> bool:
            nonlocal skipped
            skipped = bool(self.world.agree(0 if finite(mean, norm) and accept(mean, norm) else 1))
            return not skipped

        grad_norm = self._update(lr, agree)
        seconds = {
            "forward_backward": backward_done - started,
            "optimizer": time.perf_counter() - backward_done,
        }
        return StepResult(mean, grad_norm, num_items, skipped, f"{batch_hash:016x}", totals, seconds)

    @torch.no_grad()
    def evaluate(self, micros: Sequence[Micro], loss: LossFunction) -> dict[str, float]:
        """Sums over all ranks of `loss`, `items` and the loss function's metrics; no gradient, no update.

        Every rank must bring equally many micro-batches (pad with rows of zero weight): each forward is a
        collective.
        """
        self.model.eval()
        sums: dict[str, Tensor] = {"loss": torch.zeros((), device=self.world.device)}
        for micro in micros:
            self.on_phase("eval")
            result = loss(self.model, micro)
            _accumulate(sums, {"loss": result.total, **result.metrics})
        self.model.train()
        (num_items,) = self.world.sum_words([sum(m.num_items for m in micros)])
        return {**self._reduce(sums), "items": float(num_items)}

    @torch.no_grad()
    def no_grad(self, function: Callable[[nn.Module, Any], Any], micro: Micro) -> Any:
        """`function(model, micro)` in evaluation mode on every rank: to look, not to train."""
        self.model.eval()
        result = function(self.model, micro)
        self.model.train()
        return result

    def _reduce(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sum over ranks in fp64, in one collective; the same keys on every rank."""
        box = torch.stack([value.to(torch.float64) for value in sums.values()])
        dist.all_reduce(box)
        return dict(zip(sums, box.tolist(), strict=True))

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def initialise(self, seed: int) -> None:
        """Fresh weights, each element a function of (seed, name, index) alone: no sharding changes them."""
        shards = self.shards(moments=False)
        for name, shard in shards.items():
            shard.local.copy_(
                init_range(
                    self.model_config, name.removesuffix("/param"), shard.whole_shape, shard.start,
                    shard.local.numel(), seed, shard.local.device,
                )
            )  # fmt: skip
        self.load_shards(shards)

    def load_weights(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Weights by name from another model (a checkpoint's, Hugging Face's); moments and counters stay
        fresh.

        Raises:
            ValueError: a name is missing, unknown, or of another shape.
        """
        shards = self.shards(moments=False)
        missing = set(shards)
        for name, tensor in tensors:
            shard = shards.get(f"{name}/param")
            if shard is None:
                raise ValueError(f"weights hold {name}, which this model does not have")
            if tuple(tensor.shape) != tuple(shard.whole_shape):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} there, {tuple(shard.whole_shape)} in this model"
                )
            shard.local.copy_(tensor.flatten()[shard.start : shard.start + shard.local.numel()])
            missing.discard(f"{name}/param")
        if missing:
            raise ValueError(
                f"weights lack {sorted(missing)[0].removesuffix('/param')} (and {len(missing) - 1} more)"
            )
        self.load_shards(shards)

    @property
    def updates(self) -> int:
        """Updates that AdamW has made (skipped steps do not count): its bias correction needs the number."""
        return updates_done(self.optimizer)

    @updates.setter
    def updates(self, count: int) -> None:
        set_updates_done(self.optimizer, count)

    def agree(self, word: int) -> int:
        """Bitwise OR of `word` over all ranks; call it once per step on every rank."""
        return self.world.agree(word)

    @abstractmethod
    def close(self) -> None:
        """Let go of what outlives the object: hooks and buffers of a library."""


def _accumulate(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value.double() if name in sums else value.double()
