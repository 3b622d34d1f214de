"""Every number a run reports, by name: unit, meaning, which stages have it. The one place where names are
decided.

W&B's `define_metric` calls, the README's table and the plots of the report are made from this table, so a
metric that is renamed is renamed everywhere, and one that is not here is refused. A name that ends in `*`
stands for a family: `data/epoch/*` allows `data/epoch/web`. The x axis of every metric is `tokens`: the
number of tokens trained on so far."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

PRETRAIN, SFT, REWARD, GRPO = "pretrain", "sft", "reward", "grpo"
STAGES = (PRETRAIN, SFT, REWARD, GRPO)
LIKELIHOOD = (PRETRAIN, SFT)  # the stages whose loss is -log p of given text
AXIS = "tokens"

Number = float | int | str  # a string only where there is nothing to plot: a hash


@dataclass(frozen=True)
class Metric:
    """One row of the table. `best`: which value of the run's history sums it up ("min", "max" or "last").
    `chart`: whether dashboards draw it (a hash has no curve)."""

    name: str
    unit: str
    meaning: str
    best: str = "last"
    stages: tuple[str, ...] = STAGES
    chart: bool = True

    @property
    def is_family(self) -> bool:
        return self.name.endswith("*")


# The parts of a step. Each second of a step belongs to exactly one of them (`StepTimer`).
PARTS = {
    "wait_data": "waiting for the next batch",
    "forward_backward": "forward and backward passes, gradient reduction included",
    "optimizer": "clipping and the optimizer update",
    "rollout": "sampling completions and scoring them",
    "eval": "evaluation",
    "sample": "writing text samples",
    "save": "what of a checkpoint the step had to wait for",
    "log": "writing metrics",
    "other": "all the rest",
}

METRICS: tuple[Metric, ...] = (
    Metric(
        "train/loss", "nats/item", "the stage's loss over all supervised items of the global batch", "min"
    ),
    Metric("train/grad_norm", "", "2-norm of the whole gradient before clipping"),
    Metric("train/lr", "", "learning rate of this step"),
    Metric("train/items", "items", "supervised items in the global batch: the denominator of the loss"),
    Metric("train/accuracy", "", "share of items predicted right", "max", (SFT, REWARD)),
    Metric("train/margin", "", "mean reward of the chosen answer minus the rejected one", "max", (REWARD,)),
    Metric(
        "train/skipped_steps", "steps", "steps skipped so far for a non-finite or spiking loss or gradient"
    ),
    Metric("train/rollbacks", "times", "returns to an earlier checkpoint so far"),
    Metric("val/loss", "nats/item", "loss on held-out data", "min"),
    Metric(
        "val/bpb",
        "bits/byte",
        "bits per byte of held-out text: does not depend on the tokenizer",
        "min",
        LIKELIHOOD,
    ),
    Metric("val/accuracy", "", "share of held-out items predicted right", "max", (SFT, REWARD)),
    Metric("val/bpb/*", "bits/byte", "bits per byte of one held-out source", "min", LIKELIHOOD),
    Metric("val/loss/*", "nats/item", "held-out loss of one source", "min"),
    Metric("speed/tokens_per_s", "tokens/s", "real tokens (no padding) per second of the whole step", "max"),
    Metric("speed/tokens_per_s_per_device", "tokens/s", "the same, divided by the number of devices", "max"),
    Metric(
        "speed/mfu",
        "",
        "model FLOPs per second over the peak of the devices (formula: trainer/model/flops.py)",
        "max",
    ),
    Metric("speed/step_s", "s", "wall time of the step: the sum of its parts"),
    *(Metric(f"speed/{part}_s", "s", f"of it: {meaning}") for part, meaning in PARTS.items()),
    Metric("memory/*", "GiB", "device memory, e.g. memory/peak_allocated", "max"),
    Metric("data/epoch/*", "epochs", "how often one source was read through so far"),
    Metric(
        "data/batch_hash", "", "hash of the global batch (hex): equal runs read equal batches", chart=False
    ),
    Metric("data/first_sample", "", "number of the global batch's first sequence in the stream", chart=False),
    Metric("data/samples", "sequences", "where the stream stands after the step"),
    Metric("event/*", "", "what happened, in words: skip, rollback, save, damage, slow", chart=False),
    Metric("rl/reward", "", "mean reward of the step's completions", "max", (GRPO,)),
    Metric("rl/reward/*", "", "mean of one part of the reward", "max", (GRPO,)),
    Metric("rl/pass@*", "", "share of problems solved within k tries, e.g. rl/pass@1", "max", (GRPO,)),
    Metric(
        "rl/zero_variance_groups",
        "",
        "share of groups whose rewards are all equal: they teach nothing",
        "last",
        (GRPO,),
    ),
    Metric(
        "rl/stop_rate", "", "share of completions that ended by themselves, not by length", "last", (GRPO,)
    ),
    Metric("rl/length", "tokens", "mean length of a completion", "last", (GRPO,)),
    Metric("rl/entropy", "nats/token", "mean entropy of the policy", "last", (GRPO,)),
    Metric(
        "rl/logprob_mismatch",
        "nats/token",
        "mean |log p(sampler) - log p(trainer)| of sampled tokens",
        "last",
        (GRPO,),
    ),
    Metric("rl/kl", "nats/token", "KL divergence from the reference policy", "last", (GRPO,)),
    Metric("rl/clip_fraction", "", "share of tokens whose ratio was clipped", "last", (GRPO,)),
    Metric("rl/staleness", "steps", "age of the weights that sampled the batch", "last", (GRPO,)),
    Metric("run/goodput", "", "productive time over all time since the run first started", "last"),
    Metric("run/attempt", "", "which start of the run this is; 1 = never resumed", "last"),
)

_EXACT = {metric.name: metric for metric in METRICS if not metric.is_family}
# Longest family first, so that `rl/reward/*` is found before a shorter prefix could be.
_FAMILIES = sorted((m for m in METRICS if m.is_family), key=lambda m: -len(m.name))
_MEMBER = re.compile(r"[A-Za-z0-9_.@+-][A-Za-z0-9_.@+/-]*")


@lru_cache(maxsize=4096)
def find(name: str) -> Metric:
    """The row of a metric name; ValueError with the nearest names if there is none."""
    if name in _EXACT:
        return _EXACT[name]
    for family in _FAMILIES:
        prefix = family.name[:-1]
        if name.startswith(prefix) and _MEMBER.fullmatch(name[len(prefix) :]):
            return family
    room = [metric.name for metric in METRICS if metric.name.split("/")[0] == name.split("/")[0]]
    raise ValueError(
        f"metric {name!r} is not in trainer/observe/metrics.py; names there: {', '.join(room or _EXACT)}"
    )


def check(names: Iterable[str]) -> None:
    """Refuses the first name that is not registered (ValueError)."""
    for name in names:
        find(name)


def for_stage(stage: str) -> list[Metric]:
    """The metrics a stage can report, in the order of the table."""
    return [metric for metric in METRICS if stage in metric.stages]


def markdown_table(stage: str | None = None) -> str:
    """The table for the README: name, unit, meaning, stages."""
    rows = ["| metric | unit | what it says | stages |", "|---|---|---|---|"]
    for metric in METRICS if stage is None else for_stage(stage):
        stages = "all" if metric.stages == STAGES else ", ".join(metric.stages)
        rows.append(f"| `{metric.name}` | {metric.unit} | {metric.meaning} | {stages} |")
    return "\n".join(rows)
