"""A small byte-level BPE, trained on the spot."""

import pytest
import rustbpe
from chat_corpus import corpus

from trainer.chat.save import save_tokenizer
from trainer.chat.tokenizer import SPLIT_PATTERN


@pytest.fixture(scope="session")
def ranks():
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(corpus()), 900, pattern=SPLIT_PATTERN)
    return trainer.get_mergeable_ranks()


@pytest.fixture(scope="session")
def tokenizer(ranks, tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), ranks)
