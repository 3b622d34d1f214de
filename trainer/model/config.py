"""What a model is: every number that fixes its architecture, checked before anything is allocated.

A preset (`configs/model/*.yaml`) is a flat mapping of these fields. Names follow Hugging Face's `config.json`
where one exists, except that `max_seq_len` is their `max_position_embeddings` and `num_heads` /
`num_kv_heads` drop "attention".
"""

from dataclasses import dataclass

from trainer.errors import UserError

ATTENTION_BACKENDS = ("sdpa", "flex", "varlen")
ROPE_KINDS = ("llama3", "linear", "yarn")


@dataclass
class RopeScaling:
    """How RoPE frequencies are stretched to reach beyond the length a model was first trained on.

    `linear` divides every frequency by `factor` (Chen et al. 2023); `llama3` leaves the short wavelengths
    alone, divides the long ones and blends between (Llama 3.1); `yarn` blends per dimension and warms
    attention (Peng et al. 2023).
    """

    kind: str = "llama3"
    factor: float = 8.0
    original_max_seq_len: int = 8192
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only
    beta_fast: float = 32.0  # yarn only
    beta_slow: float = 1.0  # yarn only

    def validate(self) -> None:
        """Raise UserError naming the key that is wrong."""
        where = "model.rope_scaling"
        if self.kind not in ROPE_KINDS:
            raise UserError(f"{where}.kind={self.kind}: choose one of {', '.join(ROPE_KINDS)}")
        if self.factor < 1:
            raise UserError(f"{where}.factor={self.factor}: must be at least 1")
        if self.original_max_seq_len < 1:
            raise UserError(f"{where}.original_max_seq_len={self.original_max_seq_len}: must be >= 1 token")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"{where}.high_freq_factor={self.high_freq_factor}: must be above "
                f"low_freq_factor={self.low_freq_factor} > 0"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                f"{where}.beta_fast={self.beta_fast}: must be above beta_slow={self.beta_slow} > 0"
            )


@dataclass
class ModelConfig:
    """A decoder-only transformer of the Llama 3 / Qwen 3 family; the defaults are the preset `tiny`."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4  # fewer than num_heads is grouped-query attention
    head_dim: int | None = None  # None: hidden_size / num_heads
    intermediate_size: int = 688
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMSNorm over each head of q and k before RoPE (Qwen 3)
    qkv_bias: bool = False  # biases on q, k and v (Qwen 2)
    tie_embeddings: bool = False
    sliding_window: int | None = None  # a token sees itself and the window-1 tokens before it
    attention: str = "sdpa"
    init_std: float = 0.02
    loss_chunk_tokens: int = 1024  # tokens whose logits exist at one time

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    def validate(self) -> None:
        """Raise UserError naming the key, its value and the fix."""
        counts = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")
        for name in (*counts, "max_seq_len", "loss_chunk_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"model.num_heads={self.num_heads}: must divide model.hidden_size={self.hidden_size}, "
                "or set model.head_dim"
            )
        if self.head_dim is not None and self.head_dim < 1:
            raise UserError(
                f"model.head_dim={self.head_dim}: must be at least 2, or null for hidden_size / num_heads"
            )
        if self.head_size % 2:
            raise UserError(f"model.head_dim={self.head_size}: must be even, RoPE turns pairs of dimensions")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_kv_heads={self.num_kv_heads}: must divide model.num_heads={self.num_heads}"
            )
        if self.attention not in ATTENTION_BACKENDS:
            raise UserError(
                f"model.attention={self.attention}: choose one of {', '.join(ATTENTION_BACKENDS)}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(
                f"model.sliding_window={self.sliding_window}: must be at least 1 token, or null for none"
            )
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name}={getattr(self, name)}: must be above 0")
        if not self.init_std >= 0:
            raise UserError(f"model.init_std={self.init_std}: must not be negative")
        if self.rope_scaling is not None:
            self.rope_scaling.validate()
