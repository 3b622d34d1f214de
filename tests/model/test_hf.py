"""Logits equal to transformers' on random models of every family, in both directions."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from trainer.errors import UserError
from trainer.model.config import ModelConfig, RopeScaling
from trainer.model.hf import export_hf, parameter_shapes, read_hf_config, read_hf_weights
from trainer.model.init import init_weights
from trainer.model.transformer import Transformer

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "intermediate_size": 80,
    "max_seq_len": 256,
}
LLAMA3 = RopeScaling("llama3", factor=4.0, original_max_seq_len=64)
VARIANTS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_embeddings": True, "rope_theta": 500000.0}),
    "llama-rope-llama3": ("Llama", {"rope_scaling": LLAMA3, "head_dim": 16}),
    "llama-rope-linear": (
        "Llama",
        {"rope_scaling": RopeScaling("linear", factor=2.0, original_max_seq_len=256)},
    ),
    "qwen3-rope-yarn": ("Qwen3", {"rope_scaling": RopeScaling("yarn", 4.0, 64), "qk_norm": True}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"qkv_bias": True, "tie_embeddings": True, "norm_eps": 1e-6, "rope_theta": 1e6}),
    "qwen2-window": ("Qwen2", {"qkv_bias": True, "sliding_window": 5}),
    "qwen3": ("Qwen3", {"qk_norm": True, "head_dim": 16, "norm_eps": 1e-6}),
    "qwen3-window": ("Qwen3", {"qk_norm": True, "head_dim": 16, "sliding_window": 6, "tie_embeddings": True}),
}
TOKENS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    """Noise on every parameter, norms and biases too, large enough that any mistake shows in the logits."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def our_model(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    init_weights(model, seed=1)
    shake(model)
    return model


@torch.no_grad()
def assert_same_logits(ours: Transformer, theirs: torch.nn.Module) -> None:
    logits = ours(TOKENS)
    assert logits.std() > 0.1
    torch.testing.assert_close(theirs(TOKENS).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_export_gives_the_same_logits_in_transformers(variant: str, tmp_path: Path):
    family, options = VARIANTS[variant]
    config = ModelConfig(**SHAPE, **options)
    ours = our_model(config)
    shards = 60_000
    out = export_hf(config, ours.named_parameters(), tmp_path, dtype=torch.float32, max_shard_bytes=shards)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < shards + 4096 or len(load_file(path)) == 1 for path in files)

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == f"{family}ForCausalLM"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same_logits(ours, theirs)

    assert read_hf_config(out) == ModelConfig(**SHAPE, **options | {"head_dim": config.head_size})
    for name, tensor in read_hf_weights(out):
        assert torch.equal(tensor, ours.get_parameter(name))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_transformers_checkpoint_gives_the_same_logits_here(variant: str, tmp_path: Path):
    family, options = VARIANTS[variant]
    options = {"num_kv_heads": 3, "qk_norm": False, "qkv_bias": False, "sliding_window": None} | options
    rope = options.get("rope_scaling")
    rope_parameters = {"rope_type": "default", "rope_theta": options.get("rope_theta", 10000.0)}
    if rope is not None:
        rope_parameters |= {"rope_type": rope.kind, "factor": rope.factor}
        if rope.kind != "linear":
            rope_parameters["original_max_position_embeddings"] = rope.original_max_seq_len
        if rope.kind == "llama3":
            rope_parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    window = {"sliding_window": options["sliding_window"]}
    if family.startswith("Qwen") and options["sliding_window"]:
        window |= {"use_sliding_window": True, "max_window_layers": 0}
    theirs_config = getattr(transformers, f"{family}Config")(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=80,
        max_position_embeddings=256,
        rope_parameters=rope_parameters,
        rms_norm_eps=options.get("norm_eps", 1e-5),
        tie_word_embeddings=options.get("tie_embeddings", False),
        **({} if family == "Qwen2" else {"head_dim": options.get("head_dim", 8)}),
        **({} if family == "Llama" else window),
    )
    theirs = getattr(transformers, f"{family}ForCausalLM")(theirs_config)
    shake(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="80KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()

    config = read_hf_config(tmp_path)
    assert (config.qk_norm, config.qkv_bias) == (options["qk_norm"], options["qkv_bias"])
    assert config.sliding_window == options["sliding_window"]
    with torch.device("meta"):
        ours = Transformer(config)
    ours.load_state_dict(dict(read_hf_weights(tmp_path)), assign=True, strict=not config.tie_embeddings)
    if config.tie_embeddings:
        ours.head.weight = ours.embed.weight
    assert_same_logits(ours, theirs)


def byte_tokenizer(directory: Path) -> Path:
    """The smallest directory in the form that `trainer.chat` writes."""
    directory.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "trivium.json").write_text("{}")
    return directory


