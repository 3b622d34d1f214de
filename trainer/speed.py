"""How fast a step was and what memory it took: the loop's numbers that do not depend on the stage."""

import torch

from trainer.config import StageConfig
from trainer.engine.engine import Engine
from trainer.model.flops import attention_pairs, document_lengths, peak_flops, train_flops
from trainer.stage import Batch

GIB = 1 << 30


class Speed:
    """Tokens per second and MFU of steps over all ranks."""

    def __init__(self, engine: Engine, config: StageConfig):
        world = engine.world
        self.world, self.config = world, config
        peak = peak_flops(world.device, config.engine.compute_dtype(world.device))
        self.peak = peak * world.size if peak else None

    def metrics(self, batch: Batch, tokens: int, seconds: float) -> dict[str, float]:
        """Collective. `tokens`: supervised tokens of the global batch; `seconds`: of the whole step."""
        rate = tokens / seconds
        speed = {"speed/tokens_per_s": rate, "speed/tokens_per_s_per_device": rate / self.world.size}
        # May be a collective, so outside the `if`: a rank on an unknown GPU has no peak.
        flops = self._flops(batch, tokens)
        if self.peak:
            speed["speed/mfu"] = flops / seconds / self.peak
        return speed

    def _flops(self, batch: Batch, tokens: int) -> float:
        """Model FLOPs of a step over all ranks; attention counts pairs inside masked documents."""
        config = self.config.model
        if all(micro.documents_BT is None for micro in batch.micros):
            whole = torch.full((batch.num_samples,), self.config.seq_len)
            return train_flops(config, tokens, float(attention_pairs(whole, config.sliding_window, "full")))
        lengths = torch.cat([document_lengths(micro.documents_BT) for micro in batch.micros])
        mine = int(attention_pairs(lengths, config.sliding_window, "full"))
        return train_flops(config, tokens, float(self.world.sum_words([mine])[0]))


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far, in GiB."""
    if device.type == "cuda":
        return {
            "memory/peak_allocated": torch.cuda.max_memory_allocated(device) / GIB,
            "memory/peak_reserved": torch.cuda.max_memory_reserved(device) / GIB,
        }
    import resource

    return {"memory/peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)}
