"""Batched decoding with a KV cache; a finished row gives its place to a waiting one, so cost follows live
rows.

Rows are ragged and right-padded, and the cache slot of a token is its position. Nothing depends on the
company a row has: noise is keyed by row, and padding is never seen. No collective is called, since ranks
finish at different times; sharded weights must be gathered before (design 3.6).

Shapes: B rows, T tokens, V vocabulary; the cache is [layers, rows, slots, kv heads, head width].
"""

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trainer import keyed
from trainer.chat.tokenizer import Tokenizer
from trainer.errors import UserError
from trainer.generate.sampling import SamplingConfig, noise_words, sample
from trainer.model.attention import KVCache
from trainer.model.transformer import Transformer

SLOT_STEP = 128  # attention reads slots in steps of this: shapes change seldom

OnToken = Callable[[int, int, float], None]
"""Called as (row, id, logprob) for every token as it is drawn."""


@dataclass
class Completion:
    """What was added to one prompt.

    `ids` holds the stop id too, where there was one: it was sampled, so it is trained on. `logprobs` are
    those of the model as it is; `sampling_logprobs` those of the distribution drawn from (see `sampling.py`).
    `stop_reason` is "stop" (an end-of-text id, stop id or stop string), "length" (max_new_tokens) or
    "context" (max_seq_len).
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    stop_reason: str = ""


@dataclass
class _Row:
    """A prompt on its way. `length`: tokens in the cache, where the last of `completion.ids` is not yet."""

    index: int  # in the caller's list
    prompt: list[int]
    limit: int  # tokens that may still be added, then the reason is:
    reason: str
    key: int
    length: int = 0
    tail: bytes = b""  # of the text so far: as much as a stop string can reach back
    completion: Completion = field(default_factory=Completion)


class Generator:
    """Continues prompts with one model.

    eos_ids: ids that end a text. tokenizer: needed for stop strings only. max_batch: rows in the cache at one
    time; more prompts wait. prefill_tokens: padded prompt tokens per forward, which bounds the memory of
    activations.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        eos_ids: Sequence[int],
        tokenizer: Tokenizer | None = None,
        max_batch: int = 256,
        prefill_tokens: int = 16384,
    ):
        self.model = model
        self.eos_ids = frozenset(eos_ids)
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.prefill_tokens = prefill_tokens

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return self.model.head.weight.device

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seed: int,
        keys: Sequence[tuple[str | int, ...]] | None = None,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """One Completion per prompt, in order.

        keys: what identifies each row's noise beside the seed, e.g. (step, prompt, sample); its index by
        default. The same (seed, key, prompt) gives the same completion in any batch. UserError for a prompt
        that leaves no room in the context; ValueError for an empty one (start from end-of-text);
        FloatingPointError for NaN logits.
        """
        sampling.validate()
        if sampling.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings need Generator(tokenizer=...)")
        rows = self._rows(prompts, sampling, seed, keys)
        completions = [row.completion for row in rows]
        # Longest first: prompts of like length share a prefill, and the first admitted fixes the size of the
        # cache.
        waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
        live: list[_Row] = []
        capacity = min(self.max_batch, len(rows))
        cache = self._cache(capacity, max((len(row.prompt) + row.limit for row in rows), default=1))
        step = _Step(sampling, keyed.key(seed, "gumbel"), self._stop_ids(sampling), self.tokenizer, on_token)
        while waiting or live:
            if waiting and (not live or capacity - len(live) >= max(1, capacity // 4)):
                admitted = self._next_prefill(waiting, capacity - len(live))
                logits_BV = self._prefill(cache, len(live), admitted)
                running = step(logits_BV, admitted)
                live = _compact(cache, live + admitted, [True] * len(live) + running)
            else:
                running = step(self._decode(cache, live), live)
                live = _compact(cache, live, running)
        return completions

    @torch.inference_mode()
    def next_logits(self, prompt: Sequence[int]) -> Tensor:
        """fp32 logits_V for the token after `prompt`."""
        self._check(0, prompt, room=0)
        tokens_BT = torch.tensor([list(prompt)], device=self.device)
        return self.model(tokens_BT, logits_at_B=torch.tensor([len(prompt) - 1], device=self.device))[0]

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
        keys: Sequence[tuple[str | int, ...]] | None,
    ) -> list[_Row]:
        if keys is not None and len(keys) != len(prompts):
            raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts")
        rows = []
        for index, prompt in enumerate(prompts):
            self._check(index, prompt, room=1)
            room = self.model.config.max_seq_len - len(prompt)
            fits = sampling.max_new_tokens <= room
            limit, reason = (sampling.max_new_tokens, "length") if fits else (room, "context")
            key = keyed.key(seed, "sample", *((index,) if keys is None else keys[index]))
            rows.append(_Row(index, list(prompt), limit, reason, key))
        return rows

    def _check(self, index: int, prompt: Sequence[int], room: int) -> None:
        config = self.model.config
        if not prompt:
            raise ValueError(f"prompt {index} is empty: start from the end-of-text id")
        if len(prompt) + room > config.max_seq_len:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, but the model's context is {config.max_seq_len} "
                f"(model.max_seq_len) and one place must stay free; shorten the prompt"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {index} has ids outside of 0..{config.vocab_size - 1}")

    def _stop_ids(self, sampling: SamplingConfig) -> frozenset[int]:
        return frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else self.eos_ids)

    def _cache(self, rows: int, slots: int) -> KVCache:
        dtype = self.model.head.weight.dtype
        return KVCache(self.model.config, rows, _round_up(slots), dtype, self.device)

    def _next_prefill(self, waiting: deque[_Row], room: int) -> list[_Row]:
        """The next rows that fit, at least one; they are sorted by length, so the first is the widest."""
        width = len(waiting[0].prompt)
        count = min(room, len(waiting), max(1, self.prefill_tokens // width))
        return [waiting.popleft() for _ in range(count)]

    def _prefill(self, cache: KVCache, first: int, rows: list[_Row]) -> Tensor:
        """Writes whole prompts into the cache rows from `first` on; logits_BV of their last tokens."""
        width = len(rows[0].prompt)
        tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)
        for b, row in enumerate(rows):
            row.length = len(row.prompt)
            tokens_BT[b, : row.length] = torch.tensor(row.prompt)
        last_B = torch.tensor([row.length - 1 for row in rows], device=self.device)
        positions_BT = torch.arange(width, device=self.device).expand(len(rows), width)
        return self.model(
            tokens_BT.to(self.device),
            positions_BT=positions_BT,
            cache=_view(cache, first, len(rows), width),
            logits_at_B=last_B,
        )

    def _decode(self, cache: KVCache, rows: list[_Row]) -> Tensor:
        """Writes the newest token of every row; logits_BV after it."""
        tokens_BT = torch.tensor([[row.completion.ids[-1]] for row in rows]).to(self.device)
        positions_BT = torch.tensor([[row.length] for row in rows]).to(self.device)
        for row in rows:
            row.length += 1
        slots = max(row.length for row in rows)
        return self.model(
            tokens_BT,
            positions_BT=positions_BT,
            cache=_view(cache, 0, len(rows), slots),
            logits_at_B=torch.zeros(len(rows), dtype=torch.int64, device=self.device),
        )


@dataclass
class _Step:
    """Draws a token for every row and says which rows go on."""

    sampling: SamplingConfig
    seed_key: int
    stop_ids: frozenset[int]
    tokenizer: Tokenizer | None
    on_token: OnToken | None

    def __post_init__(self) -> None:
        self.stop_bytes = [text.encode() for text in self.sampling.stop_strings]
        self.reach = max(map(len, self.stop_bytes), default=0)

    def __call__(self, logits_BV: Tensor, rows: list[_Row]) -> list[bool]:
        keys_B = np.array([row.key for row in rows], dtype=np.uint64)
        positions_B = np.array([row.length for row in rows], dtype=np.uint64)
        drawn = sample(logits_BV, self.sampling, self.seed_key, noise_words(keys_B, positions_B))
        token_B, logprob_B, sampling_logprob_B = (part.tolist() for part in drawn)
        return [self._accept(*row) for row in zip(rows, token_B, logprob_B, sampling_logprob_B)]

    def _accept(self, row: _Row, token: int, logprob: float, sampling_logprob: float) -> bool:
        if math.isnan(logprob):
            raise FloatingPointError(f"the model's logits after {row.length} tokens are not numbers (NaN)")
        done = row.completion
        done.ids.append(token)
        done.logprobs.append(logprob)
        done.sampling_logprobs.append(sampling_logprob)
        if self.on_token is not None:
            self.on_token(row.index, token, logprob)
        if token in self.stop_ids or self._hits_stop_string(row, token):
            done.stop_reason = "stop"
        elif len(done.ids) == row.limit:
            done.stop_reason = row.reason
        return not done.stop_reason

    def _hits_stop_string(self, row: _Row, token: int) -> bool:
        if not self.stop_bytes or self.tokenizer is None:
            return False
        text = row.tail + self.tokenizer.id_to_bytes(token)
        row.tail = text[-(self.reach - 1) :] if self.reach > 1 else b""
        return any(stop in text for stop in self.stop_bytes)


def _round_up(slots: int) -> int:
    return -(-slots // SLOT_STEP) * SLOT_STEP


def _view(cache: KVCache, first: int, rows: int, slots: int) -> KVCache:
    """`rows` rows from `first` and the slots in use, sharing memory: attention reads no more than these."""
    view = copy.copy(cache)
    view.batch, view.max_len = rows, min(_round_up(slots), cache.max_len)
    view.keys = cache.keys[:, first : first + rows, : view.max_len]
    view.values = cache.values[:, first : first + rows, : view.max_len]
    view._rows = cache._rows[:rows]
    return view


def _compact(cache: KVCache, rows: list[_Row], running: list[bool]) -> list[_Row]:
    """Moves running rows from the end into the cache rows of finished ones, in place; returns the running."""
    count = sum(running)
    holes = [i for i in range(count) if not running[i]]
    movers = [i for i in range(count, len(rows)) if running[i]]
    if holes:
        slots = max(rows[i].length for i in movers)
        for stored in (cache.keys, cache.values):
            stored[:, holes, :slots] = stored[:, movers, :slots]
    kept = rows[:count]
    for hole, mover in zip(holes, movers):
        kept[hole] = rows[mover]
    return kept
