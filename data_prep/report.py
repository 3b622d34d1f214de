"""What every stage did: counted from the ledgers, printed as a table, kept as report.json and report.md."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.files import format_bytes, read_jsonl

ORDER = (
    "read",
    "url",
    "extract",
    "language",
    "gopher_repetition",
    "gopher_quality",
    "c4",
    "fineweb",
    "exact_dedup",
)
EXAMPLES = 3
TABLE_REASONS = 4
EXPLAIN = {
    ("read", "lost"): "part of an archive that could not be read",
    ("read", "not_html"): "other media type",
    ("url", "domain"): "domain on the block list",
    ("url", "subdomain"): "host on the block list",
    ("url", "hard_word"): "forbidden word in the address",
    ("url", "soft_words"): "two suspect words in the address",
    ("extract", "no_main_text"): "navigation only, or nothing",
    ("language", "low_score"): "language unclear",
    ("gopher_quality", "gopher_below_alpha_threshold"): "under 80 % of words have a letter",
    ("gopher_quality", "gopher_short_doc"): "under 50 words",
    ("gopher_quality", "gopher_enough_stop_words"): "under 2 stop words",
    ("gopher_quality", "gopher_too_many_hashes"): "too many #",
    ("gopher_quality", "gopher_too_many_end_ellipsis"): "lines end in ...",
    ("c4", "curly_bracket"): "holds { (code)",
    ("c4", "lorem_ipsum"): "lorem ipsum",
    ("c4", "too_few_sentences"): "under 5 sentences",
    ("fineweb", "line_punct_ratio"): "under 12 % of lines end in punctuation",
    ("fineweb", "short_line_ratio"): "over 67 % short lines",
    ("fineweb", "char_dup_ratio"): "repeated lines",
    ("fineweb", "list_ratio"): "a list, not prose",
    ("exact_dedup", "same_text"): "same text as another page",
}


@dataclass
class Drop:
    """Pages that one filter dropped for one reason. Examples are chosen by a hash, so that they do not
    depend on tasks.
    """

    filter: str
    reason: str
    pages: int = 0
    bytes: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        self.pages += 1
        self.bytes += row["bytes"]
        rank = hashlib.sha256(row["id"].encode()).hexdigest()
        self.examples = sorted([*self.examples, (rank, row["url"])])[:EXAMPLES]

    def to_dict(self, read: int) -> dict[str, Any]:
        share = round(self.pages / read, 5) if read else 0.0
        urls = [url for _, url in self.examples]
        why = EXPLAIN.get((self.filter, self.reason), "")
        return {
            "filter": self.filter,
            "reason": self.reason,
            "why": why,
            "pages": self.pages,
            "share": share,
            "bytes": self.bytes,
            "examples": urls,
        }


def count_drops(ledgers: Iterable[Path]) -> tuple[list[Drop], list[dict[str, Any]]]:
    """(drops by filter and reason in pipeline order, parts of archives that were lost)."""
    drops: dict[tuple[str, str], Drop] = {}
    losses = []
    for path in ledgers:
        for row in read_jsonl(path):
            if "loss" in row:
                losses.append(row["loss"])
                continue
            place = (row["filter"], row["reason"])
            drops.setdefault(place, Drop(*place)).add(row)
    by_order = sorted(drops.values(), key=lambda drop: (ORDER.index(drop.filter), -drop.pages, drop.reason))
    return by_order, sorted(losses, key=lambda loss: (loss["path"], loss["offset"]))


def drop_table(report: dict[str, Any]) -> Table:
    """The table that the command ends with."""
    table = Table(
        title=f"{report['read']} pages read, {report['documents']} documents kept "
        f"({report['documents'] / max(1, report['read']):.1%})",
        title_justify="left",
        expand=True,
    )
    for name in ("filter", "reason"):
        table.add_column(name, no_wrap=True)
    for name in ("pages", "share"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("example", no_wrap=True, overflow="ellipsis", ratio=1)
    for name in ORDER:
        rows = [drop for drop in report["drops"] if drop["filter"] == name]
        table.add_section()
        for number, drop in enumerate(shorten(rows)):
            example = drop["examples"][0].split("://", 1)[-1] if drop["examples"] else ""
            reason = drop["why"] or drop["reason"]
            table.add_row("" if number else name, reason, str(drop["pages"]), f"{drop['share']:.1%}", example)
    return table


def shorten(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The commonest reasons of one filter, the rest as one row (report.md has them all)."""
    if len(rows) <= TABLE_REASONS + 1:
        return rows
    head, rest = rows[:TABLE_REASONS], rows[TABLE_REASONS:]
    sums: dict[str, Any] = {key: sum(row[key] for row in rest) for key in ("pages", "share")}
    return [*head, sums | {"why": f"{len(rest)} more reasons", "examples": rest[0]["examples"]}]


