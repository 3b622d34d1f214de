"""A flat range of a named tensor: the one form in which every engine keeps what it owns in a checkpoint.

FSDP2 shards dimension 0 and DeepSpeed shards the flattened tensor; both are a contiguous range of the flattened tensor.
Stored 1-D under the parameter's name, any engine on any number of ranks can read its own ranges back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatRange:
    """Elements `start .. start+len(local)-1` of a flattened tensor of `shape`.

    The dunder methods are torch.distributed.checkpoint's `_Checkpointable` protocol: it asks an object which chunk of
    the global (here 1-D) tensor it holds, writes that, and at load cuts and joins chunks as the reader's ranges need.
    """

    def __init__(self, local: Tensor, start: int, shape: Sequence[int]):
        if local.dim() != 1:
            raise ValueError(f"a flat range is 1-D, got shape {tuple(local.shape)}")
        self.local = local.detach()
        self.start = start if local.numel() else 0
        self.shape = torch.Size(shape)

    def size(self) -> torch.Size:
        return torch.Size([self.shape.numel()])

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
