"""`trivium tokens`: a text as its tokens, in colours, each above its id."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from trainer.chat.tokenizer import Tokenizer
from trainer.errors import UserError

STYLES = tuple(f"black on bright_{colour}" for colour in ("cyan", "yellow", "green", "magenta"))
PLACES = ("runs/quickstart", "data/sample")  # where `make quickstart` leaves a tokenizer
MARKS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}


class Parser(argparse.ArgumentParser):
    """A wrong command line is a UserError: one line and exit 2, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help shows what there is")


def main(argv: list[str] | None = None) -> int:
    """`trivium tokens`; returns the exit code. Raises UserError."""
    parser = Parser(prog="trivium tokens", description="Show a text as tokens: coloured, each above its id.")
    parser.add_argument("text", nargs="?", help="the text; - reads standard input")
    parser.add_argument("--file", help="read the text from this file (UTF-8)")
    parser.add_argument(
        "--tokenizer", metavar="DIR_OR_RUN", help="whose tokenizer: a run, data, ... directory"
    )
    parser.add_argument("--run", metavar="RUN", help="the same as --tokenizer")
    parser.add_argument("--limit", type=int, default=1000, help="show so many tokens (default 1000; 0: all)")
    parser.add_argument("--no-ids", action="store_true", help="only the coloured text")
    parser.add_argument("--json", action="store_true", help="ids, texts and counts as one JSON object")
    args = parser.parse_args(argv)

    tokenizer = Tokenizer.load(find_tokenizer(args.tokenizer or args.run))
    text = _read_text(args.text, args.file)
    ids = tokenizer.encode(text)
    console = terminal_console()
    with quiet_pipe():
        if args.json:
            print(json.dumps(as_json(tokenizer, text, ids), ensure_ascii=False))
            return 0
        shown = ids if args.limit <= 0 else ids[: args.limit]
        for line in render(tokenizer, shown, console.width, with_ids=not args.no_ids):
            console.print(line, soft_wrap=True)
        if len(shown) < len(ids):
            console.print(f"… {len(ids) - len(shown):,} more tokens; --limit 0 shows them all", style="dim")
        console.print(summary(tokenizer, text, ids), style="dim", soft_wrap=True)
    return 0


def find_tokenizer(path: str | None) -> Path:
    """The tokenizer directory in or beside `path`; by default the quickstart's. UserError if none."""
    places = [Path(path)] if path is not None else [Path(place) for place in PLACES]
    for place in places:
        checkpoints = sorted(place.glob("checkpoints/*/COMMITTED"), key=lambda marker: _step(marker.parent))
        saved = [marker.parent / "tokenizer" for marker in reversed(checkpoints)]
        for candidate in [place, place / "tokenizer", *saved, place.parent / "tokenizer"]:
            if (candidate / "tokenizer.json").is_file():
                return candidate
    if path is None:
        raise UserError(
            f"no tokenizer in {' or '.join(PLACES)}: name one with --tokenizer DIR_OR_RUN, "
            f"or run make quickstart first"
        )
    if not Path(path).exists():
        raise UserError(f"{path}: no such directory; --tokenizer takes a tokenizer, run or data directory")
    raise UserError(f"{path}: no tokenizer.json in it, in tokenizer/ or in its checkpoints; name another")


def _step(checkpoint: Path) -> tuple[int, str]:
    digits = "".join(char for char in checkpoint.name if char.isdigit())
    return int(digits or 0), checkpoint.name


def _read_text(text: str | None, file: str | None) -> str:
    if text is not None and file is not None:
        raise UserError("trivium tokens: a text and --file were both given; leave one out")
    if file is not None:
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise UserError(f"--file {file}: {error.strerror}; give a readable text file") from None
        return decode_input(data, file)
    if text is not None and text != "-":
        return argument_text(text)
    if sys.stdin is None or (text is None and sys.stdin.isatty()):
        raise UserError('trivium tokens: no text; give one ("..."), --file FILE, or - for standard input')
    return decode_input(sys.stdin.buffer.read(), "standard input")


def decode_input(data: bytes, name: str) -> str:
    """UTF-8 text; what is none becomes U+FFFD, and a note says so."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        print(f"{name}: not UTF-8 at byte {error.start:,}; such bytes are shown as U+FFFD", file=sys.stderr)
        return data.decode(errors="replace")


def argument_text(text: str) -> str:
    """A word of the command line as UTF-8, also in a locale where Python read it as ASCII with surrogates."""
    return text if text.isascii() else os.fsencode(text).decode(errors="replace")


def visible(text: str) -> str:
    """One line, white space as marks, control characters escaped: no text can drive the terminal."""
    return "".join(MARKS.get(char) or (char if char.isprintable() else _escape(char)) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def render(tokenizer: Tokenizer, ids: list[int], width: int, with_ids: bool = True) -> Iterator[Text]:
    """Lines of at most `width` cells (a long token may be wider); a token with a line feed ends its line."""
    above, below, used = Text(), Text(), 0

    def flush() -> Iterator[Text]:
        yield above
        if with_ids:
            yield below

    for place, index in enumerate(ids):
        shown = visible(tokenizer.token_text(index))
        label = str(index) if with_ids else ""
        cells = max(cell_len(shown), len(label)) + (1 if with_ids else 0)
        if used and used + cells > width:
            yield from flush()
            above, below, used = Text(), Text(), 0
        above.append(shown, style=STYLES[place % len(STYLES)])
        above.append(" " * (cells - cell_len(shown)))
        below.append(label.ljust(cells), style="dim")
        used += cells
        if "\n" in tokenizer.token_text(index):
            yield from flush()
            above, below, used = Text(), Text(), 0
    if used:
        yield from flush()


def summary(tokenizer: Tokenizer, text: str, ids: list[int]) -> str:
    """Counts in one line."""
    size = int(tokenizer.token_bytes()[ids].sum())
    ratio = f"{size / len(ids):.2f} bytes/token" if ids else "no tokens"
    return (
        f"{len(ids):,} tokens · {len(text):,} characters · {size:,} bytes · {ratio} · "
        f"vocabulary {tokenizer.vocab_size:,} · {tokenizer.directory}"
    )


def as_json(tokenizer: Tokenizer, text: str, ids: list[int]) -> dict[str, object]:
    """The content of `--json`."""
    size = int(tokenizer.token_bytes()[ids].sum())
    return {
        "tokens": [{"id": index, "text": tokenizer.token_text(index)} for index in ids],
        "num_tokens": len(ids),
        "num_bytes": size,
        "bytes_per_token": size / len(ids) if ids else None,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": str(tokenizer.directory),
    }


def terminal_console() -> Console:
    """A console for the present standard output, which survives a locale that cannot show every character."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    return Console(highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Ends the command quietly when its reader has gone (`trivium tokens ... | head`)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