def filter_sums(report: dict[str, Any]) -> list[tuple[str, int, float]]:
    """(filter, pages dropped, share of the pages that reached it)."""
    left, sums = report["read"], []
    for name in ORDER:
        pages = sum(drop["pages"] for drop in report["drops"] if drop["filter"] == name)
        if pages:
            sums.append((name, pages, pages / left))
            left -= pages
    return sums


def markdown(report: dict[str, Any]) -> str:
    """The report for a human to read."""
    lines = [f"# Data: {report['name']}", ""]
    lines += [
        f"{report['read']} pages read from {len(report['inputs'])} archive(s) "
        f"({format_bytes(report['input_bytes'])}), {report['documents']} documents kept "
        f"({format_bytes(report['text_bytes'])} of text).",
        "",
    ]
    for split, data in report["tokens"].items():
        lines.append(
            f"- {split}: {data['tokens']:,} tokens, {data['documents']} documents, "
            f"{format_bytes(data['text_bytes'])} of text"
        )
    lines += ["", "| filter | dropped | of those that reached it |", "|---|---:|---:|"]
    lines += [f"| {name} | {pages} | {share:.1%} |" for name, pages, share in filter_sums(report)]
    lines += ["", "| filter | reason | pages | share | example |", "|---|---|---:|---:|---|"]
    for drop in report["drops"]:
        reason = f"{drop['reason']} ({drop['why']})" if drop["why"] else drop["reason"]
        example = drop["examples"][0] if drop["examples"] else ""
        lines.append(f"| {drop['filter']} | {reason} | {drop['pages']} | {drop['share']:.2%} | {example} |")
    if report["losses"]:
        lines += ["", "## Lost", ""]
        lines += [f"- {loss_line(loss)}" for loss in report["losses"]]
    lines += [
        "",
        "## Tokenizer",
        "",
        f"{report['tokenizer']['vocab_size']} ids, sha256 `{report['tokenizer']['sha256'][:16]}`",
        "",
        "| language | bytes per token | sample |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {language} | {data['bytes_per_token']:.2f} | {format_bytes(data['bytes'])} |"
        for language, data in report["compression"].items()
    ]
    lines += ["", "## Character sets", "", "| found by | pages |", "|---|---:|"]
    lines += [f"| {how} | {pages} |" for how, pages in report["charsets"].items()]
    lines += ["", "## Time", "", "| stage | seconds |", "|---|---:|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in report["seconds"].items()]
    return "\n".join(lines) + "\n"


def loss_line(loss: dict[str, Any]) -> str:
    """One line that names what was lost."""
    page = f" (page {loss['url']})" if loss["url"] else ""
    return f"{loss['path']}: {loss['why']} at byte {loss['offset']}: {loss['bytes']} bytes lost{page}"


def print_report(console: Console, report: dict[str, Any]) -> None:
    """The end of the command: the table, what was lost, and what there is now."""
    console.print(drop_table(report))
    for loss in report["losses"]:
        console.print(f"[yellow]lost[/] {loss_line(loss)}", soft_wrap=True, highlight=False)
    odd = {how: pages for how, pages in report["charsets"].items() if how != "utf-8"}
    if odd:
        total = sum(odd.values())
        parts = ", ".join(f"{pages} {how}" for how, pages in odd.items())
        console.print(f"{total} pages were not UTF-8 (character set: {parts})", highlight=False)
    ratio = report["compression"].get("en") or next(iter(report["compression"].values()))
    tokens = report["tokens"]
    console.print(
        f"tokens: {tokens['train']['tokens']:,} train, {tokens.get('val', {'tokens': 0})['tokens']:,} val; "
        f"vocabulary {report['tokenizer']['vocab_size']:,}; {ratio['bytes_per_token']:.2f} bytes per token",
        highlight=False,
    )
