"""What differs between pretraining, fine-tuning, reward models and GRPO: what a batch is, what the loss is.

A stage never loops and never divides; `loop.py` and the engine do. Step s is 0-based in the code that plans
(`stage.batch(s)`, the learning rate) and counted from 1 in everything a user reads: after step n, n updates
are done.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from trainer.chat.tokenizer import Tokenizer
from trainer.engine.engine import LossSum, Micro


class Batch(Protocol):
    """This rank's share of a global batch."""

    micros: Any  # Sequence[Micro]
    first_sample: int
    num_samples: int
    epochs: dict[str, float]


class Stage(Protocol):
    """Two functions, `batch` and `loss`, and what belongs to them."""

    name: str
    tokenizer: Tokenizer | None  # None: no text samples
    read_ahead: int  # threads that prepare batches; 0 where a batch depends on the weights
    notes: list[str]  # what to tell the user at the start
    quarantines: (
        bool  # damaged data is replaced instead of ending the run: ranks agree on it before each step
    )

    def batch(self, step: int) -> Batch:
        """This rank's micro-batches of a step: a pure function of (config, step) and, in RL, of the
        weights.
        """

    def loss(self, model: nn.Module, micro: Any) -> LossSum:
        """Sums over the supervised items of a micro-batch."""

    def eval_batches(self) -> Sequence[Micro]:
        """This rank's share of the held-out data, equally many micro-batches on every rank; empty: none."""

    def eval_loss(self, model: nn.Module, micro: Any) -> LossSum:
        """Sums that `eval_metrics` turns into metrics."""

    def eval_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """`val/...` from the sums over all ranks."""

    def state(self, step: int) -> dict[str, Any]:
        """JSON that a checkpoint after `step` steps keeps."""

    def check_state(self, state: dict[str, Any], step: int) -> None:
        """Raise UserError where this config would not go on as `state` was going."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what a checked state says beyond the step."""

    def new_damage(self) -> list[dict[str, Any]]:
        """Damaged blocks that this rank has found since the last call and put out of use; mostly empty."""

    def adopt_damage(self, found: list[dict[str, Any]]) -> None:
        """Put blocks out of use that another rank or an earlier attempt found."""
