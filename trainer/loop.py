"""The one training loop: step, log, evaluate, sample text, save, agree to stop. Every stage runs through it.

A stage says what a batch is and what the loss is (`Stage`); it never loops. Step s is 0-based in the code
that plans (`stage.batch(s)`, the learning rate) and counted from 1 in everything a user reads: after step n,
n updates are done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from trainer.chat.tokenizer import Tokenizer
from trainer.config import StageConfig
from trainer.engine import checkpoint, commit
from trainer.engine.engine import Engine, LossSum, Micro, StepResult
from trainer.engine.schedule import learning_rate
from trainer.errors import EXIT_STOPPED
from trainer.generate.engine import Generator
from trainer.model.flops import attention_pairs, document_lengths, peak_flops, train_flops
from trainer.model.transformer import Transformer
from trainer.observe.goodput import Goodput
from trainer.observe.loggers import Loggers
from trainer.observe.timer import StepTimer
from trainer.run import RunDirectory
from trainer.signals import NAMES, stop_requests
from trainer.stream.loader import Prefetcher

GIB = 1 << 30


class Batch(Protocol):
    """This rank's share of a global batch."""

    micros: Any  # Sequence[Micro]
    first_sample: int
    num_samples: int
    epochs: dict[str, float]


class Stage(Protocol):
    """What differs between pretraining, fine-tuning, reward models and GRPO."""

    name: str
    tokenizer: Tokenizer | None  # None: no text samples
    read_ahead: int  # threads that prepare batches; 0 where a batch depends on the weights
    notes: list[str]  # what to tell the user at the start

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


@dataclass
class Progress:
    """What the loop itself carries from step to step; it is all in the checkpoint."""

    step: int = 0  # updates done
    tokens: int = 0  # supervised tokens trained on
    skipped: int = 0  # steps whose update was dropped as not finite

    def plain(self) -> dict[str, int]:
        return {"step": self.step, "tokens": self.tokens, "skipped": self.skipped}


