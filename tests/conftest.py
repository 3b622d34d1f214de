"""Fixtures of the whole suite: pools of ranks, a small real data set, and commands run as a user runs
them.
"""

import os
from pathlib import Path

import pytest
from corpus import write_dataset
from ranks import Ranks

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores; more threads would fight
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def pool():
    """`pool.run(size, function, *args)` on real gloo ranks."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A directory as `trivium data` writes it: tokenizer, train and val shards of English text."""
    return write_dataset(tmp_path_factory.mktemp("dataset"))
