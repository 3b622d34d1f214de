"""URL filter: the block lists that datatrove carries (UT1: 4.6 million domains; three word lists), matched
our way.

datatrove's own `URLFilter` holds the lists in Python sets: 1.17 GB in every worker, 3.5 s to load. Here a
domain is a 64-bit hash in one sorted array that all workers map into memory (36 MB, shared). Its word match
is case sensitive (`/porn/` is dropped, `/PORN/` kept: measured); ours lower-cases. Its `TLDExtract()` first
asks the network for a suffix list; ours uses the copy inside the package.
"""

import os
import re
import tarfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from data_prep.files import atomic_file
from data_prep.ledger import Ledger

ARCHIVE = "url_filterblacklistsv0_3_0.tar.gz"
NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")


def assets() -> Path:
    """The directory of datatrove's lists."""
    spec = find_spec("datatrove")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "assets"


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/trivium or ~/.cache/trivium: for what can be rebuilt at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivium"


def hash_strings(strings: list[bytes]) -> np.ndarray:
    """Sorted uint64 xxh3 hashes. A clash of 4.6 M strings has probability 6e-7 per looked-up name: one in a
    million.
    """
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, strings), dtype=np.uint64, count=len(strings))
    return np.unique(hashes)


def writable(cache: Path, fallback: Path) -> Path:
    """`cache`, made if need be, or `fallback` when it cannot be written (a cluster node without a home)."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return fallback
    return cache if os.access(cache, os.W_OK) else fallback


def blocklist(cache: Path, fallback: Path) -> Path:
    """Path of the sorted hashes of all blocked domains and URLs, built at first use (2-3 s).

    Kept in `cache`, or in `fallback` when that cannot be written.
    """
    source = assets() / ARCHIVE
    path = writable(cache, fallback) / f"url-blocklist-{source.stat().st_size}.npy"
    if not path.exists():
        lines: list[bytes] = []
        with tarfile.open(source, "r:gz") as archive:
            for name in ("domains", "urls"):
                member = archive.extractfile(name)
                assert member is not None
                lines += [line.strip() for line in member.read().split(b"\n") if line and line[:1] != b"#"]
        with atomic_file(path, shared=True) as file:
            np.save(file, hash_strings(lines))
    return path


@lru_cache(maxsize=1)
def load_blocklist(path: str) -> np.ndarray:
    """The sorted hashes, mapped: every worker on the machine shares the same pages of memory."""
    return np.load(path, mmap_mode="r")


@lru_cache
def load_words(name: str) -> frozenset[str]:
    """One of datatrove's word lists, lower-cased, without spaces and punctuation."""
    lines = (assets() / f"{name}.txt").read_text().splitlines()
    return frozenset(NOT_ALPHANUMERIC.sub("", line.lower()) for line in lines if line and line[0] != "#")


class UrlRules:
    """Decides on one URL. `extra_domains` are blocked too; `allowed_domains` never are."""

    def __init__(
        self, hashes: np.ndarray, extra_domains: list[str], allowed_domains: list[str], soft_threshold: int
    ):
        from tldextract import TLDExtract

        self.hashes = hashes
        self.extra = {domain.lower() for domain in extra_domains}
        self.allowed = {domain.lower() for domain in allowed_domains}
        self.soft_threshold = soft_threshold
        self.hard_words = load_words("banned_words")
        self.soft_words = load_words("soft_banned_words")
        subwords = load_words("banned_subwords")
        self.subwords = re.compile("|".join(sorted(map(re.escape, subwords - {""}))))
        # suffix_list_urls=(): no network, ever. cache_dir=None: nothing written into the package.
        self.split = TLDExtract(suffix_list_urls=(), cache_dir=None)

    def listed(self, name: str) -> bool:
        if not name or name in self.extra:
            return bool(name)
        word = np.uint64(xxhash.xxh3_64_intdigest(name.encode()))
        place = int(np.searchsorted(self.hashes, word))
        return place < len(self.hashes) and self.hashes[place] == word

    def refuse(self, url: str) -> str | None:
        """Why this URL is blocked, or None."""
        lower = url.lower()
        parts = self.split(lower)
        # No public suffix (an IP address, an intranet name): the host as it stands.
        host = parts.fqdn or ".".join(label for label in (parts.subdomain, parts.domain) if label)
        domain = parts.top_domain_under_public_suffix or host
        if domain in self.allowed or host in self.allowed:
            return None
        if self.listed(domain):
            return "domain"
        if self.listed(host):
            return "subdomain"
        if self.listed(url):
            return "url"
        words = set(NOT_ALPHANUMERIC.split(lower))
        if words & self.hard_words:
            return "hard_word"
        if len(words & self.soft_words) >= self.soft_threshold:
            return "soft_words"
        if self.subwords.search(NOT_ALPHANUMERIC.sub("", lower)):
            return "subword"
        return None


class FilterUrl(BaseFilter):
    """datatrove filter: drops pages whose URL is on a block list."""

    name = "url"

    def __init__(
        self,
        blocklist: str,
        extra_domains: list[str],
        allowed_domains: list[str],
        soft_threshold: int,
        ledger: Ledger,
    ):
        super().__init__(ledger)
        self.blocklist = blocklist
        self.extra_domains = extra_domains
        self.allowed_domains = allowed_domains
        self.soft_threshold = soft_threshold
        self._rules: UrlRules | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._rules is None:  # built in the worker: a mapped array must not be pickled
            hashes = load_blocklist(self.blocklist)
            self._rules = UrlRules(hashes, self.extra_domains, self.allowed_domains, self.soft_threshold)
        reason = self._rules.refuse(doc.metadata["url"])
        return True if reason is None else (False, reason)
