"""Reader and writer of Megatron's `torch_dist` checkpoints by chunk, without a process group.

A checkpoint directory has data files `__<rank>_<writer>.distcp`, which are sequences of tensors
saved by `torch.save`; `.metadata`, torch's pickled table with the location of every chunk of every
tensor; `common.pt` with everything that is not a tensor (from megatron-core 0.19 on it is also in a
data file, in a list with one element); and `metadata.json`, which names the format.
Checkpoints can be exchanged with `megatron.core.dist_checkpointing` in both directions, under any
layout.  Any number of threads may write and read; each holds one chunk in memory.
"""

import functools
import io
import json
import os
import pickle
import tempfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_prepo.errors import UserError
from megatron_prepo.models.raw import read_into, tensor_bytes, write_at

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


COMMON = "common_state/shard_0_1"
"""Megatron's name of the state that is not tensors, from 0.19 on."""
PICKLE_ERRORS = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError),
    *(KeyError, RuntimeError, TypeError, ValueError),
)
"""Exceptions of unpickling for bytes that are not a pickle, or not one of the expected type."""


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor of the checkpoint."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    """Shape, with the same number of dimensions as the global shape; stacked layers have a leading
    1."""


class TorchDistWriter:
    """Writer that appends chunks to data files and writes the tables at the end."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._descriptors: list[int] = []
        self._of_thread = threading.local()

    def write(self, chunk: Chunk, tensor: torch.Tensor) -> None:
        """Append a chunk; each thread has a separate file."""
        before, after = _envelope(chunk.shape, tensor.dtype)
        data = tensor_bytes(tensor.contiguous())
        descriptor, name, begin = self._file()
        end = begin
        for part in (before, data, after):
            write_at(descriptor, part, end)
            end += len(part)
        self._of_thread.end = end
        with self._lock:
            entry = self._tensors.setdefault(
                chunk.key,
                TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype), torch.Size(chunk.global_shape), []
                ),
            )
            assert entry.size == torch.Size(chunk.global_shape), f"{chunk.key} has two shapes"
            entry.chunks.append(
                ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
            )
            index = MetadataIndex(chunk.key, chunk.offset, len(entry.chunks) - 1)
            assert index not in self._places, f"{chunk.key} at {chunk.offset} was written twice"
            self._places[index] = _StorageInfo(name, begin, end - begin)

    def finish(self, common: dict[str, Any]) -> None:
        """Write the tables; the caller renames the directory."""
        self.close()
        metadata = Metadata(state_dict_metadata=self._tensors, storage_data=self._places)
        with (self.directory / ".metadata").open("wb") as stream:
            pickle.dump(metadata, stream)
        torch.save(common, self.directory / "common.pt")
        (self.directory / "metadata.json").write_text(json.dumps(FORMAT))

    def close(self) -> None:
        """Close the data files."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def _file(self) -> tuple[int, str, int]:
        """Return this thread's file: descriptor, name, end."""
        mine = self._of_thread
        if not hasattr(mine, "name"):
            with self._lock:
                mine.name = f"__0_{len(self._descriptors)}.distcp"
                path = self.directory / mine.name
                mine.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                mine.end = 0
                self._descriptors.append(mine.descriptor)
        return mine.descriptor, mine.name, mine.end


