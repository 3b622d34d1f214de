"""The four stages of `trivium data`, over one config and one output directory, in their order."""

import fcntl
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from data_prep.config import DataPrepConfig, find_archives
from data_prep.files import (
    disk_errors,
    format_bytes,
    replace_directory,
    require_space,
    write_json,
    write_text,
)
from data_prep.progress import TaskProgress, stage_line
from data_prep.stages import Stage, input_prints
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.chat.tokenizer import Tokenizer

TASK_BYTES = (128 << 10, 64 << 20)  # least and most of compressed archive in a task
TASKS_WANTED = 64
SAMPLED_LEDGERS = 64
WORK_PER_INPUT = 3  # bytes written, at most, per byte of archive: documents twice, ids, shards


class Job:
    """The four stages over one config and one output directory."""

    def __init__(self, config: DataPrepConfig, console: Console):
        self.config = config
        self.console = console
        self.out = Path(config.output).expanduser()
        self.work = self.out / "work"
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Everything; returns the report. Raises UserError."""
        config = self.config
        archives = find_archives(config.input)
        from data_prep.warc import check_archive

        for archive in archives:
            check_archive(archive)
        if config.tokenizer.path is not None:
            config.check_dtype(self.given_tokenizer().vocab_size)  # before hours of reading, not behind them
        self.prepare(sum(archive.stat().st_size for archive in archives))
        inputs = input_prints(archives, self.work / "inputs.json")
        self.console.print(
            f"{len(archives)} archive(s), {format_bytes(sum(p['bytes'] for p in inputs))} -> {self.out}",
            highlight=False,
        )

        pages, cleaned = self.clean(archives, inputs)
        documents, deduped = self.dedup(pages, cleaned)
        tokenizer, trained = self.train_tokenizer(documents, deduped)
        shards = self.write_tokens(documents, deduped, tokenizer, trained)
        return self.report(inputs, pages, documents, [cleaned, deduped, trained, shards])

    def prepare(self, input_bytes: int) -> None:
        with disk_errors(self.out):
            try:
                self.work.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise UserError(
                    f"output={self.out}: a file is in the way: choose another directory"
                ) from error
            self.lock = open(self.work / "lock", "w")  # noqa: SIM115  (held until the process ends)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"output={self.out}: another `trivium data` is writing there: wait for it, or choose another "
                "directory"
            ) from error
        if not (self.out / "report.json").exists():
            require_space(self.out, WORK_PER_INPUT * input_bytes)

    def given_tokenizer(self) -> "Tokenizer":
        """The tokenizer that `tokenizer.path` names."""
        from trainer.chat.tokenizer import Tokenizer

        return Tokenizer.load(Path(self.config.tokenizer.path or "").expanduser())

    def stage(self, stage: Stage, what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run one stage and say how it went."""
        if stage.finished() is None and (why := stage.why_again()):
            self.console.print(f"  {stage.name}: again, because of a change in {why}", highlight=False)
        begin = time.monotonic()
        result = stage.run(work)
        self.seconds[stage.name] = result["seconds"]
        self.console.print(stage_line(stage.name, what, result, time.monotonic() - begin), highlight=False)
        return result

    def clean(self, archives: list[Path], inputs: list[dict[str, Any]]) -> tuple[Path, Stage]:
        config = self.config
        total = sum(p["bytes"] for p in inputs)
        task_bytes = (
            total // config.tasks + 1
            if config.tasks
            else min(max(total // TASKS_WANTED, TASK_BYTES[0]), TASK_BYTES[1])
        )
        key = {"inputs": inputs, "task_bytes": task_bytes, "min_chars": config.min_chars}
        key |= {
            "url": asdict(config.url),
            "language": asdict(config.language),
            "quality": list(config.quality),
        }
        stage = Stage("clean", self.work, key, [])
        pages = self.work / f"pages-{stage.identity}"
        stage.outputs = [pages]

        def work() -> dict[str, Any]:
            from data_prep.clean import clean
            from data_prep.urls import blocklist, cache_directory
            from data_prep.warc import plan

            ranges = plan(archives, task_bytes)
            lists = blocklist(cache_directory(), self.work) if config.url.enabled else None
            with TaskProgress(
                self.console, [share.end - share.begin for share in ranges], config.num_workers()
            ) as progress:
                result = clean(config, ranges, pages, self.out / "logs", lists, progress.done)
            for old in self.work.glob("pages-*"):
                if old != pages:
                    shutil.rmtree(old)
            return result

        self.stage(stage, "read, filter", work)
        return pages, stage

    def dedup(self, pages: Path, cleaned: Stage) -> tuple[Path, Stage]:
        documents = self.out / "documents"
        stage = Stage("dedup", self.work, {"pages": cleaned.content()}, [documents])

        def work() -> dict[str, Any]:
            from data_prep.dedup import exact_dedup

            counters = json.loads(cleaned.manifest.read_text())["result"]["counters"]
            if not counters.get("write/documents"):
                raise UserError(self.nothing_left(pages, int(counters.get("read/records", 0))))
            temporary = fresh(self.out / "documents.tmp")
            total, cell = int(counters["write/text_bytes"]), self.config.memory_mb << 20
            result = exact_dedup(sorted(pages.glob("task-*/documents.jsonl.zst")), total, cell, temporary)
            replace_directory(temporary, documents)
            return result

        self.stage(stage, "same text once", work)
        return documents, stage

    def nothing_left(self, pages: Path, read: int) -> str:
        from data_prep.report import count_drops

        drops, losses = count_drops(sorted(pages.glob("task-*/dropped-*.jsonl.zst")))
        if not drops:
            lost = f"; {losses[0]['why']} at byte {losses[0]['offset']}" if losses else ""
            return (
                f"input={self.config.input}: {read} pages in it{lost}: give an archive with response records"
            )
        most = max(drops, key=lambda drop: drop.pages)
        return (
            f"input={self.config.input}: none of {read} pages survived; the filter {most.filter} took most "
            f"({most.pages}, {most.reason}): relax it, or give other input"
        )

    def train_tokenizer(self, documents: Path, deduped: Stage) -> tuple[Path, Stage]:
        from data_prep.bpe import make_tokenizer
        from data_prep.dedup import document_files

        config, directory = self.config, self.out / "tokenizer"
        key: dict[str, Any] = {
            "tokenizer": asdict(config.tokenizer),
            "val_fraction": config.shards.val_fraction,
        }
        if config.tokenizer.path is None:
            key["documents"] = deduped.content()
        else:
            key["sha256"] = self.given_tokenizer().sha256
        stage = Stage("tokenizer", self.work, key, [directory])

        def work() -> dict[str, Any]:
            temporary = self.out / "tokenizer.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            total = json.loads(deduped.manifest.read_text())["result"]["text_bytes"]
            files = document_files(documents)
            result = make_tokenizer(files, total, config.tokenizer, config.shards.val_fraction, temporary)
            replace_directory(temporary, directory)
            return result

        self.stage(stage, "byte-level BPE", work)
        return directory, stage

    def write_tokens(self, documents: Path, deduped: Stage, tokenizer: Path, trained: Stage) -> Stage:
        from data_prep.dedup import document_files
        from data_prep.tokens import SPLITS, write_shards
        from trainer.chat.tokenizer import Tokenizer

        config = self.config
        key = {
            "documents": deduped.content(),
            "tokenizer": trained.content(),
            "shards": asdict(config.shards),
        }
        stage = Stage(
            "tokens",
            self.work,
            key | {"seed": config.seed, "name": config.name},
            [self.out / split for split in SPLITS],
        )

        def work() -> dict[str, Any]:
            temporary = fresh(self.work / "tokens.tmp")
            total = json.loads(deduped.manifest.read_text())["result"]["text_bytes"]
            result = write_shards(
                document_files(documents),
                total,
                Tokenizer.load(tokenizer),
                config.shards,
                name=config.name,
                seed=config.seed,
                cell_bytes=config.memory_mb << 20,
                threads=config.num_workers(),
                directory=temporary,
            )
            for split in SPLITS:
                if split in result:
                    replace_directory(temporary / split, self.out / split)
                else:
                    shutil.rmtree(self.out / split, ignore_errors=True)
            temporary.rmdir()
            return {"splits": result}

        self.stage(stage, "encode, shuffle, write", work)
        return stage

    def report(
        self, inputs: list[dict[str, Any]], pages: Path, documents: Path, stages: list[Stage]
    ) -> dict[str, Any]:
        from data_prep.bpe import compression, sample_texts
        from data_prep.dedup import document_files
        from data_prep.report import count_drops, markdown
        from trainer.chat.tokenizer import Tokenizer

        cleaned, deduped, trained, written = [json.loads(s.manifest.read_text())["result"] for s in stages]
        ledgers = sorted(pages.glob("task-*/dropped-*.jsonl.zst"))
        drops, losses = count_drops([*ledgers, documents / "dropped.jsonl.zst"])
        counters, read = cleaned["counters"], int(cleaned["counters"]["read/records"])
        foreign = [path for path in ledgers if path.name == "dropped-language.jsonl.zst"]
        # Documents are in the order of their hashes: the first file is a fair sample of all.
        texts = sample_texts(document_files(documents)[:1], foreign[:SAMPLED_LEDGERS])
        report = {
            "name": self.config.name,
            "inputs": inputs,
            "input_bytes": sum(p["bytes"] for p in inputs),
            "read": read,
            "documents": deduped["documents"],
            "text_bytes": deduped["text_bytes"],
            "drops": [drop.to_dict(read) for drop in drops],
            "losses": losses,
            "charsets": {
                name.split("-", 1)[1]: int(value)
                for name, value in counters.items()
                if name.startswith("extract/charset-")
            },
            "tokenizer": {"vocab_size": trained["vocab_size"], "sha256": trained["sha256"]},
            "compression": compression(Tokenizer.load(self.out / "tokenizer"), texts),
            "tokens": written["splits"],
            "tasks": cleaned["tasks"],
            "seconds": self.seconds,
            "config": asdict(self.config),
        }
        write_json(self.out / "report.json", report)
        write_text(self.out / "report.md", markdown(report))
        return report


def fresh(directory: Path) -> Path:
    """An empty directory in the place of whatever a killed run has left."""
    shutil.rmtree(directory, ignore_errors=True)
    with disk_errors(directory):
        directory.mkdir(parents=True)
    return directory
