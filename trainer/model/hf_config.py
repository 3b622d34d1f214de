"""config.json of Hugging Face <-> ModelConfig.

Written in the older form (`rope_theta`, `rope_scaling`), which every transformers since 4.40, vLLM and
llama.cpp read; both that form and the `rope_parameters` of transformers 5 are understood.
"""

from typing import Any

import torch

from trainer.errors import UserError
from trainer.model.config import ModelConfig, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What transformers assumes where config.json is silent, where the families differ.
DEFAULT_HEAD_DIM = {"qwen3": 128}
DEFAULT_MAX_SEQ_LEN = {"llama": 2048, "mistral": 4096 * 32, "qwen2": 32768, "qwen3": 32768}
UNREAD_YARN = {"attention_factor", "mscale", "mscale_all_dim", "truncate"}
DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}


def hf_family(config: ModelConfig) -> str:
    """The Hugging Face model type that computes exactly this model; UserError if there is none."""
    if config.qk_norm and config.qkv_bias:
        raise UserError(
            "model.qk_norm=true with model.qkv_bias=true: no Hugging Face family has both; turn one off"
        )
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    return "llama" if config.sliding_window is None else "mistral"


def hf_config_dict(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json, without token ids."""
    family = hf_family(config)
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_dict(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family == "llama":
        out |= {"attention_bias": False, "mlp_bias": False}
    if family == "mistral":
        out["sliding_window"] = config.sliding_window
    if family == "qwen3":
        out["attention_bias"] = False
    if family in ("qwen2", "qwen3"):
        out["use_sliding_window"] = config.sliding_window is not None
        out["sliding_window"] = config.sliding_window
        out["max_window_layers"] = 0 if config.sliding_window is not None else config.num_layers
    return out


def _rope_dict(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        out |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        out |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if scaling.kind != "linear":
        out["original_max_position_embeddings"] = scaling.original_max_seq_len
    return out


def parse_hf_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """ModelConfig of a parsed config.json; `where` names the file in a UserError."""
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(f"{where}: model_type={family}: can read {', '.join(ARCHITECTURES)}")

    def refuse(key: str, why: str) -> None:
        raise UserError(f"{where}: {key}={raw.get(key)}: {why}")

    if raw.get("attention_bias") or raw.get("mlp_bias"):
        refuse(
            "attention_bias" if raw.get("attention_bias") else "mlp_bias", "biases there are not supported"
        )
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "only silu is supported")
    if raw.get("quantization_config"):
        refuse("quantization_config", "quantised weights cannot be trained; use the original checkpoint")

    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor: only 1.0 is supported")
    try:
        heads = int(raw["num_attention_heads"])
        kv_heads = raw.get("num_key_value_heads", DEFAULT_KV_HEADS.get(family, heads))
        max_seq_len = int(raw.get("max_position_embeddings", DEFAULT_MAX_SEQ_LEN[family]))
        config = ModelConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=heads if kv_heads is None else int(kv_heads),
            head_dim=raw.get("head_dim", DEFAULT_HEAD_DIM.get(family)),
            intermediate_size=int(raw["intermediate_size"]),
            max_seq_len=max_seq_len,
            rope_theta=float(rope.pop("rope_theta", raw.get("rope_theta", 10000.0))),
            rope_scaling=_parse_rope(rope, max_seq_len, where),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            qk_norm=family == "qwen3",
            qkv_bias=family == "qwen2",
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            sliding_window=_parse_window(raw, family, where),
            init_std=float(raw.get("initializer_range", 0.02)),
        )
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing") from None
    config.validate()
    return config


def _parse_rope(rope: dict[str, Any], max_seq_len: int, where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    scaling = RopeScaling(kind=kind, factor=float(rope["factor"]))
    scaling.original_max_seq_len = int(rope.get("original_max_position_embeddings", max_seq_len))
    for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        if rope.get(name) is not None:
            setattr(scaling, name, float(rope[name]))
    if kind == "yarn" and rope.keys() & UNREAD_YARN:
        raise UserError(f"{where}: rope_scaling with {sorted(rope.keys() & UNREAD_YARN)[0]} is not supported")
    return scaling


def _parse_window(raw: dict[str, Any], family: str, where: str) -> int | None:
    """One window for all layers, or none; UserError if only some layers have it."""
    if family == "llama":
        return None
    if family == "mistral":
        return raw.get("sliding_window", 4096)
    if not raw.get("use_sliding_window", False):
        return None
    layers = int(raw["num_hidden_layers"])
    first = int(raw.get("max_window_layers", 28))
    kinds = raw.get("layer_types") or ["full_attention"] * min(first, layers) + ["sliding_attention"] * (
        layers - first
    )
    if len(set(kinds)) > 1:
        raise UserError(f"{where}: layer_types: a sliding window on some layers only is not supported")
    return raw.get("sliding_window", 4096) if kinds[0] == "sliding_attention" else None
