"""torch.distributed.checkpoint over plain files with a JSON index instead of its pickled one.

DCP plans and writes the flat ranges (each rank its own file, ranges held by several ranks written once) and
reshards at load. Only its `.metadata` file is replaced: a pickle could run code when a checkpoint from
elsewhere is opened, and JSON can be read by anything. Tensors are read with `weights_only=True` by DCP
itself.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

INDEX = "ranges.json"


class RangeWriter(FileSystemWriter):
    """Writes each rank's ranges to `__RANK_0.distcp`, fsynced, and the merged index to `ranges.json`."""

    def __init__(self, path: Path):
        super().__init__(path, single_file_per_rank=True, sync_files=True, overwrite=False)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[dict[str, Any]]] = {}
        for result in (r for rank in results for r in rank):
            assert isinstance(result.index.offset, torch.Size)
            where = result.storage_data
            chunks.setdefault(result.index.fqn, []).append(
                {
                    "start": result.index.offset[0],
                    "file": where.relative_path,
                    "offset": where.offset,
                    "length": where.length,
                }
            )
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            counts = {chunk.offsets[0]: chunk.sizes[0] for chunk in entry.chunks}
            tensors[name] = {
                "size": entry.size[0],
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "chunks": [{**chunk, "count": counts[chunk["start"]]} for chunk in chunks[name]],
            }
        with open(Path(self.path) / INDEX, "w") as file:
            json.dump({"format": "trivium-ranges-1", "tensors": tensors}, file)
            file.flush()
            os.fsync(file.fileno())


class RangeReader(FileSystemReader):
    """Reads what `RangeWriter` wrote."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        tensors = json.loads((Path(self.path) / INDEX).read_text())["tensors"]
        described: dict[str, Any] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for name, tensor in tensors.items():
            chunks = []
            for position, chunk in enumerate(tensor["chunks"]):
                start = torch.Size([chunk["start"]])
                chunks.append(ChunkStorageMetadata(offsets=start, sizes=torch.Size([chunk["count"]])))
                index = MetadataIndex(name, start, position)
                storage[index] = _StorageInfo(chunk["file"], chunk["offset"], chunk["length"])
            properties = TensorProperties(dtype=getattr(torch, tensor["dtype"]))
            described[name] = TensorStorageMetadata(properties, torch.Size([tensor["size"]]), chunks)
        return Metadata(described, storage_data=storage, storage_meta=StorageMeta(load_id=self.load_id))


def read_index(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {size, dtype, chunks} of a checkpoint directory, without reading a tensor."""
    tensors: dict[str, dict[str, Any]] = json.loads((path / INDEX).read_text())["tensors"]
    return tensors
