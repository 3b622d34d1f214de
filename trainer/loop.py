"""The one training loop: step, log, evaluate, sample text, save, agree to stop. Every stage runs through it.

What a step may lead to besides its log line is decided by all ranks together, once a step: a stop, a save, a
return to the last checkpoint, a block of data put out of use. Nothing here asks which stage or engine it is.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from trainer.config import StageConfig
from trainer.engine import checkpoint, commit
from trainer.engine.engine import Engine, StepResult
from trainer.engine.saver import Saver
from trainer.engine.schedule import learning_rate
from trainer.errors import EXIT_STOPPED, EXIT_UNSTABLE, SharedError
from trainer.faults import reach
from trainer.observe.goodput import Goodput
from trainer.observe.loggers import Loggers
from trainer.observe.timer import StepTimer
from trainer.observe.watch import Watch
from trainer.run import RunDirectory
from trainer.samples import write_samples
from trainer.signals import NAMES, stop_requests
from trainer.speed import Speed, memory
from trainer.stability import Stability
from trainer.stage import Batch, Stage
from trainer.stream.loader import Prefetcher


@dataclass
class Progress:
    """What the loop itself carries from step to step; it is all in the checkpoint.

    `jumps`: (step, batches) pairs: from that step on the data is so many batches further. A return to an
    earlier checkpoint makes one, so the order of the data stays a pure function of the step.
    """

    step: int = 0  # updates done
    tokens: int = 0  # supervised tokens trained on
    skipped: int = 0  # steps whose update was left out
    jumps: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """From a checkpoint's state.json."""
        return cls(state["step"], state["tokens"], state["skipped"], state.get("jumps", []))

    def plain(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "skipped": self.skipped, "jumps": self.jumps}

    def data_step(self, step: int) -> int:
        """The number of the batch that step `step` (0-based) trains on."""
        return step + sum(batches for at, batches in self.jumps if at <= step)


