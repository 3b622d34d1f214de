"""Stage 1: archives -> clean documents, on datatrove's local executor. Parallel, and resumable task by task.

    read (fastwarc) -> url -> extract (resiliparse) -> language (fastText) -> Gopher, C4, FineWeb -> write

A task is a byte range of an archive; how many there are depends on the input alone. Every task writes into
`task-NNNNN.tmp/` and is committed by renaming it, inside a directory named after the stage's key: a task
that is there was done with exactly this input, config and code.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger

from data_prep.config import DataPrepConfig
from data_prep.files import fsync_directory, jsonl_writer, write_json
from data_prep.language import FilterLanguage, model_path
from data_prep.ledger import Ledger, task_directory
from data_prep.quality import quality_filters
from data_prep.text import ExtractText
from data_prep.urls import FilterUrl
from data_prep.warc import Range, ReadWarc
from trainer.errors import UserError

THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WriteDocuments(PipelineStep):
    """datatrove step: the task's documents as JSON lines: text, its sha256, url, language, score, source."""

    type = "WRITER"
    name = "write"

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        from hashlib import sha256

        with jsonl_writer(task_directory(self.directory, rank) / "documents.jsonl.zst") as out:
            for document in data:
                meta = document.metadata
                text = document.text.encode("utf-8", "replace")
                row = {"id": document.id, "url": meta["url"], "language": meta["language"]}
                row |= {
                    "language_score": meta["language_score"],
                    "date": meta["date"],
                    "charset": meta["charset"],
                }
                row |= {"source": meta["source"], "sha256": sha256(text).hexdigest(), "text": text.decode()}
                out.write(row)
                self.stat_update("documents")
                self.stat_update("text_bytes", value=len(text))
                yield document


def build_pipeline(
    config: DataPrepConfig, ranges: list[Range], directory: Path, blocklist: Path | None
) -> list[Any]:
    """The steps of one task, in order."""
    steps: list[Any] = [ReadWarc(ranges, Ledger(directory, "read"))]
    if blocklist is not None:
        url, ledger = config.url, Ledger(directory, "url")
        steps.append(
            FilterUrl(str(blocklist), url.extra_domains, url.allowed_domains, url.soft_threshold, ledger)
        )
    steps.append(ExtractText(config.min_chars, Ledger(directory, "extract")))
    language, ledger = config.language, Ledger(directory, "language")
    steps.append(FilterLanguage(list(language.keep), language.threshold, str(model_path()), ledger))
    steps += quality_filters(config.quality, {name: Ledger(directory, name) for name in config.quality})
    return [*steps, WriteDocuments(directory)]


class Executor(LocalPipelineExecutor):
    """datatrove's local executor, with our own notion of "done" and a pool that notices when a worker dies.

    The original waits for ever on a worker that was killed (out of memory): `Pool.imap` loses its task
    silently.
    """

    def __init__(
        self, pipeline: list[Any], ranks: list[int], tasks: int, workers: int, directory: Path, logs: Path
    ):
        super().__init__(pipeline, tasks=tasks, workers=workers, logging_dir=str(logs), skip_completed=False)
        self.steps = pipeline
        self.ranks = ranks
        self.directory = directory
        self.log_file = str(logs / "stderr.log")

    def run_task(self, rank: int) -> int:
        """Do one task and commit its directory; datatrove's log lines go into a file, not to the console."""
        directory = task_directory(self.directory, rank)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        with (
            open(self.log_file, "a") as log,
            contextlib.redirect_stderr(log),
            contextlib.redirect_stdout(log),
        ):
            try:
                stats = self._run_for_rank(rank)
            finally:
                logger.remove()  # datatrove has just pointed loguru at `log`, which is about to be closed
        write_json(directory / "stats.json", counters(stats))
        os.replace(directory, directory.with_suffix(""))
        fsync_directory(self.directory)
        return rank

    def run(self) -> Iterator[int]:
        """Yields the number of every task when it is committed."""
        if self.workers == 1 or len(self.ranks) == 1:
            pipeline = self.steps
            for rank in self.ranks:
                self.pipeline = deepcopy(pipeline)
                yield self.run_task(rank)
            return
        # forkserver: no fork of a process that has threads (the progress bar), and heavy imports happen once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_prep.clean"])
        with ProcessPoolExecutor(self.workers, mp_context=context) as pool:
            futures = [pool.submit(self.run_task, rank) for rank in self.ranks]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    f"{self.directory}: a worker process was killed, most likely for want of memory: "
                    "set workers= lower and start the same command again (finished tasks are kept)"
                ) from error
            finally:
                for future in futures:
                    future.cancel()


def counters(stats: PipelineStats) -> dict[str, float]:
    """{"STEP/counter": total} of one task."""
    return {
        f"{step.name.split(': ')[-1]}/{name}": value.total
        for step in stats.stats
        for name, value in step.stats.items()
        if name not in ("doc_len", "total", "forwarded", "dropped")
    }


def clean(
    config: DataPrepConfig,
    ranges: list[Range],
    directory: Path,
    logs: Path,
    blocklist: Path | None,
    on_task: Callable[[int, bool], None],
) -> dict[str, Any]:
    """Run all tasks that `directory` does not hold yet. Returns the sums of their counters.

    `on_task(rank, fresh)` is called for every task, with fresh=False for one that an earlier run has done.
    """
    for name in THREADS:
        os.environ.setdefault(name, "1")  # inherited by the workers: one thread each
    directory.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    done = {rank for rank in range(len(ranges)) if task_path(directory, rank).is_dir()}
    for rank in sorted(done):
        on_task(rank, False)
    todo = [rank for rank in range(len(ranges)) if rank not in done]
    if todo:
        pipeline = build_pipeline(config, ranges, directory, blocklist)
        workers = min(config.num_workers(), len(todo))
        for rank in Executor(pipeline, todo, len(ranges), workers, directory, logs).run():
            on_task(rank, True)
    total: Counter[str] = Counter()
    for rank in range(len(ranges)):
        total.update(json.loads((task_path(directory, rank) / "stats.json").read_text()))
    return {"tasks": len(ranges), "counters": dict(sorted(total.items()))}


def task_path(directory: Path, rank: int) -> Path:
    """Where a committed task lies."""
    return task_directory(directory, rank).with_suffix("")
