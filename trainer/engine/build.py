"""One door to both back ends; DeepSpeed is imported only where it is asked for (it takes seconds)."""

from trainer.engine.config import ZERO_KINDS, EngineConfig
from trainer.engine.engine import Engine
from trainer.engine.schedule import OptimConfig
from trainer.engine.world import World
from trainer.model.config import ModelConfig


def build_engine(
    model: ModelConfig, config: EngineConfig, optim: OptimConfig, world: World, seed: int
) -> Engine:
    """The model with fresh weights, sharded and with its optimizer. Collective."""
    if config.kind in ZERO_KINDS:
        from trainer.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, config, optim, world, seed)
    from trainer.engine.fsdp import FSDPEngine

    return FSDPEngine(model, config, optim, world, seed)
