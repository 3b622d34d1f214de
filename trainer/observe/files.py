"""Files that survive a kill at any instant: whole-file replacement, and append-only lines of JSON.

Two forms are enough for a run directory. A file that is rewritten (run.json, config.yaml) goes through
`replace_text`: a reader sees the old or the new text, never half of one. A file that grows (metrics.jsonl,
goodput.jsonl) is appended to in whole lines; a kill in the middle of a write leaves a torn last line, which
`read_lines` leaves out and `mend_lines` cuts off before anything is appended behind it.
"""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.durable import fsync_directory, write_durably
from trainer.errors import UserError

Record = dict[str, Any]

# What the operating system says when the user, not we, must act; anything else keeps its traceback.
FIXES = {
    errno.ENOSPC: "no space left on the device: free some, or choose another run_dir",
    errno.EDQUOT: "disk quota exceeded: free some, or choose another run_dir",
    errno.EACCES: "permission denied: choose a run_dir you can write to",
    errno.EPERM: "operation not permitted: choose a run_dir you can write to",
    errno.EROFS: "read-only file system: choose another run_dir",
    errno.EEXIST: "a file is there where a directory should be: choose another run_dir",
    errno.ENOTDIR: "a part of this path is a file, not a directory: choose another run_dir",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter run_dir",
}


@contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turns an OSError that the user can mend (full disk, no permission) into a one-line UserError naming
    `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FIXES:
            raise
        raise UserError(f"{error.filename or path}: {FIXES[error.errno]}") from error


def replace_text(path: Path, text: str) -> None:
    """Replaces the file at `path` atomically and durably: temporary file, fsync, rename, fsync of the
    directory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        try:
            write_durably(temporary, text)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(path.parent)


def to_line(record: Record) -> str:
    """One line of strict JSON. NaN and infinities become the strings "nan", "inf", "-inf": JSON has no such
    numbers, and a lost NaN loss would be the one line that mattered."""
    plain = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[Record]:
    """All whole records of a JSON-lines file; [] if it does not exist. A torn last line is left out; a
    broken line elsewhere cannot come from a kill and raises UserError."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # empty when the file ends in a newline, as it should
    records = []
    for line_number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if (
                line_number == len(lines) and not torn
            ):  # a block of zeros or a half-synced page at the very end
                break
            raise UserError(f"{path}: line {line_number} is not JSON ({error}): delete that line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {line_number} is not a JSON object: delete that line")
        records.append(record)
    return records


def mend_lines(path: Path) -> int:
    """Cuts a torn last line off a JSON-lines file, so that what is appended next starts on a line of its own.
    Returns the number of bytes cut."""
    if not path.exists():
        return 0
    with explained(path), open(path, "r+b") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        last = content[content.rfind(b"\n", 0, max(end - 1, 0)) + 1 : end]
        if last.strip():
            try:
                json.loads(last)
            except ValueError:
                end -= len(last)
        if end < len(content):
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
        return len(content) - end


class LineFile:
    """An append-only JSON-lines file, flushed to the operating system at every line (so a killed process
    loses nothing) and to the disk at `sync` (so a lost machine loses nothing since the last checkpoint)."""

    def __init__(self, path: Path):
        self.path = path
        mend_lines(path)
        with explained(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the run)

    def append(self, record: Record) -> None:
        with explained(self.path):
            self._file.write(to_line(record))
            self._file.flush()

    def sync(self) -> None:
        with explained(self.path):
            os.fsync(self._file.fileno())

    def keep(self, through_step: int, replaced: Path) -> int:
        """Drops the records with `step` beyond `through_step` (they will be trained again) and appends them
        to the file `replaced`; returns how many. The side file is written first: a kill between the two
        loses nothing."""
        records = read_lines(self.path)
        dropped = [record for record in records if record.get("step", 0) > through_step]
        if dropped:
            with explained(replaced), open(replaced, "a", encoding="utf-8") as file:
                file.writelines(map(to_line, dropped))
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            kept = [record for record in records if record.get("step", 0) <= through_step]
            replace_text(self.path, "".join(map(to_line, kept)))
            with explained(self.path):
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        return len(dropped)

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()
