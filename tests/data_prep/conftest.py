"""One run of the whole command over a slice of the sample, shared by tests that only look at the result."""

from pathlib import Path

import pytest
from prep_archives import sample_slice

from data_prep.run import main

OPTIONS = ("tokenizer.vocab_size=600", "shards.block_tokens=4096", "shards.blocks_per_shard=8", "workers=1")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The URL block list is built once for the session, outside the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 160 records of the sample."""
    return sample_slice(tmp_path_factory.mktemp("archive") / "slice.warc.gz", 160)


@pytest.fixture(scope="session")
def prepared(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a finished run over `archive`. Look, do not touch."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert main([f"input={archive}", f"output={out}", "tasks=5", *OPTIONS]) == 0
    return out
