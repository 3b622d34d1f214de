"""`trivium export RUN --to hf [--out DIR] [--dtype bfloat16]`: a checkpoint as a directory for
`from_pretrained`.
"""

import argparse
from pathlib import Path

from trainer.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="trivium export", description=__doc__)
    parser.add_argument("run", help="run or checkpoint directory")
    parser.add_argument("--to", default="hf", choices=["hf"], help="form (default hf)")
    parser.add_argument("--out", help="output directory (default: hf in the run directory)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    args = parser.parse_args(argv)
    import torch

    from trainer.load import open_source
    from trainer.model.hf import export_hf

    source = open_source(args.run)
    if source.step is None:
        raise UserError(f"{args.run}: is a Hugging Face directory already")
    # Beside the checkpoints, never inside one: a checkpoint directory is what was committed and nothing else.
    out = Path(args.out) if args.out else source.directory.resolve().parent.parent / "hf"
    export_hf(
        source.config,
        source.weights(),
        out,
        tokenizer_dir=source.tokenizer_dir,
        dtype=getattr(torch, args.dtype),
    )
    print(f"{source.directory} -> {out} ({args.dtype})")
    return 0
