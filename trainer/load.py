"""A whole model in one process, from wherever a user points: a run, a checkpoint, or a Hugging Face
directory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from trainer.chat.tokenizer import Tokenizer
from trainer.engine import checkpoint, commit
from trainer.errors import UserError
from trainer.model.config import ModelConfig, RopeScaling
from trainer.model.hf import read_hf_config, read_hf_weights
from trainer.model.transformer import Transformer


@dataclass
class Loaded:
    """`step` is None for a model that is not ours."""

    model: Transformer
    tokenizer: Tokenizer
    config: ModelConfig
    step: int | None


@dataclass
class Source:
    """Weights that can be read by name, and what they belong to. `tokenizer_dir` may be absent."""

    config: ModelConfig
    directory: Path
    step: int | None
    tokenizer_dir: Path | None

    def digest(self) -> str:
        """What a run that starts here remembers it by: a checkpoint's marker, else config and file sizes."""
        if self.step is not None:
            return (self.directory / commit.MARKER).read_text()
        files = sorted(self.directory.glob("*.safetensors"))
        parts = [
            (self.directory / "config.json").read_text(),
            *(f"{p.name} {p.stat().st_size}" for p in files),
        ]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors one by one."""
        if self.step is None:
            return read_hf_weights(self.directory, self.config)
        return checkpoint.read_weights(self.directory)


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """The dataclass from a checkpoint's `state.json`."""
    scaling = raw.get("rope_scaling")
    return ModelConfig(**{**raw, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def open_source(path: str | Path) -> Source:
    """Find the weights that `path` means; nothing big is read yet.

    Raises:
        UserError: nothing there, an unfinished checkpoint, or an architecture we do not have.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such directory; give a run, a checkpoint or a Hugging Face directory")
    if (path / "config.json").is_file():
        has_tokenizer = (path / "tokenizer.json").is_file()
        return Source(read_hf_config(path), path, None, path if has_tokenizer else None)
    found = commit.find(path)
    state = commit.read_state(found)
    tokenizer = found / "tokenizer"
    return Source(
        model_config(state["model"]), found, state["step"], tokenizer if tokenizer.is_dir() else None
    )


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """The model and its tokenizer, ready to generate. `dtype`: bf16 on a GPU, fp32 on a CPU unless given.

    Raises:
        UserError: see `open_source`; or no tokenizer beside the weights.
    """
    source = open_source(path)
    if source.tokenizer_dir is None:
        raise UserError(
            f"{source.directory}: no tokenizer.json beside the weights; "
            f"train with tokenizer=DIR or copy one there"
        )
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device("meta"):
        model = Transformer(source.config)
    model = model.to(dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in source.weights():
            if name in parameters:
                parameters[name].copy_(tensor)
    return Loaded(model.eval(), Tokenizer.load(source.tokenizer_dir), source.config, source.step)