@dataclass
class Loop:
    """One attempt of one run. `run()` returns the exit code."""

    stage: Stage
    engine: Engine
    config: StageConfig
    run_directory: RunDirectory
    progress: Progress
    loggers: Loggers
    stability: Stability
    watch: Watch

    def __post_init__(self) -> None:
        world = self.engine.world
        self.engine.on_phase = self.watch.enter
        self.timer = StepTimer()
        self.goodput = Goodput(
            self.run_directory.goodput_file if world.is_main else None, self.run_directory.attempt
        )
        self.saver = Saver(self.run_directory.checkpoints, self.engine, self.config.checkpoint)
        self.saved_step = self.saver.committed = self.progress.step if self.progress.step else -1
        self.speed = Speed(self.engine, self.config)
        self.events: dict[str, str] = {}  # what happened since the last log line

    def run(self) -> int:
        """Train to the last step, or to an agreed stop."""
        steps = self.config.steps
        if self.progress.step >= steps:
            done = self.progress.step
            self._tell(f"{self.run_directory.path}: {done} of {steps} steps are done; raise steps to go on")
            # a kill between the last save and its mark must not last for ever
            self.run_directory.mark_done(done)
            return 0
        end = min(steps, self.config.stop_after or steps)
        self.goodput.start()
        with stop_requests() as request, Prefetcher(self._batch, self.stage.read_ahead) as batches:
            if self.progress.step == 0:
                self._log(self._look(first=True))
            stopped = 0
            while self.progress.step < end and not stopped:
                self._step(batches)
                stopped = self.engine.agree(request.word)
                if self.stability.must_return and not stopped:
                    if not self._roll_back():
                        self.goodput.stop("unstable")
                        return EXIT_UNSTABLE
                elif stopped or self._due(self.config.checkpoint.every):
                    self._save()
        self._save(last=True)
        if self.progress.step < steps:
            self._tell(
                f"stopped by {NAMES.get(stopped, 'stop_after')} after step {self.progress.step} of {steps}, "
                f"all saved; the same command goes on"
            )
            self.goodput.stop("signal")
            return EXIT_STOPPED
        self.run_directory.mark_done(self.progress.step)
        self.goodput.stop("done")
        return 0

    # --- a step

    def _batch(self, step: int) -> Batch:
        """Called on the read-ahead threads."""
        reach("data/prefetch")
        return self.stage.batch(self.progress.data_step(step))

    def _get(self, batches: Prefetcher[Any], step: int) -> Batch:
        """The batch of a step, read anew as long as any rank finds damaged data in it: what is put out of use
        is on the disk before a batch without it is trained on, or a resumed run could read other samples.
        """
        while True:
            batch: Batch = batches.get(step)
            if not self.stage.quarantines:
                return batch
            found = self.stage.new_damage()
            if not self.engine.agree(bool(found)):
                return batch
            parts = cast(list[list[dict[str, Any]]], self.engine.world.gather(found))
            shared = [damage for part in parts for damage in part]
            self.run_directory.add_damage(shared)
            self.stage.adopt_damage(shared)
            batches.drop()
            names = ", ".join(sorted({f"{d['shard']} block {d['block']}" for d in shared}))
            self.events["event/damage"] = names
            self._tell(f"step {step + 1}: damaged data put out of use: {names}")

    def _step(self, batches: Prefetcher[Any]) -> None:
        step = self.progress.step
        self.watch.begin_step(step + 1)
        with self.timer.part("wait_data"):
            batch = self._get(batches, step)
        self.watch.batch(batch.first_sample, batch.num_samples)
        lr = learning_rate(step, self.config.steps, self.config.optim.lr, self.config.schedule)

        def accept(loss: float, norm: float) -> bool:
            return not self.stability.why_not(loss, norm)

        with self.timer.part("forward_backward"):
            result = self.engine.train_step(batch.micros, self.stage.loss, lr, accept)
        self.timer.move("forward_backward", "optimizer", result.seconds["optimizer"])
        reach("step/updated")
        self.progress.step += 1
        self.progress.tokens += result.num_items
        self._judge(batch, result)
        if (saved := self.saver.result()) is not None:
            self._note_save(saved)
        metrics = self._look() | self._describe(batch, result, lr)
        if slow := self.watch.end_step():
            self.events["event/slow"] = slow
            self._tell(f"step {self.progress.step}: {slow}")
        parts = self.timer.finish()
        self.goodput.step(self.progress.step, parts)
        self._log(metrics | parts | self.speed.metrics(batch, result.num_items, parts["speed/step_s"]))

    def _judge(self, batch: Batch, result: StepResult) -> None:
        """Take note of whether the update was made, and say why where it was not."""
        if result.skipped:
            reason = self.stability.why_not(result.loss, result.grad_norm) or "another rank refused it"
            samples = f"samples {batch.first_sample}..{batch.first_sample + batch.num_samples - 1}"
            self.progress.skipped += 1
            self.events["event/skip"] = reason
            self._tell(f"step {self.progress.step}: {reason}; update left out ({samples})")
        self.stability.record(result.loss, result.grad_norm, result.skipped)

    def _describe(self, batch: Batch, result: StepResult, lr: float) -> dict[str, Any]:
        events, self.events = self.events, {}
        return {
            "train/loss": result.loss, "train/grad_norm": result.grad_norm, "train/lr": lr,
            "train/items": result.num_items, "train/skipped_steps": self.progress.skipped,
            "train/rollbacks": self.stability.rollbacks, "data/batch_hash": result.batch_hash,
            "data/first_sample": batch.first_sample, "data/samples": batch.first_sample + batch.num_samples,
            **{f"data/epoch/{source}": epoch for source, epoch in batch.epochs.items()},
            "run/attempt": self.run_directory.attempt, **memory(self.engine.world.device), **events,
        }  # fmt: skip

    def _due(self, every: int) -> bool:
        return bool(every) and self.progress.step % every == 0

    def _look(self, first: bool = False) -> dict[str, Any]:
        """Evaluate and sample if it is their turn: before the first step, every so many, and after the last
        one.
        """
        metrics: dict[str, Any] = {}
        edge = first or self.progress.step == self.config.steps
        if self.config.eval.every and (edge or self._due(self.config.eval.every)):
            with self.timer.part("eval"):
                micros = self.stage.eval_batches()
                if micros:
                    metrics |= self.stage.eval_metrics(self.engine.evaluate(micros, self.stage.eval_loss))
            if summary := self.goodput.summary():
                metrics["run/goodput"] = summary.goodput
        tokenizer, sample = self.stage.tokenizer, self.config.sample
        if tokenizer and sample.prompts and sample.every and (edge or self._due(sample.every)):
            with self.timer.part("sample"):
                rows = write_samples(self.engine, self.config, tokenizer)
                if rows is None:
                    self._tell(f"step {self.progress.step}: no text samples, the logits are not finite")
                elif rows:
                    self.loggers.text(self.progress.step, "samples", rows)
        return metrics

    def _tell(self, text: str) -> None:
        self.loggers.message(text)

    def _log(self, metrics: dict[str, Any]) -> None:
        if metrics:
            self.engine.on_phase("log")
            with self.timer.part("log"):
                self.loggers.log(self.progress.step, self.progress.tokens, metrics)

    # --- what all ranks decide together

    def _save(self, last: bool = False) -> None:
        """Order a checkpoint; after the step's log line, so that none stands without the metrics that led to
        it. `last`: wait until it is written, and fail where it cannot be.
        """
        with self.timer.part("save"):
            self._note_save(self.saver.wait())
            if self.saved_step != self.progress.step:
                extra = {"tokenizer": self.stage.tokenizer.directory} if self.stage.tokenizer else {}
                self.saver.save(self.progress.step, self._state(), extra, self.loggers.sync)
                self.goodput.flush()
                self.saved_step = self.progress.step
            if last or not self.config.checkpoint.background:
                problem = self.saver.wait()
                if last and self.saver.committed != self.saved_step:
                    raise SharedError(problem)
                self._note_save(problem)

    def _state(self) -> dict[str, Any]:
        data_step = self.progress.data_step(self.progress.step)
        return {
            **self.progress.plain(), "stage": self.stage.name, "stream": self.stage.state(data_step),
            "stability": self.stability.state(),
        }  # fmt: skip

    def _note_save(self, problem: str) -> None:
        """A save in the background has ended, or none was under way."""
        if not problem:
            return
        if self.saver.committed != self.saved_step:
            self.saved_step = -1  # it is not there, so the next due save and the last one must not rely on it
        self.events["event/save"] = problem
        self._tell(f"step {self.progress.step}: {problem}; training goes on")

    def _roll_back(self) -> bool:
        """To the newest whole checkpoint from before the trouble, and past the batches trained on since.
        False: there is none, or it was done too often; all is told.
        """
        with self.timer.part("save"):
            self._note_save(self.saver.wait())
        now, streak, done = self.progress, self.stability.in_row, self.stability.rollbacks
        trouble = f"the last {streak} steps were left out"
        path, damaged = commit.newest_whole(
            self.run_directory.checkpoints, self.engine.world, not_after=now.step - streak
        )
        if done >= self.config.stability.rollbacks or path is None:
            why = f"after {done} returns" if path else "and there is no checkpoint to return to"
            self._tell(
                f"step {now.step}: {trouble} {why}: the run stops unsaved; look at the batches "
                f"(`trivium replay {self.run_directory.path} --step {now.step}`), lower optim.lr, or raise "
                f"stability.rollbacks"
            )
            return False
        for other, problem in damaged.items():
            self._tell(f"damaged checkpoint passed over: {problem}")
            if self.engine.world.is_main:
                commit.set_aside(other)
        if self.engine.world.is_main:  # saved during the trouble: a resume must not go on there
            commit.remove_after(self.run_directory.checkpoints, now.step - streak)
        state = checkpoint.load(path, self.engine)
        back = Progress.of(state)
        first, end = now.data_step(back.step), now.data_step(now.step)
        back.jumps = [jump for jump in now.jumps if jump[0] <= back.step] + [[back.step, end - first]]
        back.skipped = now.skipped
        self.stability.restore(state["stability"])
        self.stability.rollbacks = done + 1
        self.progress = back
        self.saved_step = self.saver.committed = back.step
        self.loggers.rewind(back.step)
        self.goodput.rewind(back.step)
        self.events["event/rollback"] = (
            f"from step {now.step} to {back.step}: batches {first}..{end - 1} left out"
        )
        self._tell(f"step {now.step}: {trouble}: back to {path.name}, past the {end - first} batches since")
        return True


def resume(engine: Engine, path: Path | None, stability: Stability) -> Progress:
    """Load a checkpoint of the run into the engine; none: the run begins. Collective."""
    if path is None:
        return Progress()
    state = checkpoint.load(path, engine)
    stability.restore(state["stability"])
    return Progress.of(state)
