"""Weights and configuration in and out of Hugging Face form, without transformers.

Families: Llama (plain), Mistral (Llama with a sliding window), Qwen 2 (biases on q, k, v), Qwen 3 (per-head
norms of q and k). The RoPE convention is the same, so weights map name by name and nothing is permuted. Only
safetensors and JSON are read: a `.bin` checkpoint is a pickle, which runs code when it is opened.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.errors import UserError
from trainer.model.config import ModelConfig
from trainer.model.hf_config import hf_config_dict, parse_hf_config
from trainer.model.transformer import Transformer

ROOT_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "trivium.json",
)
OURS = (*TOKENIZER_FILES, "config.json", "generation_config.json", "model.safetensors.index.json")
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
)  # tokens that end an answer; with a chat template generation stops there too


def hf_name(name: str) -> str:
    """Our parameter name -> Hugging Face's; KeyError for a name that no model of ours has."""
    if name in ROOT_NAMES:
        return ROOT_NAMES[name]
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return f"model.layers.{layer}.{BLOCK_NAMES[module]}.{kind}"


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter's name and shape, in the model's order; a tied head is not listed."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}


def export_hf(
    config: ModelConfig,
    named_tensors: Iterable[tuple[str, Tensor]],
    out_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 * 10**9,
    chat_template: str | None = None,
) -> Path:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` and vLLM load; returns it.

    `named_tensors`: (our name, whole tensor) in any order, taken one by one: no more than `max_shard_bytes`
    (and one tensor) are held. `config.json` is written last: a directory without it is not an export. An
    earlier export in `out_dir` is replaced. UserError if no family can express the model, if `out_dir` holds
    anything else, or if the tokenizer has ids that the model lacks. ValueError if a tensor is missing,
    unknown, twice there or of another shape.
    """
    out, config_json = Path(out_dir), hf_config_dict(config, dtype)
    _make_room(out)
    generation: dict[str, Any] = {"do_sample": True, "temperature": 1.0}
    if tokenizer_dir is not None:
        ids = _export_tokenizer(Path(tokenizer_dir), out, config, chat_template)
        config_json |= {key: value[0] if isinstance(value, list) else value for key, value in ids.items()}
        generation |= ids
    _write_json(out / "generation_config.json", generation)
    _write_weights(config, named_tensors, out, dtype, max_shard_bytes)
    _write_json(out / "config.json", config_json)
    return out


def _make_room(out: Path) -> None:
    if out.is_dir():
        foreign = [
            path.name for path in out.iterdir() if path.name not in OURS and path.suffix != ".safetensors"
        ]
        if foreign:
            raise UserError(
                f"{out}: holds {sorted(foreign)[0]}, which is no part of an export; choose a new directory"
            )
        for path in out.iterdir():
            path.unlink()
    elif out.exists():
        raise UserError(f"{out}: is a file; choose a directory to export to")
    out.mkdir(parents=True, exist_ok=True)


def _write_weights(
    config: ModelConfig,
    named_tensors: Iterable[tuple[str, Tensor]],
    out: Path,
    dtype: torch.dtype,
    max_bytes: int,
) -> None:
    expected = parameter_shapes(config)
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        save_file(shard, out / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard, size = {}, 0

    for name, tensor in named_tensors:
        if name == "head.weight" and config.tie_embeddings:
            continue
        if name not in expected:
            raise ValueError(f"{name}: unknown or given twice")
        if tensor.shape != expected.pop(name):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} is not the model's")
        stored = tensor.detach().to("cpu", dtype).contiguous()
        bytes_ = stored.numel() * stored.element_size()
        if shard and size + bytes_ > max_bytes:
            flush()
        shard[hf_name(name)] = stored
        size, total = size + bytes_, total + bytes_
    if expected:
        raise ValueError(f"missing tensors: {', '.join(list(expected)[:3])} ({len(expected)} in all)")
    flush()
    if len(shards) == 1:
        (out / "part-0.safetensors").rename(out / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"part-{index}.safetensors").rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(out / "model.safetensors.index.json", index_json)


def _export_tokenizer(
    source: Path, out: Path, config: ModelConfig, chat_template: str | None
) -> dict[str, int | list[int]]:
    """Copies the tokenizer's files; returns eos_token_id (a list if turns end otherwise), pad_token_id."""
    tokenizer_json = _read_json(source / "tokenizer.json")
    added = {token["content"]: token["id"] for token in tokenizer_json.get("added_tokens", [])}
    largest = max([*tokenizer_json["model"]["vocab"].values(), *added.values()])
    if largest >= config.vocab_size:
        raise UserError(
            f"{source}: has token id {largest}, the model has model.vocab_size={config.vocab_size}"
        )
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    settings = (
        _read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    )
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    settings["model_max_length"] = config.max_seq_len
    if chat_template is not None:
        settings["chat_template"] = chat_template  # read by transformers 4; 5 reads the file
        (out / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    _write_json(out / "tokenizer_config.json", settings)

    ids: dict[str, int | list[int]] = {}
    eos = added.get(_token_text(settings.get("eos_token")))
    ends = [] if eos is None else [eos]
    if "chat_template" in settings:
        ends += [added[token] for token in TURN_ENDS if token in added and added[token] != eos]
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    pad = added.get(_token_text(settings.get("pad_token")))
    if pad is not None:
        ids["pad_token_id"] = pad
    return ids


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    """Hugging Face stores a special token as its text or as a dict that holds it."""
    return token["content"] if isinstance(token, dict) else token


def read_hf_config(directory: str | Path) -> ModelConfig:
    """The architecture of a Hugging Face directory; UserError if it is not one that we build."""
    path = Path(directory) / "config.json"
    return parse_hf_config(_read_json(path), str(path))


def read_hf_weights(directory: str | Path, config: ModelConfig | None = None) -> Iterator[tuple[str, Tensor]]:
    """(our name, whole tensor as stored) in the model's order, one at a time from memory-mapped files.

    UserError names the file that is missing, truncated or a pickle, and the tensor that is missing or of a
    wrong shape.
    """
    directory = Path(directory)
    config = read_hf_config(directory) if config is None else config
    files = _weight_files(directory)
    for name, shape in parameter_shapes(config).items():
        source = hf_name(name)
        if source not in files:
            raise UserError(
                f"{directory}: tensor {source} is missing; the download is incomplete or of another model"
            )
        try:
            with safe_open(files[source], framework="pt") as file:
                tensor = file.get_tensor(source)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{files[source]}: cannot be read ({error}); copy the file again") from error
        if tensor.shape != shape:
            raise UserError(
                f"{files[source]}: {source} has shape {tuple(tensor.shape)}, config.json says {tuple(shape)}"
            )
        yield name, tensor


def _weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return {name: directory / file for name, file in _read_json(index)["weight_map"].items()}
    single = directory / "model.safetensors"
    if not single.is_file():
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{directory / pickles[0]}: a pickle, which is never opened; convert it to safetensors"
            )
        raise UserError(f"{directory}: no model.safetensors and no model.safetensors.index.json")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{single}: cannot be read ({error}); copy the file again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a Hugging Face directory?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