class TorchDistReader:
    """Reader of any region of any tensor of a checkpoint; thread-safe.

    Raises UserError for an incomplete checkpoint.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        table = self.directory / ".metadata"
        if not table.is_file():
            raise UserError(f"{directory} is not a torch_dist checkpoint: it has no .metadata")
        with table.open("rb") as stream:
            try:
                metadata = _TableUnpickler(stream).load()
            except PICKLE_ERRORS as error:
                raise UserError(f"{table} is damaged: {error}") from error
        if not isinstance(metadata, Metadata):
            raise UserError(f"{table} is damaged: it does not contain a table")
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._places = metadata.storage_data
        self._check_files()

    def weights(self) -> set[str]:
        """Names of the model's tensors, without those of an optimizer."""
        return {key for key in self.tensors if not key.startswith(("optimizer.", "chained_"))}

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the global shape of a tensor."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of a tensor."""
        return self._entry(key).properties.dtype

    def read(
        self,
        key: str,
        offset: Sequence[int],
        shape: Sequence[int],
        empty: Callable[..., torch.Tensor] = lambda shape, dtype: torch.empty(shape, dtype=dtype),
    ) -> torch.Tensor:
        """Return the region of `shape` at `offset`, from all chunks that overlap it.

        `empty(shape, dtype)` allocates the memory.
        """
        entry = self._entry(key)
        target, covered = empty(tuple(shape), entry.properties.dtype), 0
        for number, chunk in enumerate(entry.chunks):
            low = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offset, shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(a < b for a, b in zip(low, high, strict=True)):
                part = target[_slices(low, high, offset)]
                inside = _slices(low, high, chunk.offsets)
                self._read_part(MetadataIndex(key, chunk.offsets, number), chunk, inside, part)
                covered += part.numel()
        if covered != target.numel():
            raise UserError(
                f"{self.directory}: {key} is incomplete: of the region {tuple(shape)} at "
                f"{tuple(offset)} of {tuple(entry.size)}, {target.numel() - covered} elements are "
                "missing"
            )
        return target

    def common(self) -> dict[str, Any]:
        """Return the state that is not tensors."""
        from megatron.core.safe_globals import register_safe_globals

        register_safe_globals()
        place = self._places.get(MetadataIndex(COMMON))
        file = self.directory / (place.relative_path if place else "common.pt")
        try:
            if place is None:
                common: dict[str, Any] = torch.load(file, weights_only=True)
                return common
            with file.open("rb") as stream:
                stream.seek(place.offset)
                (common,) = torch.load(io.BytesIO(stream.read(place.length)), weights_only=True)
            return common
        except (OSError, *PICKLE_ERRORS) as error:
            raise UserError(f"{file} is damaged: {' '.join(str(error).split())[:300]}") from error

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self.tensors:
            raise UserError(f"{self.directory} has no tensor {key}")
        return self.tensors[key]

    def _read_part(
        self,
        index: MetadataIndex,
        chunk: ChunkStorageMetadata,
        inside: tuple[slice, ...],
        part: torch.Tensor,
    ) -> None:
        """Fill `part` from a region of a chunk."""
        place = self._places[index]
        path = self.directory / place.relative_path
        stored = torch.empty(tuple(chunk.sizes), dtype=part.dtype, device="meta")
        wanted = stored[inside]
        begin = _raw_data(path, place.offset, place.length, tuple(chunk.sizes), part.dtype)
        if begin is None:  # not the format of torch.save for a plain tensor: let torch read it
            with path.open("rb") as stream:
                stream.seek(place.offset)
                data = io.BytesIO(stream.read(place.length))
            try:
                part.copy_(torch.load(data, map_location="cpu", weights_only=True)[inside])
            except PICKLE_ERRORS as error:
                raise UserError(f"{path} is damaged at {place.offset}: {index.fqn}") from error
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if wanted.is_contiguous() and part.is_contiguous():
                start = begin + wanted.storage_offset() * part.element_size()
                read_into(descriptor, part, start)
            else:
                whole = torch.empty(tuple(chunk.sizes), dtype=part.dtype)
                read_into(descriptor, whole, begin)
                part.copy_(whole[inside])
        finally:
            os.close(descriptor)

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for place in self._places.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
        for name, end in ends.items():
            file = self.directory / name
            if not file.is_file() or file.stat().st_size < end:
                raise UserError(f"{self.directory} is damaged: {name} is missing or truncated")


class _TableUnpickler(pickle.Unpickler):
    """Unpickler of `.metadata` that allows only torch's table classes, each by its name.

    Entire modules are not allowed: a dotted name leads from any of them to `os.system`.
    """

    ALLOWED: ClassVar = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.planner": {
            "SavePlan",
            "TensorWriteData",
            "WriteItem",
            "WriteItemType",
        },
        "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "strided", "float64", "float32", "float16", "bfloat16"}
        | {"int64", "int32", "int16", "int8", "uint8", "bool"},
        "collections": {"OrderedDict"},
        "builtins": {"set", "frozenset", "list", "dict", "tuple"},
        "pathlib": {"Path", "PosixPath"},
        "pathlib._local": {"Path", "PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


@functools.cache
def _envelope(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Return the bytes that `torch.save` writes before and after those of a contiguous tensor.

    They are produced by torch, around a hole; so most of a chunk is written without a copy.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tensor"
        with torch.serialization.skip_data():
            torch.save(torch.empty(shape, dtype=dtype), path)
        size = path.stat().st_size
        num_bytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
        begin = _raw_data(path, 0, size, shape, dtype)
        assert begin is not None, "torch.save has another layout in this version of torch"
        with path.open("rb") as stream:
            before = stream.read(begin)
            stream.seek(begin + num_bytes)
            return before, stream.read()


@functools.cache
def _description(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """Return torch.save's pickle of a contiguous CPU tensor, without its bytes."""
    stream = io.BytesIO()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), stream)
    archive = zipfile.ZipFile(stream)
    (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    return archive.read(name)


def _raw_data(
    path: Path, offset: int, length: int, shape: tuple[int, ...], dtype: torch.dtype
) -> int | None:
    """Return the position in the file of the bytes of a tensor that `torch.save` wrote at `offset`.

    The result is None unless there is one plain contiguous tensor of that shape and type.
    """
    with path.open("rb") as stream:
        try:
            archive = zipfile.ZipFile(_Window(stream, offset, length))
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if [archive.read(name) for name in pickles] != [_description(shape, dtype)]:
                return None  # such as strides: the bytes are not in row order
        except zipfile.BadZipFile:
            return None
        records = [info for info in archive.infolist() if "/data/" in info.filename]
        num_bytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
        if len(records) != 1 or records[0].file_size != num_bytes or records[0].compress_type:
            return None
        stream.seek(offset + records[0].header_offset)
        header = stream.read(30)  # local file header of a zip archive
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return offset + records[0].header_offset + len(header) + name + extra


class _Window(io.RawIOBase):
    """File object over a range of a file."""

    def __init__(self, stream: io.BufferedReader, offset: int, length: int) -> None:
        self._stream, self._offset, self._length, self._at = stream, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + position
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._offset + self._at)
        count = self._stream.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += count
        return count


def _slices(low: Sequence[int], high: Sequence[int], base: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for a, b, c in zip(low, high, base, strict=True))
