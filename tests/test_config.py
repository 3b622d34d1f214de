"""Every YAML under configs/ composes; the flattened result is committed, so that a changed default shows as
a diff.

After a wanted change: `python tests/test_config.py` writes the files in tests/flat_configs/ anew.
"""

from pathlib import Path

import pytest
import yaml

from trainer.config import compose_stage, config_directory, flat, plain
from trainer.errors import UserError

FLAT = Path(__file__).parent / "flat_configs"
CONFIGS = config_directory()
GROUPS = sorted(
    p.name for p in CONFIGS.iterdir() if p.is_dir() and p.name not in ("accelerate", "experiment")
)
OPTIONS = [(group, p.stem) for group in GROUPS for p in sorted((CONFIGS / group).glob("*.yaml"))]
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
DATA = "data.train=/data"


def flattened(overrides: list[str]) -> str:
    return yaml.safe_dump(flat(plain(compose_stage("pretrain", overrides))), sort_keys=False)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_validates(group, option):
    seq_len = ["seq_len=256", "steps=5000"]
    compose_stage("pretrain", [f"{group}={option}", DATA, *seq_len]).validate(world=1)


@pytest.mark.parametrize("name", ["pretrain", *EXPERIMENTS])
def test_composed_configs_are_the_committed_ones(name):
    overrides = [] if name == "pretrain" else [f"experiment={name}"]
    assert flattened(overrides) == (FLAT / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_validate(name):
    config = compose_stage("pretrain", [f"experiment={name}", DATA])
    config.validate(world=1 if name == "quickstart" else 8)


def test_every_yaml_is_reached():
    """A file that no test composes rots; the data command's own config has its own tests."""
    roots = {p.name for p in CONFIGS.glob("*.yaml")}
    assert roots == {"pretrain.yaml", "data.yaml"}
    assert set(GROUPS) == {"data", "engine", "logger", "model", "optim", "schedule"}


def test_an_experiment_can_be_overridden_and_keeps_types():
    config = compose_stage("pretrain", ["experiment=quickstart", "engine=zero3", "steps=7", "optim.lr=1"])
    assert (config.engine.kind, config.steps, config.optim.lr) == ("zero3", 7, 1.0)
    assert isinstance(config.optim.lr, float)


def test_the_launcher_names_the_engine():
    assert compose_stage("pretrain", [], "zero2").engine.kind == "zero2"
    assert compose_stage("pretrain", ["engine=zero2"], "zero2").engine.kind == "zero2"
    with pytest.raises(UserError, match="engine=fsdp: but accelerate's config file starts zero2"):
        compose_stage("pretrain", ["engine=fsdp"], "zero2")


def test_batch_is_micro_times_accumulation_times_ranks():
    config = compose_stage("pretrain", [DATA, "global_batch=24", "micro_batch=4"])
    config.validate(world=6)
    with pytest.raises(UserError, match=r"global_batch=24.*multiple of 20"):
        config.validate(world=5)


if __name__ == "__main__":
    FLAT.mkdir(exist_ok=True)
    for name in ["pretrain", *EXPERIMENTS]:
        (FLAT / f"{name}.yaml").write_text(flattened([] if name == "pretrain" else [f"experiment={name}"]))
