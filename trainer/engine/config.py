"""Which back end shards the model, in what precision, and what is traded for memory."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    import torch

FSDP_KINDS = ("ddp", "fsdp", "hsdp")
ZERO_KINDS = ("zero0", "zero1", "zero2", "zero3")
DTYPES = ("float32", "bfloat16")


@dataclass
class EngineConfig:
    """`kind` picks the back end; everything else means the same on all of them.

    ddp, fsdp, hsdp: torch FSDP2 with parameters replicated, sharded over all ranks, or sharded in groups of
    `shard_size` ranks and replicated between the groups. zero0 .. zero3: DeepSpeed.
    """

    kind: str = "fsdp"
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = (
        "auto"  # of the compute: bfloat16 on GPU, float32 on CPU. Masters and reductions are always fp32
    )
    shard_size: int | None = None  # hsdp: ranks per shard group; None is one host's ranks
    reshard_after_forward: bool = (
        True  # fsdp, hsdp: free gathered weights after forward (ZeRO-3) or keep them (ZeRO-2)
    )
    activation_checkpoint: str = "none"  # none | selective (keep matmul outputs) | full (keep block inputs)
    compile: bool = False  # torch.compile of each block
    offload: str = "none"  # none | cpu: masters, moments and the update live in host memory
    # zero3: a parameter smaller than this stays gathered on every rank. DeepSpeed's own default is 1e5.
    persistence_threshold: int = 100_000
    deepspeed: dict[str, Any] = field(default_factory=dict)  # further DeepSpeed config, merged over ours

    def validate(self) -> None:
        def choose(key: str, value: str, allowed: tuple[str, ...]) -> None:
            if value not in allowed:
                raise UserError(f"engine.{key}={value}: choose one of {', '.join(allowed)}")

        choose("kind", self.kind, FSDP_KINDS + ZERO_KINDS)
        choose("device", self.device, ("auto", "cpu", "cuda"))
        choose("dtype", self.dtype, ("auto", *DTYPES))
        choose("activation_checkpoint", self.activation_checkpoint, ("none", "selective", "full"))
        choose("offload", self.offload, ("none", "cpu"))
        if self.shard_size is not None and self.kind != "hsdp":
            raise UserError(
                f"engine.shard_size={self.shard_size}: only engine=hsdp has shard groups; drop the key"
            )
        if self.deepspeed and self.kind not in ZERO_KINDS:
            raise UserError(
                f"engine.deepspeed is set but engine.kind={self.kind}: use engine=zero1, zero2 or zero3"
            )
        if self.offload != "none" and self.kind in ("ddp", "zero0"):
            raise UserError(
                f"engine.offload={self.offload}: engine={self.kind} keeps whole weights on the device"
            )
        if self.kind == "zero0" and self.dtype == "bfloat16":
            # DeepSpeed's stage 0 in bf16 keeps no fp32 gradient sum, so it could not agree with the others.
            raise UserError(
                "engine.dtype=bfloat16: engine=zero0 has no fp32 gradient sum; use engine=ddp or engine=zero1"
            )

    def compute_dtype(self, device: "torch.device") -> "torch.dtype":
        import torch  # late: composing a config takes no torch

        name = self.dtype
        if name == "auto":  # zero0 has no fp32 gradient sum in bf16, see validate()
            name = "bfloat16" if device.type == "cuda" and self.kind != "zero0" else "float32"
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
