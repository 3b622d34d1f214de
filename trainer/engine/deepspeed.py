"""The DeepSpeed back end: ZeRO 0 to 3 through `deepspeed.initialize`, held to the same numbers as FSDP2.

DeepSpeed averages gradients over ranks, so the loss is multiplied by the number of ranks first; it divides
by its own count of accumulation steps unless told not to; the boundary of a step is set by us, because the
number of micro-batches is ours to choose. `overlap_comm` stays off unless asked for: ZeRO-2 has raced with
it on (DeepSpeed issue 4298).
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from trainer.engine.config import EngineConfig
from trainer.engine.engine import Engine
from trainer.engine.optim import MOMENTS, allocate_moments, build_adamw, clip, decays, squared_norm
from trainer.engine.ranges import FlatRange
from trainer.engine.schedule import OptimConfig
from trainer.engine.world import World
from trainer.engine.wrap import wrap_blocks
from trainer.model.config import ModelConfig
from trainer.model.transformer import Block, Transformer

if not torch.cuda.is_available() and not os.environ.get("DS_ACCELERATOR"):
    os.environ["DS_ACCELERATOR"] = "cpu"  # must be set before the import below
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)


def deepspeed_config(config: EngineConfig, optim: OptimConfig, world: World) -> dict[str, Any]:
    """Our DeepSpeed config, with the user's `engine.deepspeed` merged over it key by key."""
    stage = int(config.kind.removeprefix("zero"))
    bf16 = config.compute_dtype(world.device) == torch.bfloat16
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = config.persistence_threshold
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping of DeepSpeed's own; nothing is divided by it
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "gradient_clipping": optim.max_grad_norm
        if stage
        else 0.0,  # stage 0 clips with an fp32 norm: we do it
        "bf16": {"enabled": bf16, "check_grad_overflow": True},  # or stages 1 and 2 would apply a NaN
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW, the same as under FSDP2
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }
    return _merge(ours, config.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


class DeepSpeedEngine(Engine):
    """One `deepspeed.initialize`d model. `stage` 0 keeps whole tensors, 1 and 2 flat partitions, 3
    partitions the weights.
    """

    def __init__(
        self, model_config: ModelConfig, config: EngineConfig, optim: OptimConfig, world: World, seed: int
    ):
        super().__init__(model_config, config, optim, world)
        self.stage = int(config.kind.removeprefix("zero"))
        settings = deepspeed_config(config, optim, world)
        os.environ.setdefault(
            "LOCAL_RANK", str(world.local_rank)
        )  # DeepSpeed insists on it, srun does not set it
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(
                dist_backend="nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False
            )
        if self.stage == 3:
            # dtype comes from the settings: Init(dtype=torch.float32) quietly means bfloat16 on CPU (0.19.8).
            with deepspeed.zero.Init(config_dict_or_path=settings, mem_efficient_linear=False):
                model = Transformer(model_config)
            # One fetch per block instead of one per linear layer, as FSDP2 does; the compiler then sees no
            # hooks inside.
            set_z3_leaf_modules(model, [Block])
        else:
            with torch.device("meta"):
                model = Transformer(model_config)
            model.to_empty(device=world.device)
        wrap_blocks(model.blocks, config)
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}
        named = list(model.named_parameters())
        groups = [
            {"params": [p for n, p in named if decays(self.shapes[n])], "weight_decay": optim.weight_decay},
            {"params": [p for n, p in named if not decays(self.shapes[n])], "weight_decay": 0.0},
        ]
        self.optimizer = build_adamw(groups, optim)
        self.runtime: Any
        self.zero: Any
        self.runtime, self.zero, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings
        )
        self.model = self.runtime
        self.module: Transformer = self.runtime.module
        # What AdamW really updates: ZeRO replaces the parameters by flat fp32 partitions (stage 3 empties
        # the groups).
        masters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.stage == 3:
            masters = list(self.zero.fp32_partitioned_groups_flat)
        wrong = {master.dtype for master in masters} - {torch.float32}
        assert not wrong, f"master weights must be fp32, DeepSpeed made {wrong}"
        allocate_moments(self.optimizer, masters)
        self._agree: Callable[[float], bool] = lambda norm: True
        self._accepted: bool | None = None
        if self.stage:
            self._adamw_step = self.optimizer.step
            self.optimizer.step = self._vote_before_update  # type: ignore[method-assign, assignment]
        self.initialise(seed)

    def _backward(self, loss: Tensor, last: bool) -> None:
        self.runtime.set_gradient_accumulation_boundary(last)
        self.runtime.backward(loss * self.world.size, scale_wrt_gas=False)
        if not last:
            self.runtime.step()  # not a boundary: only DeepSpeed's own micro-step bookkeeping

    def _update(self, lr: float, agree: Callable[[float], bool]) -> float:
        self._set_lr(lr)
        if self.stage == 0:
            return self._update_whole(agree)
        self._agree, self._accepted = agree, None
        self.runtime.step()
        norm = float(self.runtime.get_global_grad_norm())
        # -1 is DeepSpeed's sign for "not finite"
        return norm if math.isfinite(norm) and norm >= 0 else math.inf

    def _vote_before_update(self) -> None:
        """In the place of AdamW's `step`, which ZeRO calls (once or once a group) when the norm is known and
        finite on all ranks. A refused update leaves masters and moments as they are; DeepSpeed then copies
        the unchanged masters into the weights and drops the gradient as after any step.
        """
        if self._accepted is None:
            self._accepted = self._agree(float(self.zero._global_grad_norm))
        if self._accepted:
            self._adamw_step()

    def _update_whole(self, agree: Callable[[float], bool]) -> float:
        """Stage 0 in fp32 has no ZeRO optimizer: gradients are whole and reduced, the norm is ours to
        take.
        """
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = math.sqrt(squared_norm(grads, self.world.device).item())
        if agree(norm):
            clip(grads, norm, self.optim.max_grad_norm)
            self.runtime.step()  # updates and drops the gradients
        else:
            self.runtime.zero_grad()
        return norm if math.isfinite(norm) else math.inf

    def shards(self, moments: bool = True) -> dict[str, FlatRange]:
        found = {}
        names = ("param", *MOMENTS) if moments else ("param",)
        for name, param in self.module.named_parameters():
            for kind in names:
                local, start = self._local(param, None if kind == "param" else kind)
                found[f"{name}/{kind}"] = FlatRange(local, start, self.shapes[name])
        return found

    def _local(self, param: Any, moment: str | None) -> tuple[Tensor, int]:
        """This rank's flat piece of a parameter's master (or moment) and where it starts."""
        if self.stage == 0:
            whole = param.detach() if moment is None else self.optimizer.state[param][moment]
            return whole.flatten(), 0
        if self.stage == 3:
            whole = (
                safe_get_local_fp32_param(param)
                if moment is None
                else safe_get_local_optimizer_state(param, moment)
            )
            part = param.ds_tensor.ds_numel
            start = min(self.world.rank * part, param.ds_numel)
            return whole.flatten()[
                : min(part, param.ds_numel - start)
            ], start  # the last rank's padding is not ours
        link = param._hp_mapping
        if link is None:  # this parameter lies in other ranks' partitions
            return torch.empty(0, dtype=torch.float32, device=param.device), 0
        flat = self.optimizer.param_groups[link.param_group_index]["params"][0]
        source = flat.detach() if moment is None else self.optimizer.state[flat][moment]
        where = link.hp_fragment_address
        return source.narrow(0, where.start, where.numel), link.lp_fragment_address.start

    @property
    def replica(self) -> tuple[int, int]:
        return (self.world.rank, self.world.size) if self.stage == 0 else (0, 1)

    @torch.no_grad()
    def load_shards(self, shards: dict[str, FlatRange]) -> None:
        if self.stage == 0:
            return  # the ranges are views of the parameters and moments themselves
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        param: Any
        for name, param in self.module.named_parameters():
            for kind in ("param", *MOMENTS):
                if f"{name}/{kind}" not in shards:
                    continue
                padded = torch.zeros(param.ds_tensor.ds_numel, dtype=torch.float32, device=self.world.device)
                local = shards[f"{name}/{kind}"].local
                padded[: local.numel()] = local
                if kind == "param":
                    safe_set_local_fp32_param(param, padded)
                    param.ds_tensor.data.copy_(padded)  # the low-precision partition that forward gathers
                else:
                    safe_set_local_optimizer_state(param, padded, kind)
        # Small "persistent" parameters keep a gathered copy between steps; without this the first loss would
        # be stale.
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in self.module.named_parameters():
            full = param.detach() if self.stage == 0 else safe_get_full_fp32_param(param)
            yield name, full.detach().view(self.shapes[name])

    def close(self) -> None:
        self.runtime.destroy()
