"""Choose the sample's pages (`pages.tsv`) with the pipeline's own filters. Run once; `build.py` only reads
the list.

    python -m data_prep.sample.select_pages UNPACKED_DIR

Prose-rich pages are preferred so that much text survives in few megabytes: of the English pages those that
pass all filters, up to TEXT_BYTES of text; then some of every kind of page that does not pass, and pages in
other languages.
"""

import hashlib
import sys
from collections import Counter
from pathlib import Path

from datatrove.data import Document

from data_prep.language import detect, model_path
from data_prep.quality import QUALITY, quality_filters
from data_prep.sample.packages import BY_NAME, page_paths, unpacked
from data_prep.text import extract

TEXT_BYTES = 4_400_000
MAX_PAGE_BYTES = 120_000  # of text: one huge page would be a tenth of the validation set
REJECTED_PER_REASON = 9
PAGES_PER_LANGUAGE = 12
OTHER_HANDBOOKS = (
    "ar-MA",
    "el-GR",
    "es-ES",
    "ko-KR",
    "pl-PL",
    "pt-BR",
    "ru-RU",
    "tr-TR",
    "vi-VN",
    "zh-CN",
    "zh-TW",
)


def order(path: str) -> str:
    """A fixed shuffle: pages of a manual in an order that no table of contents has."""
    return hashlib.sha256(path.encode()).hexdigest()


def judge(text: str) -> str:
    """ "keep", or the reason why an English page would be dropped."""
    document = Document(text=text, id="", metadata={})
    for rule in FILTERS:
        kept = rule.filter(document)
        if kept is not True:
            return kept[1] if isinstance(kept, tuple) else rule.name
    return "keep"


def main(directory: Path) -> None:
    roots = unpacked(directory)
    model = str(model_path())
    chosen: list[tuple[str, str]] = []
    kept_bytes, rejected, languages, seen = 0, Counter[str](), Counter[str](), set[str]()
    pages = [(name, path) for name, root in roots.items() for path in page_paths(root, BY_NAME[name])]
    for name, path in sorted(pages, key=lambda page: order("/".join(page))):
        if name == "debian-handbook" and not path.startswith(("en-US", *OTHER_HANDBOOKS)):
            continue
        text = extract(
            (roots[name] / BY_NAME[name].pages / path).read_text(encoding="utf-8", errors="replace")
        )
        size = len(text.encode())
        if size > MAX_PAGE_BYTES or text in seen:
            continue
        seen.add(text)
        language, score = detect(text, model)
        if language != "en":
            languages[language] += 1
            wanted = size > 2000 and languages[language] <= PAGES_PER_LANGUAGE
        elif path.startswith(OTHER_HANDBOOKS):
            continue  # untranslated parts of a translation: the English page a second time
        elif (reason := judge(text) if score >= 0.65 else "low_score") == "keep":
            wanted = kept_bytes < TEXT_BYTES
            kept_bytes += size if wanted else 0
        else:
            rejected[reason] += 1
            wanted = rejected[reason] <= REJECTED_PER_REASON and size < 40_000
        if wanted:
            chosen.append((name, path))
    lines = [f"{name}\t{path}\n" for name, path in sorted(chosen)]
    Path(__file__).with_name("pages.tsv").write_text("".join(lines))
    print(f"{len(chosen)} pages, {kept_bytes} bytes of text expected to survive")
    print("languages", dict(languages))
    print("rejected", dict(rejected))


FILTERS = quality_filters(list(QUALITY), dict.fromkeys(QUALITY))  # type: ignore[arg-type]

if __name__ == "__main__":
    main(Path(sys.argv[1]))
