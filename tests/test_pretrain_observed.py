"""What a run tells: bits per byte, samples, and an offline W&B run read back by W&B's own tool."""

import json
import subprocess
import sys

import pytest
from commands import environment, metrics, tiny, trivium

from trainer.observe.metrics import for_stage


@pytest.fixture(scope="module")
def observed(dataset, tmp_path_factory):
    """A run in two attempts with everything switched on; the second one resumes at step 4."""
    run = tmp_path_factory.mktemp("runs") / "observed"
    common = [
        "eval.every=2",
        "eval.sequences=8",
        "sample.every=3",
        "sample.prompts=[def,The]",
        "sample.max_new_tokens=8",
    ]
    common += ["logger.wandb=offline", "checkpoint.every=2", "data.document_mask=true", "schedule=constant"]
    for steps in (4, 6):
        result = trivium(
            "pretrain", *tiny(dataset, run, *common, f"steps={steps}", "schedule.warmup_steps=0")
        )
        assert result.returncode == 0, result.stderr
    return run


def test_validation_before_between_and_after(observed):
    lines = [json.loads(line) for line in (observed / "metrics.jsonl").read_text().splitlines()]
    bpb = {line["step"]: line["val/bpb"] for line in lines if "val/bpb" in line}
    assert list(bpb) == [0, 2, 4, 6]
    assert bpb[6] < bpb[0]
    losses = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
    assert losses[6] < losses[0]


def test_bits_per_byte_by_hand(dataset, observed):
    """The same windows, whole logits, torch's cross entropy, bytes counted by decoding each target."""
    import math

    import torch

    from trainer.load import load_model
    from trainer.stream.batches import TokenBatches
    from trainer.stream.config import DataConfig

    loaded = load_model(observed)
    batches = TokenBatches(
        DataConfig(train=str(dataset), document_mask=True), seed=0, seq_len=64, global_batch=12, micro_batch=2
    )
    special = set(loaded.tokenizer.special.values())
    nats, num_bytes = 0.0, 0
    with torch.no_grad():
        for micro in batches.eval_batches(8):
            logits = loaded.model(
                micro.tokens_BT, positions_BT=micro.positions_BT, documents_BT=micro.documents_BT
            )
            logp = torch.log_softmax(logits, -1)
            for row, targets in enumerate(micro.targets_BT.tolist()):
                for place, target in enumerate(targets):
                    if target >= 0 and target not in special:
                        nats -= logp[row, place, target].item()
                        num_bytes += len(loaded.tokenizer.id_to_bytes(target))
    last = json.loads((observed / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/bpb"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)


def test_samples_of_the_same_prompts(observed):
    rows = [json.loads(line) for line in (observed / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 3, 4, 6}  # 4: the last step of the first attempt
    assert {row["row"]["prompt"] for row in rows} == {"def", "The"}


def test_wandb_has_every_metric_once_per_step(observed):
    runs = sorted((observed / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    identity = json.loads((observed / "run.json").read_text())["wandb_id"]
    assert all(run.name.endswith(identity) for run in runs)  # one id across the resume
    history: dict[int, dict] = {}
    for run in runs:
        inspected = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=120,
        )
        assert inspected.returncode == 0, inspected.stderr
        for line in inspected.stdout.splitlines():
            items = json.loads(line).get("history", {}).get("item", {})
            if "train/loss" in items:
                step = int(items["_step"])
                assert step not in history
                history[step] = items
    assert sorted(history) == [1, 2, 3, 4, 5, 6]
    for line in metrics(observed):
        for name in expected_names(line):
            assert history[line["step"]][name] == pytest.approx(line[name]), name
        assert history[line["step"]]["tokens"] == line["tokens"]


def expected_names(line: dict) -> list[str]:
    charted = {metric.name for metric in for_stage("pretrain") if metric.chart and not metric.is_family}
    return [name for name in line if name in charted]


def test_every_design_metric_of_pretraining_is_there(observed):
    names = set().union(
        *metrics(observed), *[json.loads(x) for x in (observed / "metrics.jsonl").read_text().splitlines()]
    )
    wanted = {
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "speed/tokens_per_s",
        "speed/tokens_per_s_per_device",
    }
    wanted |= {
        "speed/mfu",
        "speed/wait_data_s",
        "speed/forward_backward_s",
        "speed/optimizer_s",
        "speed/eval_s",
    }
    wanted |= {"val/bpb", "val/loss", "data/epoch/train", "data/batch_hash", "run/attempt"}
    assert wanted <= names
    assert any(name.startswith("memory/") for name in names)
