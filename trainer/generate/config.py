"""How to continue a text."""

from dataclasses import dataclass, field

from trainer.errors import UserError


@dataclass
class SamplingConfig:
    """How to continue a text. The defaults draw from the model as it is."""

    max_new_tokens: int = 64
    temperature: float = 1.0  # 0: greedy, always the likeliest token
    top_k: int = 0  # only the k likeliest tokens (and ties with the last); 0: all
    top_p: float = 1.0  # only the likeliest tokens that together reach this; after temperature
    min_p: float = 0.0  # only tokens with at least this share of the likeliest one's probability
    stop_ids: list[int] = field(default_factory=list)  # besides the end-of-text ids of the Generator
    stop_strings: list[str] = field(default_factory=list)  # a text that contains one is finished
    ignore_eos: bool = False  # go on after end-of-text; stop_ids still stop

    def validate(self) -> None:
        """Raise UserError naming the key that is wrong."""
        if self.max_new_tokens < 1:
            raise UserError(f"sampling.max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"sampling.temperature={self.temperature}: must be 0 (greedy) or above")
        if self.top_k < 0:
            raise UserError(f"sampling.top_k={self.top_k}: must be 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p={self.top_p}: must be above 0 and at most 1 (all tokens)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"sampling.min_p={self.min_p}: must lie in 0..1")
        if any(index < 0 for index in self.stop_ids):
            raise UserError(f"sampling.stop_ids={self.stop_ids}: token ids are not negative")
        if "" in self.stop_strings:
            raise UserError("sampling.stop_strings: an empty string would stop every text at once; remove it")
