"""`trivium chat RUN`: continue text with a model, once or line by line; look at what it would say next."""

import argparse
import json
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.chat.show import Parser, argument_text, decode_input, quiet_pipe, terminal_console, visible
from trainer.errors import UserError
from trainer.generate.complete import Candidate, Story
from trainer.generate.engine import Completion
from trainer.generate.sampling import SamplingConfig

BAR = 40  # cells
HELP = """text            continue with it, on a new line after the text so far; an empty line just goes on
/top N [TEXT]   the N likeliest next tokens, with their probabilities
/temp X  /topk K  /topp P  /max N  /seed N      change the sampling (now: {settings})
/show           the text so far      /reset   forget it      /help      /quit (or Ctrl-D)"""
SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "temp": ("temperature", float),
    "topk": ("top_k", int),
    "topp": ("top_p", float),
    "max": ("max_new_tokens", int),
}


def main(argv: list[str] | None = None, load: Callable[..., Any] | None = None) -> int:
    """`trivium chat`; returns the exit code. Raises UserError. `load` stands in for `load_model` in tests."""
    args = _parser().parse_args(argv)
    sampling = SamplingConfig(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p, stop_strings=args.stop
    )
    sampling.validate()
    text = args.prompt if args.prompt is None else argument_text(args.prompt)
    if text is None and not sys.stdin.isatty():
        text = decode_input(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    if load is None:
        from trainer.load import load_model

        load = load_model
    loaded = load(args.run, device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    story = Story(loaded.model, loaded.tokenizer, sampling, args.seed)
    console = terminal_console()
    with quiet_pipe():
        if text is None:
            name = f"{args.run}, step {loaded.step:,}" if loaded.step is not None else args.run
            Repl(story, console, name).run()
        elif args.top:
            _print_top(console, story.top(text, args.top), args.json)
        else:
            _complete_once(console, story, text, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trivium chat",
        description="Continue text with a model. With --prompt or a pipe: once, and into a pipe goes the "
        "completion alone. Else: line by line, /help there.",
    )
    parser.add_argument("run", help="a run, checkpoint or Hugging Face directory")
    parser.add_argument("--prompt", help="the text to continue ('' starts a document)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, default=50, help="only the k likeliest tokens (default 50; 0: all)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="only the likeliest that sum up to p (default 1: all)"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="only those at least p times as likely as the best"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop after this text")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same text")
    parser.add_argument("--top", type=int, metavar="N", help="show the N likeliest next tokens instead")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")
    return parser


def _complete_once(console: Console, story: Story, text: str, as_json: bool) -> None:
    parts: list[str] = []
    if as_json:
        done = story.proceed(text, parts.append)
        print(json.dumps({"prompt": text, "completion": "".join(parts), **vars(done)}, ensure_ascii=False))
        return
    if console.is_terminal:  # into a pipe goes the completion alone
        console.out(text, style="dim", end="")
    story.proceed(text, _writer(console))
    console.out("")


def _writer(console: Console) -> Callable[[str], None]:
    """Streams text; on a terminal, control characters are shown rather than obeyed."""

    def write(text: str) -> None:
        if console.is_terminal:
            text = "".join(visible(char) if _controls(char) else char for char in text)
        console.file.write(text)
        console.file.flush()

    return write


def _controls(char: str) -> bool:
    return unicodedata.category(char) == "Cc" and char not in "\n\t"


def _print_top(console: Console, candidates: list[Candidate], as_json: bool = False) -> None:
    if as_json:
        print(json.dumps({"top": [vars(candidate) for candidate in candidates]}, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for title, side in (
        ("#", "right"),
        ("token", "left"),
        ("id", "right"),
        ("probability", "right"),
        ("", "left"),
    ):
        table.add_column(title, justify=side, no_wrap=True)  # type: ignore[arg-type]
    most = max((candidate.probability for candidate in candidates), default=1.0)
    for place, candidate in enumerate(candidates, 1):
        bar = Text("█" * max(1, round(BAR * candidate.probability / most)), style="cyan")
        probability = f"{candidate.probability:.2%}"
        table.add_row(str(place), Text(visible(candidate.text)), str(candidate.id), probability, bar)
    console.print(table)
    total = sum(candidate.probability for candidate in candidates)
    console.print(f"together {total:.1%} · model probabilities, temperature 1, nothing cut off", style="dim")


class Repl:
    """Line by line. A mistake prints one line and changes nothing."""

    def __init__(self, story: Story, console: Console, name: str):
        self.story, self.console, self.name = story, console, name

    def run(self) -> None:
        """Reads lines until /quit or Ctrl-D."""
        history = _history()
        self.console.print(f"{self.name} · base model: it continues your text · /help", style="bold")
        try:
            while True:
                try:
                    line = input("> ")
                except EOFError:
                    self.console.out("")
                    return
                except KeyboardInterrupt:
                    self.console.print("\n(Ctrl-D or /quit ends)", style="dim")
                    continue
                try:
                    if not self.handle(line):
                        return
                except UserError as error:
                    self.console.print(str(error), style="red", soft_wrap=True)
        finally:
            _save_history(history)

    def handle(self, line: str) -> bool:
        """One line of input; False ends. UserError for a wrong command or value."""
        if line.startswith("/"):
            return self._command(*line[1:].split(maxsplit=1))
        before = self.story.ids
        inside = before and before[-1] not in self.story.tokenizer.eos_ids
        text = "\n" + line if inside and line else line
        self.console.out("…" if before else text, style="dim", end="")
        done = self.story.proceed(text, _writer(self.console))
        self.console.out("")
        self.console.print(self._status(done), style="dim")
        return True

    def _command(self, name: str = "", rest: str = "") -> bool:
        if name in ("quit", "exit", "q"):
            return False
        if name == "reset":
            self.story.reset()
            self.console.print("a new page", style="dim")
        elif name == "show":
            self.console.out(self.story.tokenizer.decode(self.story.ids))
        elif name == "top":
            count, _, text = rest.partition(" ")
            _print_top(self.console, self.story.top(text, _number("/top", count or "10", int)))
        elif name == "seed":
            self.story.seed = _number("/seed", rest, int)
            self.story.turn = 0
            self.console.print(self._settings(), style="dim")
        elif name in SETTINGS:
            key, kind = SETTINGS[name]
            self.story.set(**{key: _number(f"/{name}", rest, kind)})
            self.console.print(self._settings(), style="dim")
        elif name == "help":
            self.console.print(HELP.format(settings=self._settings()))
        else:
            raise UserError(f"/{name}: no such command; /help lists them")
        return True

    def _settings(self) -> str:
        now = self.story.sampling
        shown = " ".join(f"{short} {getattr(now, key)}" for short, (key, _) in SETTINGS.items())
        return f"{shown} seed {self.story.seed}"

    def _status(self, done: Completion) -> str:
        speed = len(done.ids) / max(self.story.seconds, 1e-9)
        used = f"{len(self.story.ids):,} of {self.story.model.config.max_seq_len:,} tokens used"
        return f"[{len(done.ids)} tokens · {speed:,.0f}/s · ended by {done.stop_reason} · {used}]"


def _number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError(
            f"{name} {text}: expected a number, like {name} {'1' if kind is int else '0.8'}"
        ) from None


def _history() -> Path | None:
    """Arrow keys and the lines of earlier sessions, where Python has readline."""
    try:
        import readline
    except ImportError:  # not in every Python
        return None
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state).expanduser() / "trivium" / "chat_history"
    try:
        readline.read_history_file(path)
    except OSError:  # none yet, or not readable: a session without history is fine
        readline.clear_history()
    return path


def _save_history(path: Path | None) -> None:
    if path is None:
        return
    import readline

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.set_history_length(1000)
        readline.write_history_file(path)
    except OSError:  # no home, read-only, full: history is a comfort and not worth an error
        return