@dataclass
class Loop:
    """One attempt of one run. `run()` returns the exit code."""

    stage: Stage
    engine: Engine
    config: StageConfig
    run_directory: RunDirectory
    progress: Progress
    loggers: Loggers

    def __post_init__(self) -> None:
        world = self.engine.world
        self.timer = StepTimer()
        self.goodput = Goodput(
            self.run_directory.goodput_file if world.is_main else None, self.run_directory.attempt
        )
        self.saved_step = self.progress.step if self.progress.step else -1
        peak = peak_flops(world.device, self.config.engine.compute_dtype(world.device))
        self.peak = peak * world.size if peak else None

    def run(self) -> int:
        """Train to the last step, or to an agreed stop."""
        steps = self.config.steps
        if self.progress.step >= steps:
            done = self.progress.step
            self.loggers.message(
                f"{self.run_directory.path}: {done} of {steps} steps are done; raise steps to go on"
            )
            self.run_directory.mark_done(
                done
            )  # a kill between the last save and its mark must not last for ever
            return 0
        self.goodput.start()
        with stop_requests() as request, Prefetcher(self.stage.batch, self.stage.read_ahead) as batches:
            if self.progress.step == 0:
                self._log(self._look(first=True))
            stopped = 0
            while self.progress.step < steps and not stopped:
                self._step(batches)
                stopped = self.engine.agree(request.word)
                due = self.config.checkpoint.every and self.progress.step % self.config.checkpoint.every == 0
                if due or stopped:
                    self._save()
            if self.progress.step < steps:
                self.loggers.message(
                    f"stopped by {NAMES[stopped]} after step {self.progress.step} of {steps}, all saved; "
                    f"the same command goes on"
                )
                self.goodput.stop("signal")
                return EXIT_STOPPED
            self._save()
        self.run_directory.mark_done(self.progress.step)
        self.goodput.stop("done")
        return 0

    def _step(self, batches: Prefetcher[Any]) -> None:
        step = self.progress.step
        with self.timer.part("wait_data"):
            batch = batches.get(step)
        lr = learning_rate(step, self.config.steps, self.config.optim.lr, self.config.schedule)
        with self.timer.part("forward_backward"):
            result = self.engine.train_step(batch.micros, self.stage.loss, lr)
        self.timer.move("forward_backward", "optimizer", result.seconds["optimizer"])
        self.progress.step += 1
        self.progress.tokens += result.num_items
        self.progress.skipped += result.skipped
        if result.skipped:
            self.loggers.message(
                f"step {self.progress.step}: loss or gradient is not finite, update skipped "
                f"(samples {batch.first_sample}..{batch.first_sample + batch.num_samples - 1})"
            )
        metrics = self._look() | self._describe(batch, result, lr)
        parts = self.timer.finish()
        self.goodput.step(self.progress.step, parts)
        self._log(metrics | parts | self._speed(batch, result.num_items, parts["speed/step_s"]))

    def _describe(self, batch: Batch, result: StepResult, lr: float) -> dict[str, Any]:
        return {
            "train/loss": result.loss, "train/grad_norm": result.grad_norm, "train/lr": lr,
            "train/items": result.num_items, "train/skipped_steps": self.progress.skipped,
            "data/batch_hash": result.batch_hash, "data/samples": batch.first_sample + batch.num_samples,
            **{f"data/epoch/{source}": epoch for source, epoch in batch.epochs.items()},
            "run/attempt": self.run_directory.attempt, **self._memory(),
        }  # fmt: skip

    def _speed(self, batch: Batch, tokens: int, seconds: float) -> dict[str, float]:
        rate = tokens / seconds
        speed = {"speed/tokens_per_s": rate, "speed/tokens_per_s_per_device": rate / self.engine.world.size}
        # May be a collective, so outside the `if`: a rank on an unknown GPU has no peak.
        flops = self._flops(batch, tokens)
        if self.peak:
            speed["speed/mfu"] = flops / seconds / self.peak
        return speed

    def _flops(self, batch: Batch, tokens: int) -> float:
        """Model FLOPs of a step over all ranks; attention counts pairs inside masked documents."""
        config = self.config.model
        if all(micro.documents_BT is None for micro in batch.micros):
            whole = torch.full((batch.num_samples,), self.config.seq_len)
            return train_flops(config, tokens, float(attention_pairs(whole, config.sliding_window, "full")))
        lengths = torch.cat([document_lengths(micro.documents_BT) for micro in batch.micros])
        mine = int(attention_pairs(lengths, config.sliding_window, "full"))
        return train_flops(config, tokens, float(self.engine.world.sum_words([mine])[0]))

    def _memory(self) -> dict[str, float]:
        device = self.engine.world.device
        if device.type == "cuda":
            return {
                "memory/peak_allocated": torch.cuda.max_memory_allocated(device) / GIB,
                "memory/peak_reserved": torch.cuda.max_memory_reserved(device) / GIB,
            }
        import resource

        return {"memory/peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)}

    def _look(self, first: bool = False) -> dict[str, Any]:
        """Evaluate and sample if it is their turn: before the first step, every so many, and after the last
        one.
        """
        metrics: dict[str, Any] = {}
        last = self.progress.step == self.config.steps

        def due(every: int) -> bool:
            return bool(every) and (first or last or self.progress.step % every == 0)

        if due(self.config.eval.every):
            with self.timer.part("eval"):
                micros = self.stage.eval_batches()
                if micros:
                    metrics |= self.stage.eval_metrics(self.engine.evaluate(micros, self.stage.eval_loss))
            if summary := self.goodput.summary():
                metrics["run/goodput"] = summary.goodput
        if due(self.config.sample.every) and self.config.sample.prompts and self.stage.tokenizer:
            with self.timer.part("sample"):
                self._sample(self.stage.tokenizer)
        return metrics

    def _sample(self, tokenizer: Tokenizer) -> None:
        """Rank 0 gets a whole copy of the weights, tensor by tensor, and writes; the others only take part
        in the gathers.
        """
        world = self.engine.world
        copy: Transformer | None = None
        parameters: dict[str, torch.Tensor] = {}
        if world.is_main:
            with torch.device("meta"):
                copy = Transformer(self.config.model)
            dtype = self.config.engine.compute_dtype(world.device)
            copy = copy.to(dtype).to_empty(device=world.device).eval()
            parameters = dict(copy.named_parameters())
        for name, tensor in self.engine.full_tensors():
            if name in parameters:
                parameters[name].detach().copy_(tensor)
        if copy is None:
            return
        sample = self.config.sample
        prompts = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in sample.prompts]
        keys = [("sample", index) for index in range(len(prompts))]
        generator = Generator(copy, eos_ids=tokenizer.eos_ids, tokenizer=tokenizer)
        try:
            written = generator.generate(prompts, sample.sampling(), seed=self.config.seed, keys=keys)
        except (
            FloatingPointError
        ):  # weights that are not finite: training says so itself, a sample must not end it
            self.loggers.message(f"step {self.progress.step}: no text samples, the logits are not finite")
            return
        rows = [{"prompt": p, "completion": tokenizer.decode(c.ids)} for p, c in zip(sample.prompts, written)]
        self.loggers.text(self.progress.step, "samples", rows)

    def _log(self, metrics: dict[str, Any]) -> None:
        if metrics:
            with self.timer.part("log"):
                self.loggers.log(self.progress.step, self.progress.tokens, metrics)

    def _save(self) -> None:
        """After the step's log line, so that a checkpoint never stands without the metrics that led to it."""
        if self.saved_step == self.progress.step:
            return
        with self.timer.part("save"):
            extra: dict[str, Path] = {}
            if self.stage.tokenizer is not None:
                extra["tokenizer"] = self.stage.tokenizer.directory
            state = {
                **self.progress.plain(),
                "stage": self.stage.name,
                "stream": self.stage.state(self.progress.step),
            }
            self.loggers.sync()
            checkpoint.save(self.run_directory.checkpoints, self.progress.step, self.engine, state, extra)
            self.goodput.flush()
            self.saved_step = self.progress.step
            if self.engine.world.is_main:
                commit.prune(self.run_directory.checkpoints, self.config.checkpoint)


def resume(engine: Engine, path: Path | None) -> Progress:
    """Load a checkpoint of the run into the engine; none: the run begins. Collective."""
    if path is None:
        return Progress()
    state = checkpoint.load(path, engine)
    return Progress(state["step"], state["tokens"], state["skipped"])
