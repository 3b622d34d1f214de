"""`trivium data`: archives of web pages in; documents, a tokenizer and token shards out. Resumes.

trivium data                                         the built-in sample -> data/sample
trivium data input=/data/cc/*.warc.gz output=/data/web tokenizer.vocab_size=32768 workers=32

OUT/documents/documents-NNNN.jsonl.zst   clean text, with its origin
OUT/tokenizer/                           the tokenizer
OUT/train/, OUT/val/                     token shards, and where in them each document lies
OUT/report.md, OUT/report.json           what was dropped and why
OUT/work/                                manifests; every dropped page (pages-*/task-*/dropped-*)
"""

import sys

from rich.console import Console

from data_prep.files import disk_errors
from data_prep.options import compose_config, help_text
from trainer.errors import EXIT_USER_ERROR, UserError

NO_TERMINAL_WIDTH = 120
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 after one line about a user's mistake."""
    arguments = sys.argv[1:] if argv is None else argv
    console = Console()
    if not console.is_terminal:
        console = Console(width=NO_TERMINAL_WIDTH)  # rich assumes 80 columns, too few for the table
    if {"-h", "--help"} & set(arguments):
        console.print(help_text(), highlight=False, markup=False)
        return 0
    try:
        config = compose_config(arguments)
        from data_prep.job import Job  # behind the config: a mistyped key is told at once
        from data_prep.report import print_report

        job = Job(config, console)
        with disk_errors(job.out):
            report = job.run()
        print_report(console, report)
    except UserError as error:
        print(f"trivium: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    out = config.output
    console.print(f"report: {out}/report.md   next: trivium pretrain data.train={out}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
