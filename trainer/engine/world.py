"""Who am I among the processes of this run, on which device, and over which groups do we talk?

Every launcher (plain `python`, `torchrun`, `accelerate launch`, `srun`) leaves its answer in the
environment; `start()` reads it, opens the process group and returns a `World`. Two groups exist: the default
one (NCCL on GPU, gloo on CPU) moves tensors of the model, `cpu_group` (always gloo) moves small words and
never waits behind GPU work.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.errors import SharedError, UserError

START_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says: `rank` of `world` processes, `local_rank` on this host."""

    rank: int
    world: int
    local_rank: int
    local_size: int  # processes on this host
    name: str


@dataclass(frozen=True)
class World:
    """This process's place in the run. All reductions here are collective: every rank must call them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup
    launcher: str = "python"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, word: int) -> int:
        """Bitwise OR of one 63-bit word over all ranks: how a signal seen by one rank reaches all of them."""
        box = torch.tensor([word], dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.BOR, group=self.cpu_group)
        return int(box.item())

    def sum_words(self, words: list[int]) -> list[int]:
        """Sum of each word over all ranks modulo 2**64 (the modulus makes it fit for order-free hashes)."""
        box = torch.tensor([word - (1 << 64) if word >> 63 else word for word in words], dtype=torch.int64)
        dist.all_reduce(box, group=self.cpu_group)
        return [int(word) % (1 << 64) for word in box.tolist()]

    def gather(self, value: object) -> list[object]:
        """A small picklable value from every rank, in rank order, on every rank."""
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def same_everywhere(self, what: str, value: str) -> None:
        """Refuse to go on when ranks hold different values, e.g. a config that one node resolved
        otherwise.
        """
        values = self.gather(value)
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        if odd:
            raise SharedError(
                f"{what} differs between ranks: rank 0 has {values[0]}, rank {odd[0]} has {values[odd[0]]}; "
                f"give every node the same files, environment and overrides"
            )

    def barrier(self) -> None:
        dist.barrier(group=self.cpu_group)


def launch_from_env(env: Mapping[str, str]) -> Launch:
    """Read the launcher's variables: torchrun and accelerate set RANK; srun sets SLURM_PROCID.

    Raises:
        UserError: RANK without WORLD_SIZE, or srun tasks without a rendezvous address.
    """
    if "RANK" in env:
        if "WORLD_SIZE" not in env:
            raise UserError(
                "RANK is set but WORLD_SIZE is not: start with torchrun, accelerate launch or srun"
            )
        name = "accelerate" if "ACCELERATE_MIXED_PRECISION" in env else "torchrun"
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        return Launch(
            rank, world, int(env.get("LOCAL_RANK", "0")), int(env.get("LOCAL_WORLD_SIZE", world)), name
        )
    # srun also sets SLURM_PROCID for an interactive shell with one task: that is a plain single process.
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        if "MASTER_ADDR" not in env:
            raise UserError(
                "srun started several tasks but MASTER_ADDR is not set: export MASTER_ADDR=<first host> and "
                "MASTER_PORT=<port> before srun"
            )
        rank, world = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
        local_size = int(env.get("SLURM_NTASKS_PER_NODE", -(-world // int(env.get("SLURM_NNODES", "1")))))
        return Launch(rank, world, int(env.get("SLURM_LOCALID", "0")), local_size, "srun")
    return Launch(0, 1, 0, 1, "python")


def engine_of_launcher(env: Mapping[str, str]) -> str | None:
    """The engine that accelerate's config file names, or None where the launcher has no opinion.

    `Accelerator()` is never built: without a GPU it silently trains unconnected copies (measured with 1.15),
    so the config file is taken for what it says and the work is done by our own engine.
    """
    if env.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "zero" + env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if env.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if env.get("FSDP_VERSION", "1") != "2":
            raise UserError("accelerate: fsdp_version=1 is not supported; set fsdp_config.fsdp_version: 2")
        return "hsdp" if env.get("FSDP_SHARDING_STRATEGY", "").startswith("HYBRID_SHARD") else "fsdp"
    if "ACCELERATE_MIXED_PRECISION" in env and int(env.get("WORLD_SIZE", "1")) > 1:
        return "ddp"
    return None


def choose_device(wanted: str, launch: Launch) -> torch.device:
    """`auto` is CUDA when there is a GPU for this local rank, else the CPU."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"engine.device={wanted}: choose auto, cpu or cuda")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "engine.device=cuda: torch sees no GPU; use engine.device=auto or install a CUDA build"
        )
    count = torch.cuda.device_count()
    if count == 1 and launch.name == "srun":
        return torch.device("cuda", 0)  # --gpus-per-task=1: each task sees its own GPU as number 0
    if launch.local_rank >= count:
        raise UserError(
            f"local rank {launch.local_rank} has no GPU: this host has {count}; start fewer processes"
        )
    return torch.device("cuda", launch.local_rank)


def start(device: str = "auto", env: Mapping[str, str] = os.environ) -> World:
    """Open the process groups and return this process's place. Call once; end with `stop(world)`."""
    launch = launch_from_env(env)
    place = choose_device(device, launch)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if launch.world == 1 and launch.name == "python":
        # No port is opened for a lone process, so two runs on one host cannot disturb each other.
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=START_TIMEOUT)
    else:
        os.environ.setdefault("MASTER_PORT", "29500")
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.world, timeout=START_TIMEOUT)
    cpu_group = dist.new_group(backend="gloo", timeout=START_TIMEOUT)
    return World(
        launch.rank, launch.world, launch.local_rank, launch.local_size, place, cpu_group, launch.name
    )


def stop(world: World) -> None:
    """Leave together. Without the barrier half of two-rank gloo runs abort at exit (measured: 6 of 12)."""
    world.barrier()
    dist.destroy_process_group()
