"""torch.distributed.checkpoint over plain files: raw ranges, one file a rank, and an index in JSON.

DCP plans: which ranges exist, who writes what, and at load how the ranges of one layout are cut and joined
into those of another. The files are ours. Its own writer pickles every tensor into a zip and its index into
`.metadata`; a pickle could run code when a checkpoint from elsewhere is opened. Here `rank-00003.bin` holds
the bytes of the ranges end to end, hashed in the same pass that writes them, and `ranges.json` says what
lies where, so any program can read them (`numpy.fromfile` with an offset). A load reads just the bytes that
a rank needs straight into its tensors.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from trainer.durable import write_durably
from trainer.engine.commit import INDEX
from trainer.errors import UserError
from trainer.faults import reach

FORMAT = "trivium-ranges-2"
PIECE_BYTES = 1 << 24  # written and hashed at a time: progress is seen, and the hash finds them in the cache


@dataclass(frozen=True)
class Place:
    """Where the bytes of one range lie."""

    file: str
    offset: int
    length: int


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    plain = tensor.detach().as_subclass(Tensor)
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _read_into(path: Path, offset: int, box: Tensor) -> None:
    data = _bytes_of(box)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while data:
            count = file.readinto(data)
            if not count:
                raise OSError(f"{path}: ends where {len(data)} more bytes were promised")
            data = data[count:]


def _done(value: Any) -> Any:
    future: Any = Future()
    future.set_result(value)
    return future


class RangeWriter(StorageWriter):
    """Writes this rank's ranges into one fsynced file, and on the coordinator the merged index.

    `written` afterwards: {file: [bytes, xxh3_128]} of this rank. `progress` is called after each piece.
    """

    def __init__(self, path: Path, progress: Callable[[], None] = lambda: None):
        super().__init__()
        self.path = path
        self.progress = progress
        self.written: dict[str, list[Any]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **_kwargs: Any) -> None:
        """The directory was made by whoever ordered the save."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank-{i:05d}.bin") for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if not plan.items:
            return _done(results)
        name, digest, offset = str(plan.storage_data), xxhash.xxh3_128(), 0
        with open(self.path / name, "xb", buffering=0) as file:
            for item in plan.items:
                reach("save/shard")
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                data = _bytes_of(tensor.detach().cpu().contiguous())
                for begin in range(0, len(data), PIECE_BYTES):
                    piece = data[begin : begin + PIECE_BYTES]
                    digest.update(piece)
                    while piece:  # a write may take less than it was given, e.g. on a disk that fills up
                        piece = piece[file.write(piece) :]
                    self.progress()
                results.append(WriteResult(item.index, len(data), Place(name, offset, len(data))))
                offset += len(data)
            os.fsync(file.fileno())
        self.written = {name: [offset, digest.hexdigest()]}
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[dict[str, Any]]] = {}
        for result in (r for rank in results for r in rank):
            assert isinstance(result.index.offset, torch.Size)
            where = result.storage_data
            chunks.setdefault(result.index.fqn, []).append(
                {
                    "start": result.index.offset[0],
                    "file": where.file,
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
        write_durably(self.path / INDEX, json.dumps({"format": FORMAT, "tensors": tensors}))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # never chosen by a path alone


class RangeReader(StorageReader):
    """Reads what `RangeWriter` wrote."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.places: dict[MetadataIndex, Place] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one load to the next."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        described: dict[str, Any] = {}
        places: dict[MetadataIndex, Place] = {}
        for name, tensor in read_index(self.path).items():
            chunks = []
            for position, chunk in enumerate(tensor["chunks"]):
                start = torch.Size([chunk["start"]])
                chunks.append(ChunkStorageMetadata(offsets=start, sizes=torch.Size([chunk["count"]])))
                index = MetadataIndex(name, start, position)
                places[index] = Place(chunk["file"], chunk["offset"], chunk["length"])
            properties = TensorProperties(dtype=getattr(torch, tensor["dtype"]))
            described[name] = TensorStorageMetadata(properties, torch.Size([tensor["size"]]), chunks)
        return Metadata(described, storage_data=places, storage_meta=StorageMeta())

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_kwargs: Any
    ) -> None:
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        def where(item: Any) -> tuple[str, int]:
            place = self.places[item.storage_index]
            return place.file, place.offset

        for item in sorted(plan.items, key=where):
            place = self.places[item.storage_index]
            target = planner.resolve_tensor(item).detach()
            direct = target.device.type == "cpu" and target.is_contiguous()
            box = target if direct else torch.empty(target.shape, dtype=target.dtype)
            _read_into(
                self.path / place.file, place.offset + item.storage_offsets[0] * box.element_size(), box
            )
            if not direct:
                target.copy_(box)
            planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def read_index(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {size, dtype, chunks} of a checkpoint directory, without reading a tensor.

    Raises:
        UserError: another version of the format.
    """
    content = json.loads((path / INDEX).read_text())
    if content["format"] != FORMAT:
        raise UserError(
            f"{path / INDEX}: format {content['format']} where this version reads {FORMAT}: load it with the "
            f"version of Trivium that wrote it"
        )
    tensors: dict[str, dict[str, Any]] = content["tensors"]
    return tensors


def read_tensor(path: Path, entry: dict[str, Any]) -> Tensor:
    """One whole flat tensor of the checkpoint directory `path`; `entry` is its part of the index."""
    whole = torch.empty(entry["size"], dtype=getattr(torch, entry["dtype"]))
    for chunk in entry["chunks"]:
        _read_into(
            path / chunk["file"], chunk["offset"], whole[chunk["start"] : chunk["start"] + chunk["count"]]
        )
    return whole
