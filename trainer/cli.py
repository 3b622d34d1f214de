"""`trivium COMMAND ...`: one table of commands; each is imported only when it is called."""

import importlib
import sys

from trainer import __version__
from trainer.errors import UserError
from trainer.launch import run_main

COMMANDS = {
    "quickstart": ("trainer.quickstart", "all of the below on the built-in sample, minutes on a laptop"),
    "data": ("data_prep.run", "web archives -> clean documents, tokenizer, token shards"),
    "pretrain": ("trainer.pretrain", "train a language model on token shards; again: resume"),
    "chat": ("trainer.generate.terminal", "complete text with a trained model, or show its next tokens"),
    "tokens": ("trainer.chat.show", "show a text as coloured tokens with their ids"),
    "export": ("trainer.export", "write a run as a Hugging Face model"),
    "checkpoints": ("trainer.checkpoints", "list, verify and prune the checkpoints of a run"),
    "replay": ("trainer.replay", "run one step of a run again and show the documents of its batch"),
    "verify": ("trainer.verify", "prove that a run killed and resumed elsewhere is the unbroken one"),
    "parity": ("trainer.parity", "the numerics matrix: every engine against one plain loop, on your machine"),
    "report": ("trainer.observe.report", "one HTML page about a run, also while it goes on"),
}


def overview() -> str:
    rows = "\n".join(f"  trivium {name:12}{what}" for name, (_, what) in COMMANDS.items())
    return (
        f"Trivium {__version__}: one engine for pretraining, fine-tuning and practice with rewards"
        f"\n\n{rows}\n\n"
        f"`trivium COMMAND --help` says more. First time here: make quickstart"
    )


def dispatch(argv: list[str]) -> int:
    """Run the command that `argv` names. Raises UserError."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"{argv[0]}: no such command; there are {', '.join(COMMANDS)}")
    return int(importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]))


def main() -> int:
    """Entry point of the `trivium` script."""
    return run_main(dispatch)


if __name__ == "__main__":
    sys.exit(main())