def test_export_carries_the_tokenizer_and_the_chat_template(tmp_path: Path):
    config = ModelConfig(**SHAPE)
    source = byte_tokenizer(tmp_path / "tokenizer")
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    out = export_hf(
        config,
        our_model(config).named_parameters(),
        tmp_path / "out",
        tokenizer_dir=source,
        chat_template=template,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("naïve 世界")["input_ids"]
    assert tokenizer.decode(ids) == "naïve 世界"
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 256
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"

    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == tokenizer.eos_token_id == 256
    assert model.generation_config.eos_token_id == [256, 259]
    assert model.generation_config.pad_token_id == 257
    assert (out / "trivium.json").is_file()
    made = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
    assert made.shape[1] > len(ids)


def test_without_a_chat_template_only_the_end_of_text_stops(tmp_path: Path):
    config = ModelConfig(**SHAPE)
    source = byte_tokenizer(tmp_path / "tokenizer")
    out = export_hf(config, our_model(config).named_parameters(), tmp_path / "out", tokenizer_dir=source)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 256


def test_export_replaces_an_earlier_export_and_nothing_else(tmp_path: Path):
    config = ModelConfig(**SHAPE)
    tensors = dict(our_model(config).named_parameters())
    out = export_hf(config, tensors.items(), tmp_path / "out", max_shard_bytes=30_000)
    export_hf(config, tensors.items(), out)
    assert [path.name for path in out.glob("*safetensors*")] == ["model.safetensors"]
    (out / "thesis.tex").write_text("do not lose me")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        export_hf(config, tensors.items(), out)
    assert (out / "model.safetensors").is_file()


def test_export_refuses_what_no_family_computes(tmp_path: Path):
    config = ModelConfig(**SHAPE, qk_norm=True, qkv_bias=True)
    with pytest.raises(UserError, match=r"model\.qk_norm=true with model\.qkv_bias=true"):
        export_hf(config, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_tokenizer_larger_than_the_model(tmp_path: Path):
    config = ModelConfig(**SHAPE | {"vocab_size": 200})
    with pytest.raises(UserError, match=r"token id 259.*model\.vocab_size=200"):
        export_hf(config, [], tmp_path / "out", tokenizer_dir=byte_tokenizer(tmp_path / "tokenizer"))


def test_export_wants_every_tensor_once(tmp_path: Path):
    config = ModelConfig(**SHAPE)
    tensors = {name: torch.zeros(shape) for name, shape in parameter_shapes(config).items()}
    first, *rest = tensors.items()
    with pytest.raises(ValueError, match=r"missing tensors: embed\.weight"):
        export_hf(config, rest, tmp_path / "a")
    assert not (tmp_path / "a" / "config.json").exists()
    with pytest.raises(ValueError, match=r"embed\.weight: unknown or given twice"):
        export_hf(config, [first, first], tmp_path / "b")
    with pytest.raises(ValueError, match=r"embed\.weight: shape"):
        export_hf(config, [("embed.weight", torch.zeros(3))], tmp_path / "c")


def exported(tmp_path: Path) -> Path:
    config = ModelConfig(**SHAPE)
    return export_hf(config, our_model(config).named_parameters(), tmp_path / "hf", dtype=torch.float32)


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_all(directory: Path) -> None:
    read_hf_config(directory)
    for _ in read_hf_weights(directory):
        pass


def test_a_pickle_is_refused(tmp_path: Path):
    out = exported(tmp_path)
    (out / "model.safetensors").rename(out / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: a pickle"):
        read_all(out)


def test_a_truncated_file_is_named(tmp_path: Path):
    out = exported(tmp_path)
    data = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        read_all(out)


def test_a_missing_tensor_is_named(tmp_path: Path):
    out = exported(tmp_path)
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        read_all(out)


def test_a_missing_shard_is_named(tmp_path: Path):
    config = ModelConfig(**SHAPE)
    out = export_hf(config, our_model(config).named_parameters(), tmp_path, max_shard_bytes=30_000)
    sorted(out.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of-\d+\.safetensors: cannot be read"):
        read_all(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, r"rope_scaling\.kind=longrope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling\.kind=dynamic"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": 64}, "has shape"),
    ],
)
def test_what_we_cannot_compute_is_refused_in_words(changes: dict, message: str, tmp_path: Path):
    out = exported(tmp_path)
    change_config(out, **changes)
    with pytest.raises(UserError, match=message):
        read_all(out)


def test_a_window_on_some_layers_is_refused(tmp_path: Path):
    out = exported(tmp_path)
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    change_config(out, model_type="qwen2", **window)
    with pytest.raises(UserError, match="some layers only"):
        read_hf_config(out)


def test_a_directory_that_is_none_of_hugging_faces(tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="num_attention_heads is missing"):
        read_hf_config(tmp_path)
