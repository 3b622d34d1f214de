"""Commands as a user types them, in real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = [
    "model=1m",
    "model.vocab_size=320",
    "model.num_layers=2",
    "model.hidden_size=48",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.intermediate_size=96",
    "seq_len=64",
    "global_batch=12",
    "micro_batch=2",
    "steps=6",
    "schedule.warmup_steps=2",
    "optim.lr=3e-3",
    "eval.every=0",
    "sample.every=0",
    "checkpoint.every=0",
    "logger.wandb=disabled",
    "engine.persistence_threshold=0",
]


def environment(**extra: str) -> dict[str, str]:
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RANK", "WORLD", "LOCAL_", "MASTER"))
    }
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    return {**env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def tiny(dataset: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Arguments of a pretraining run of a few seconds."""
    return [*TINY, f"data.train={dataset}", f"run_dir={run_dir}", *overrides]


def trivium(
    *arguments: str, cwd: Path | None = None, timeout: float = 240, **env: str
) -> subprocess.CompletedProcess:
    """`trivium ...`; the test looks at the result."""
    return subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The step lines of a run's metrics.jsonl (not the evaluation before the first step)."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def curve(run_dir: Path) -> list[tuple[int, float, float, str]]:
    """(step, loss, gradient norm, batch hash) of each step."""
    return [
        (m["step"], m["train/loss"], m["train/grad_norm"], m["data/batch_hash"]) for m in metrics(run_dir)
    ]


def assert_same_curve(
    one: list[tuple[int, float, float, str]], other: list[tuple[int, float, float, str]]
) -> None:
    """Same steps, same batches, losses and norms within 1e-5 (fp32 sums in another order differ in the last
    bits).
    """
    assert [(c[0], c[3]) for c in one] == [(c[0], c[3]) for c in other]
    for a, b in zip(one, other):
        assert abs(a[1] - b[1]) <= 1e-5 * abs(b[1]), (a, b)
        assert abs(a[2] - b[2]) <= 1e-5 * abs(b[2]) + 1e-6, (a, b)
