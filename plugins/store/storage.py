"""The storage below ``torch.distributed.checkpoint``: raw bytes with checksums, an index in JSON, and no pickle.

torch plans who writes and reads which piece of which tensor; what is here moves the bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from drivetrain.errors import DamagedStateError, StoreError, nearest
from drivetrain.plugins.store.state_folder import Chunk, Entry, Index, StateFolders, flush, writing


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class FolderWriter(StorageWriter):
    """Writes one state; made anew for each."""

    def __init__(
        self, folders: StateFolders, step: int, metadata: dict[str, Any], problem: StoreError | None = None
    ) -> None:
        """problem: why this rank can't take part; the others are told so."""
        self._folders, self._step, self._metadata, self._problem = folders, step, metadata, problem
        self._file = ""
        self.has_begun = False

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._problem is not None:
            raise self._problem
        self._file = f"rank-{kwargs['rank']:05d}.bin"
        if is_coordinator:
            self._folders.begin(self._step)
            self.has_begun = True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        path = self._folders.unfinished(self._step) / self._file
        if not plan.items:
            return _done([])
        with writing(path), path.open("xb") as file:
            results = [self._write(file, item, planner) for item in plan.items]
            flush(file.fileno(), file)
        return _done(results)

    def _write(self, file: BinaryIO, item: WriteItem, planner: SavePlanner) -> WriteResult:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        assert item.tensor_data is not None
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        chunk = item.tensor_data.chunk
        placed = Chunk(tuple(chunk.offsets), tuple(chunk.sizes), self._file, file.tell(), len(data), zlib.crc32(data))
        file.write(data)
        return WriteResult(item.index, len(data), placed)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            chunks[result.index.fqn].append(result.storage_data)
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensors[name] = Entry(dtype, tuple(stored.size), tuple(chunks[name]))
        self._folders.finish(self._step, Index(self._metadata, tensors))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # it is never chosen by a path: the store makes it


class FolderReader(StorageReader):
    """Reads one state; made anew for each."""

    def __init__(self, folders: StateFolders, step: int, into: Mapping[str, torch.Tensor]) -> None:
        """problem: what is wrong with the state or with what is to be filled; the other ranks are told so."""
        self._folder = folders.complete(step)
        self._index = Index({}, {})
        self.problem: StoreError | None = None
        try:
            self._index = Index.read(folders.find(step))
            for name, tensor in into.items():
                check_fits(name, tensor, self._index, str(self._folder))
        except StoreError as error:
            self.problem = error

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        for name, entry in self._index.tensors.items():
            properties = TensorProperties(dtype=getattr(torch, entry.dtype))
            pieces = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), pieces)
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self.problem is not None:
            raise self.problem  # before any rank writes to a tensor

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        for index, items in wanted.items():
            stored = self._read(index)
            for item in items:
                piece = stored
                for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    piece = piece.narrow(dim, start, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(piece)
                planner.commit_tensor(item, target)
        return _done(None)

    def _read(self, index: MetadataIndex) -> torch.Tensor:
        """One chunk, whole and checked."""
        entry = self._index.tensors[index.fqn]
        chunk = next(chunk for chunk in entry.chunks if chunk.offsets == tuple(index.offset or ()))
        path = self._folder / chunk.file
        try:
            with path.open("rb") as file:
                file.seek(chunk.at)
                data = bytearray(file.read(chunk.length))
        except OSError as error:
            raise DamagedStateError(
                f"a file of the state can't be read: {error.strerror or error}", where=str(path)
            ) from error
        if len(data) != chunk.length:
            raise DamagedStateError(
                f"the file is cut short: tensor {index.fqn!r} needs {chunk.length} bytes at {chunk.at}",
                where=str(path),
                found=len(data),
            )
        if zlib.crc32(data) != chunk.crc32:
            raise DamagedStateError(f"the bytes of tensor {index.fqn!r} are not those that were saved", where=str(path))
        dtype = getattr(torch, entry.dtype)
        if not data:
            return torch.empty(chunk.sizes, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(chunk.sizes)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def check_fits(name: str, tensor: object, index: Index, where: str) -> None:
    """Raise StoreError unless the state has ``name`` with the tensor's shape and dtype."""
    entry = index.tensors.get(name)
    if entry is None:
        close = nearest(name, index.tensors)
        raise StoreError(
            f"the state holds no tensor {name!r}",
            where=where,
            hint=f"The nearest name is {close!r}." if close else None,
        )
    check_tensor(name, tensor)
    assert isinstance(tensor, torch.Tensor)
    found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if found != (entry.shape, entry.dtype):
        raise StoreError(
            f"tensor {name!r} was saved with another shape or dtype",
            where=where,
            found=found,
            allowed=str((entry.shape, entry.dtype)),
        )


def check_tensor(name: object, tensor: object) -> None:
    """Raise StoreError unless this is something that a state can hold."""
    if not isinstance(name, str):
        raise StoreError("the name of a tensor must be a text", found=name)
    if not isinstance(tensor, torch.Tensor):
        raise StoreError(
            f"{name!r} is no tensor but a {type(tensor).__name__}", hint="What is no tensor belongs to the metadata."
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise StoreError(f"{name!r} has no plain bytes: only dense tensors with values can be saved")
