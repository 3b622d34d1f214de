"""A tokenizer and a model that fit together, as `trainer.load.load_model` would give them."""

from types import SimpleNamespace

import pytest
import rustbpe
from generate_parts import tiny

from trainer.chat.save import save_tokenizer
from trainer.chat.tokenizer import SPLIT_PATTERN

TEXT = "The cat sat on the mat. The dog sat on the cat. 中文 naïve café, said the dog to the cat.\n" * 30


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter([TEXT]), 300, pattern=SPLIT_PATTERN)
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), trainer.get_mergeable_ranks())


@pytest.fixture(scope="session")
def loaded(tokenizer):
    model = tiny(vocab_size=tokenizer.vocab_size)
    return SimpleNamespace(model=model, tokenizer=tokenizer, config=model.config, step=1234)


@pytest.fixture
def load(loaded):
    """Stands in for `trainer.load.load_model`."""
    return lambda path, device: loaded
