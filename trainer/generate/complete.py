"""A text that grows: what a base model is asked in a terminal, kept as ids from turn to turn."""

import codecs
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from trainer.chat.tokenizer import Tokenizer
from trainer.errors import UserError
from trainer.generate.engine import Completion, Generator
from trainer.generate.sampling import SamplingConfig
from trainer.model.transformer import Transformer


@dataclass
class Candidate:
    """A possible next token, with its probability under the model as it is."""

    id: int
    text: str
    probability: float


@dataclass
class Story:
    """The ids so far, never turned into text and back: encoding a decoded text may give other ids."""

    model: Transformer
    tokenizer: Tokenizer
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    ids: list[int] = field(default_factory=list)
    turn: int = 0
    seconds: float = 0.0  # of the last turn

    def __post_init__(self) -> None:
        self.tokenizer.check_vocab(self.model.config.vocab_size)
        self.sampling.validate()
        self.generator = Generator(self.model, eos_ids=self.tokenizer.eos_ids, tokenizer=self.tokenizer)

    def reset(self) -> None:
        """Back to an empty page; the noise starts anew too."""
        self.ids, self.turn = [], 0

    def set(self, **changes: object) -> None:
        """Changes sampling settings, or none of them: UserError when the result is not valid."""
        changed = replace(self.sampling, **changes)  # type: ignore[arg-type]
        changed.validate()
        self.sampling = changed

    def prompt(self, text: str) -> list[int]:
        """The ids so far and `text`; end-of-text where both are empty: a document begins after one."""
        return self.ids + self.tokenizer.encode(text) or [self.tokenizer.eos_id]

    def proceed(self, text: str, write: Callable[[str], None]) -> Completion:
        """Appends `text`, then a completion, which `write` receives piece by piece. UserError if it does not
        fit.

        An interrupt (Ctrl-C) ends the completion early; what was written stays.
        """
        prompt = self._fitting(text)
        stream = TextStream(self.tokenizer, write)
        partial = Completion(stop_reason="interrupt")

        def on_token(_: int, token: int, logprob: float) -> None:
            partial.ids.append(token)
            partial.logprobs.append(logprob)
            stream.add(token)

        keys = [("terminal", self.turn)]
        started = time.perf_counter()
        try:
            done = self.generator.generate(
                [prompt], self.sampling, seed=self.seed, keys=keys, on_token=on_token
            )[0]
        except KeyboardInterrupt:
            done = partial
        except FloatingPointError as error:
            raise UserError(
                f"{error}: the training of this checkpoint diverged; use an earlier one"
            ) from None
        stream.close()
        self.seconds = time.perf_counter() - started
        self.ids, self.turn = prompt + done.ids, self.turn + 1
        return done

    def top(self, text: str, count: int) -> list[Candidate]:
        """The `count` likeliest tokens after the ids so far and `text`; nothing is appended."""
        if count < 1:
            raise UserError(f"top {count}: must be at least 1")
        probability_V = torch.softmax(self.generator.next_logits(self._fitting(text)), dim=-1)
        best = probability_V.topk(min(count, len(probability_V)))
        pairs = zip(best.indices.tolist(), best.values.tolist())
        return [Candidate(index, self.tokenizer.token_text(index), p) for index, p in pairs]

    def _fitting(self, text: str) -> list[int]:
        prompt = self.prompt(text)
        context = self.model.config.max_seq_len
        if len(prompt) >= context:
            raise UserError(
                f"the text has {len(prompt):,} tokens, but the model's context is {context:,} and one "
                f"place must stay free; give a shorter text{', or /reset' if self.ids else ''}"
            )
        return prompt


class TextStream:
    """Token by token to `write`, whole characters only: a character may be spread over several tokens."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]):
        self.tokenizer, self.write = tokenizer, write
        self.special = set(tokenizer.special.values())
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> None:
        """Special tokens are not text and write nothing."""
        if token not in self.special:
            text = self.decoder.decode(self.tokenizer.id_to_bytes(token))
            if text:
                self.write(text)

    def close(self) -> None:
        """Writes what an unfinished character left over."""
        text = self.decoder.decode(b"", final=True)
        if text:
            self.write(text)
