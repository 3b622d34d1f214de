"""A flat range of a named tensor: the one form in which every engine keeps what it owns in a checkpoint.

FSDP2 shards dimension 0 and DeepSpeed shards the flattened tensor; both are a contiguous range of the
flattened tensor. Stored 1-D under the parameter's name, any engine on any number of ranks can read its own
ranges back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatRange(Tensor):
    """Elements `start .. start+len(local)-1` of a flattened tensor of `shape`; shares memory with `local`.

    The dunder methods are torch.distributed.checkpoint's `_Checkpointable` protocol: it asks an object which
    chunk of the global (here 1-D) tensor it holds, writes that, and at load cuts and joins chunks as the
    reader's ranges need. The planner asks only tensors for shards, hence the subclass; `local` is the plain
    tensor to compute with.
    """

    start: int
    whole_shape: torch.Size

    @staticmethod
    def __new__(cls, local: Tensor, start: int, shape: Sequence[int]) -> "FlatRange":
        if local.dim() != 1:
            raise ValueError(f"a flat range is 1-D, got shape {tuple(local.shape)}")
        held: FlatRange = torch.Tensor._make_subclass(cls, local.detach())
        held.start = start if local.numel() else 0
        held.whole_shape = torch.Size(shape)
        return held

    @property
    def local(self) -> Tensor:
        return self.as_subclass(Tensor)

    def size(self, *_dims: int) -> torch.Size:  # type: ignore[override]
        return torch.Size([self.whole_shape.numel()])

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=torch.Size([self.local.numel()]))

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        if self.local.numel() == 0:
            return []
        data = TensorWriteData(
            chunk=self._chunk(), properties=TensorProperties.create_from_tensor(self.local), size=self.size()
        )
        index = MetadataIndex(fqn, torch.Size([self.start]))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.local.numel() else []

    def __get_tensor_shard__(self, _index: MetadataIndex) -> Tensor:
        return self.local
