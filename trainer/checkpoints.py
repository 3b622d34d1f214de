"""Look after the checkpoints of a run: `trivium checkpoints RUN [--verify] [--prune N]`

Lists them with what wrote them, says which one a resume would use, reads every byte again with --verify, and
deletes all but the newest N (and every M-th step) with --prune. Exit code 1: the newest one is damaged.
"""

import argparse
import fcntl
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.engine import commit
from trainer.engine.checkpoint_config import CheckpointConfig
from trainer.errors import UserError
from trainer.launch import run_main


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="trivium checkpoints", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="run directory")
    parser.add_argument("--verify", action="store_true", help="compare every file with its hash")
    parser.add_argument("--prune", type=int, metavar="N", help="delete all but the newest N (at least 2)")
    parser.add_argument(
        "--keep-every", type=int, default=0, metavar="M", help="keep multiples of M steps, too"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(argv)
    run = Path(args.run)
    root = run / "checkpoints"
    if not root.is_dir():
        raise UserError(f"{root}: no such directory; give a run directory")
    removed: list[int] = []
    if args.prune is not None:
        removed = _prune(run, root, CheckpointConfig(keep_last=args.prune, keep_every=args.keep_every))
    rows = [_look(path, args.verify) for path in sorted(root.iterdir()) if path.is_dir()]
    whole = [row["step"] for row in rows if row["verdict"] in ("whole", "sizes are right")]
    newest = max(whole, default=None)
    if args.json:
        print(json.dumps({"checkpoints": rows, "resume_from": newest, "removed": removed}, indent=1))
    else:
        _show(run, rows, newest, removed, args.verify)
    committed = [row for row in rows if row["committed"]]
    return 1 if committed and committed[-1]["step"] != newest else 0


def _look(path: Path, hashes: bool) -> dict[str, Any]:
    """One directory as a row; what is wrong with it in words."""
    row: dict[str, Any] = {"name": path.name, "step": None, "committed": commit.is_committed(path)}
    row |= {"bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), "written_by": ""}
    row["time"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
    match = commit.NAME.search(path.name)
    if match is None:
        row["verdict"] = (
            "set aside as damaged" if path.name.endswith(".damaged") else "a save that did not finish"
        )
        return row
    row["step"] = int(match[1])
    problem = commit.check(path, hashes)
    row["verdict"] = problem.removeprefix(f"{path}/").removeprefix(f"{path} ") or (
        "whole" if hashes else "sizes are right"
    )
    if not problem:
        state = commit.read_state(path)
        row["written_by"] = f"{state['engine']} x{state['world']}"
    return row


def _prune(run: Path, root: Path, config: CheckpointConfig) -> list[int]:
    """Delete under the run's lock: a run that is going on looks after its checkpoints itself."""
    if config.keep_last < 2:
        raise UserError(
            f"--prune {config.keep_last}: must be at least 2, or one bad disk block costs the run"
        )
    config.validate()
    with open(run / ".lock", "a+", encoding="utf-8") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{run}: the run is going on and prunes by itself; set checkpoint.keep_last"
            ) from error
        return commit.prune(root, config)


def _show(
    run: Path, rows: list[dict[str, Any]], newest: int | None, removed: list[int], verify: bool
) -> None:
    console = Console()
    table = Table("step", "written", "size", "by", "verdict")
    for row in rows:
        mark = "[green]" if row["step"] is not None and row["step"] == newest else ""
        step = str(row["step"]) if row["step"] is not None else row["name"]
        table.add_row(
            mark + step, row["time"], f"{row['bytes'] / 1e6:.1f} MB", row["written_by"], row["verdict"]
        )
    console.print(table)
    if removed:
        console.print(f"deleted: steps {', '.join(map(str, removed))}")
    if newest is None:
        console.print("a resume would start from the beginning: no checkpoint is whole")
        return
    hint = "" if verify else f" (not read yet: trivium checkpoints {run} --verify)"
    console.print(f"a resume would go on from step {newest}{hint}")


if __name__ == "__main__":
    sys.exit(run_main(main))
