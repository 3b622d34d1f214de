"""The whole job on a laptop CPU, command by command: `trivium quickstart`

Web pages -> clean text -> tokenizer -> token shards -> a trained model -> samples, a Hugging Face export, a
report. Each line that starts with `$` is the command that is run; type it yourself to run it again. No
network is used.
"""

import argparse
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from trainer.errors import EXIT_STOPPED, UserError
from trainer.observe.loggers import read_metrics

PROMPT = "To create a table,"
COMMANDS = (
    ("the built-in web pages become documents, a tokenizer and token shards", "data"),
    ("a model of 4 M parameters learns to predict them", "pretrain experiment=quickstart"),
    ("it goes out as a Hugging Face model", "export runs/quickstart"),
    ("the run becomes one page with its curves", "report runs/quickstart"),
    ("and writes text", f'chat runs/quickstart --prompt "{PROMPT}" --max-new-tokens 60 --seed 7'),
)
NEXT = """Next (once per shell: source .venv/bin/activate):
  trivium chat runs/quickstart                    talk to it; /top 10 shows what it would say next
  trivium tokens "Tokens are not words."          see text as the model sees it
  trivium pretrain experiment=quickstart          says that it is done; steps=1000 goes on
  accelerate launch --config_file configs/accelerate/zero3.yaml -m trainer.pretrain \\
      experiment=quickstart run_dir=runs/zero3    the same run on 2 ranks under DeepSpeed: the same losses"""


def main(argv: list[str] | None = None) -> int:
    """Run it all; returns the exit code. Raises UserError where a step failed."""
    argparse.ArgumentParser(prog="trivium quickstart", description=__doc__).parse_args(argv)
    console = Console(soft_wrap=True)
    started = time.perf_counter()
    for what, command in COMMANDS:
        console.print(f"\n[bold]{what}[/]\n[green]$ trivium {command}[/]", highlight=False)
        words = [sys.executable, "-m", "trainer", *shlex.split(command)]
        code = _run(words)
        if code == EXIT_STOPPED:
            return code
        if code:
            raise UserError(f"`trivium {command}` failed, see above; mend it and run the quickstart again")
    run = Path("runs/quickstart")
    bpb = [line["val/bpb"] for line in read_metrics(run / "metrics.jsonl") if "val/bpb" in line]
    minutes = (time.perf_counter() - started) / 60
    console.print(f"\n\n[bold]Done in {minutes:.1f} minutes.[/]", highlight=False)
    console.print(
        f"held-out text: {bpb[0]:.3f} bits per byte untrained -> {bpb[-1]:.3f} trained "
        f"({100 * (1 - bpb[-1] / bpb[0]):.0f} % less)",
        highlight=False,
    )
    console.print(_check_export(run / "hf"), highlight=False)
    console.print(f"curves and samples: {run}/report.html\n\n{NEXT}", highlight=False, markup=False)
    return 0


def _run(words: list[str]) -> int:
    """The command's exit code. Ctrl-C reaches it as well: it saves and stops, and we wait for that."""
    child = subprocess.Popen(words)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


def _check_export(path: Path) -> str:
    """Load the export with transformers, if it is installed, and compare its logits with ours."""
    if find_spec("transformers") is None:
        return f"Hugging Face model: {path} (install trivium[hf] to have it loaded and compared here)"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from trainer.load import load_model

    logging.disable_progress_bar()
    ours = load_model("runs/quickstart")
    theirs = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([AutoTokenizer.from_pretrained(path)(PROMPT)["input_ids"]])
    with torch.inference_mode():
        worst = (theirs(ids).logits - ours.model(ids)).abs().max().item()
    kind = type(theirs).__name__
    return f"Hugging Face model: {path} loads as {kind}, its logits within {worst:.0e} of ours"
