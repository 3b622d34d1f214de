"""The torch FSDP2 back end: sharded (fsdp), sharded in groups (hsdp) or replicated (ddp), by the shape of
the mesh.

The optimizer works on each rank's plain local slices, not on DTensors: fused AdamW then runs the same on any
device, and what a checkpoint stores is what the optimizer updates.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainer.engine.config import EngineConfig
from trainer.engine.engine import Engine
from trainer.engine.optim import MOMENTS, allocate_moments, build_adamw, clip, decays, squared_norm
from trainer.engine.ranges import FlatRange
from trainer.engine.schedule import OptimConfig
from trainer.engine.world import World
from trainer.engine.wrap import wrap_blocks
from trainer.errors import UserError
from trainer.model.config import ModelConfig
from trainer.model.transformer import Transformer


def build_mesh(config: EngineConfig, world: World) -> DeviceMesh:
    """A (replicate, shard) mesh: ddp is (W, 1), fsdp (1, W), hsdp (W / shard_size, shard_size).

    fsdp is 1-D, since a replicate dimension of size 1 would still cost an all-reduce.
    """
    if config.kind == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shard = 1
    if config.kind == "hsdp":
        shard = min(world.local_size, world.size) if config.shard_size is None else config.shard_size
        if world.size % shard:
            raise UserError(
                f"engine.shard_size={shard}{'' if config.shard_size else ' (one host)'}: does not divide the "
                f"{world.size} ranks; set a divisor"
            )
    return init_device_mesh(
        world.device.type, (world.size // shard, shard), mesh_dim_names=("replicate", "shard")
    )


class FSDPEngine(Engine):
    """`fully_shard` per block and on the root; gradients are summed, never averaged."""

    def __init__(
        self, model_config: ModelConfig, config: EngineConfig, optim: OptimConfig, world: World, seed: int
    ):
        super().__init__(model_config, config, optim, world)
        self.mesh = build_mesh(config, world)
        self.shard_group = self.mesh.get_group("shard")
        with torch.device("meta"):
            model = Transformer(model_config)
        wrap_blocks(model.blocks, config)
        dtype = config.compute_dtype(world.device)
        # A mesh with one rank per shard has nothing to free: gathering again for backward would only copy.
        reshard = config.reshard_after_forward and self.mesh["shard"].size() > 1
        offload: OffloadPolicy = OffloadPolicy()
        if config.offload == "cpu":
            offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "reshard_after_forward": reshard,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
            "offload_policy": offload,
        }
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
        self.wrapped: list[FSDPModule] = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for module in self.wrapped:
            # Sum, not mean: the engine has divided already. gloo cannot pre-multiply, so the plain sum is
            # forced.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        model.to_empty(device="cpu" if config.offload == "cpu" else world.device)
        self.model = model
        self.names: list[str] = []
        self.params: list[DTensor] = []
        self.local: list[Tensor] = []
        # The optimizer is made after sharding: fully_shard replaces the parameters, an earlier one would
        # train nothing.
        for name, param in model.named_parameters():
            assert isinstance(param, DTensor)
            self.names.append(name)
            self.params.append(param)
            self.local.append(param.to_local().detach())
        groups = [
            {
                "params": [t for t, p in zip(self.local, self.params) if decays(p.shape)],
                "weight_decay": optim.weight_decay,
            },
            {
                "params": [t for t, p in zip(self.local, self.params) if not decays(p.shape)],
                "weight_decay": 0.0,
            },
        ]
        self.optimizer = build_adamw(groups, optim)
        allocate_moments(self.optimizer, self.local)
        self.initialise(seed)

    def _backward(self, loss: Tensor, last: bool) -> None:
        # Gradients are reduce-scattered at every micro-batch (keeping them whole would cost the sharding's
        # memory); only the all-reduce between replicas waits for the last one.
        for module in self.wrapped:
            module.set_requires_all_reduce(last)
        loss.backward()

    def _update(self, lr: float, agree: Callable[[float], bool]) -> float:
        grads = []
        for param, local in zip(self.params, self.local):
            if param.grad is None:  # an unused parameter still takes its weight decay, as under DeepSpeed
                local.grad = torch.zeros_like(local)
            else:
                assert isinstance(param.grad, DTensor)
                local.grad = param.grad.to_local()
            grads.append(local.grad)
        squared = squared_norm(grads, self.world.device)
        dist.all_reduce(squared, group=self.shard_group)
        norm = math.sqrt(squared.item())
        if agree(norm):
            clip(grads, norm, self.optim.max_grad_norm)
            self._set_lr(lr)
            self.optimizer.step()
        for param, local in zip(self.params, self.local):
            param.grad = local.grad = None
        return norm if math.isfinite(norm) else math.inf

    def shards(self, moments: bool = True) -> dict[str, FlatRange]:
        found = {}
        for name, param, local in zip(self.names, self.params, self.local):
            _, offset = compute_local_shape_and_global_offset(
                param.shape, param.device_mesh, param.placements
            )
            start = offset[0] * (param.numel() // param.shape[0])
            found[f"{name}/param"] = FlatRange(local.flatten(), start, param.shape)
            for moment in MOMENTS if moments else ():
                found[f"{name}/{moment}"] = FlatRange(
                    self.optimizer.state[local][moment].flatten(), start, param.shape
                )
        return found

    @property
    def replica(self) -> tuple[int, int]:
        if self.mesh.ndim == 1:
            return 0, 1
        return self.mesh.get_local_rank("replicate"), self.mesh["replicate"].size()

    def load_shards(self, shards: dict[str, FlatRange]) -> None:
        """Nothing to do: the ranges are views of what the optimizer and FSDP2 hold."""

    def close(self) -> None:
        """FSDP2 keeps nothing outside the model."""

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in zip(self.names, self.params):
            whole = param.to(self.world.device)
            assert isinstance(whole, DTensor)
            yield name, whole.full_tensor().detach()
