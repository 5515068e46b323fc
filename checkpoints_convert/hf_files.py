"""Hugging Face directories, tensor by tensor: a reader and a writer that hold one tensor at a time.

A safetensors file is eight bytes (the header's length), a JSON header with the type, shape and
place of each tensor, and the tensors' bytes.  Reading by plain `pread` and not through a memory map
keeps the resident memory at what is in use; writing to places known in advance lets threads write
at once, and no file is ever whole in memory.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints_convert.raw import bytes_of, read_into, write_at
from megatron_prepo import ownership
from megatron_prepo.durable import naming
from megatron_prepo.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class HFTensors:
    """The tensors of a Hugging Face directory by name, read when asked for; safe from threads.

    Raises UserError for a directory without weights, a damaged or truncated file, and an index that
    names a missing file or tensor.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"no weights in {directory}: it holds no *.safetensors file")
        self.places: dict[str, TensorPlace] = {}
        self._descriptors = {file: os.open(file, os.O_RDONLY) for file in files}
        for file in files:
            for name, place in _read_header(file).items():
                if name in self.places:
                    raise UserError(f"{name} is in {self.places[name].file} and in {file}")
                self.places[name] = place
        self._check_index()

    def __enter__(self) -> "HFTensors":
        return self

    def __exit__(self, *_) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name, lambda shape, dtype: torch.empty(shape, dtype=dtype))

    def read(self, name: str, empty: Callable[..., torch.Tensor]) -> torch.Tensor:
        """A tensor, read into what `empty(shape, dtype)` gives."""
        if name not in self.places:
            raise UserError(f"{self.directory} has no tensor {name}")
        place = self.places[name]
        tensor = empty(place.shape, place.dtype)
        read_into(self._descriptors[place.file], tensor, place.offset)
        return tensor

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self.places)

    def _check_index(self) -> None:
        index = self.directory / INDEX
        if not index.is_file():
            return
        try:
            weight_map = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is damaged: {error!r}") from error
        for file in sorted(set(weight_map.values())):
            if not (self.directory / file).is_file():
                raise UserError(f"{index} names {file}, which is missing")
        for name, file in weight_map.items():
            if name not in self.places or self.places[name].file.name != file:
                raise UserError(f"{index} says that {name} is in {file}, but it is not")


class HFWriter:
    """Writes a Hugging Face directory aside; `finish` gives it its name.

    `shapes`: name -> (dtype, shape) of all tensors, in the order in which files are filled.
    `like`: a directory whose configuration and tokenizer files are carried over; None: none are.
    `kind`: what its marker calls it (`ownership.py`), and a directory of the same kind is replaced;
    None: it is the user's once it is finished.
    """

    def __init__(
        self,
        directory: str | Path,
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        like: str | Path | None,
        shard_bytes: int = 5 << 30,
        kind: str | None = None,
    ):
        self.directory, self.kind = Path(directory), kind
        self.aside = ownership.begin(self.directory)
        self.places: dict[str, TensorPlace] = {}
        self._descriptors: dict[Path, int] = {}
        self._missing = set(shapes)
        try:
            self._start(shapes, like, shard_bytes)
        except BaseException:
            self.abandon()
            raise

    def _start(self, shapes: dict, like: str | Path | None, shard_bytes: int) -> None:
        """Headers, index and other files."""
        shards = _shards(shapes, shard_bytes)
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            path = self.aside / (file if len(shards) > 1 else "model.safetensors")
            self.places |= _write_header(path, {name: shapes[name] for name in names})
        for file in {place.file for place in self.places.values()}:
            self._descriptors[file] = os.open(file, os.O_WRONLY)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(p.num_bytes for p in self.places.values())},
                "weight_map": {name: p.file.name for name, p in sorted(self.places.items())},
            }
            with naming(self.aside / INDEX):
                (self.aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        if like is not None:
            copy_other_files(like, self.aside)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place; from any thread, each name once."""
        place = self.places[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape), (
            f"{name}: {tensor.dtype} {tuple(tensor.shape)}, announced {place.dtype} {place.shape}"
        )
        self._missing.remove(name)
        if place.num_bytes:
            data = bytes_of(tensor.contiguous().cpu())
            with naming(place.file):
                write_at(self._descriptors[place.file], data, place.offset)

    def finish(self) -> None:
        """Force all to disk and rename; replaces a directory that is ours, and keeps any other."""
        assert not self._missing, f"never written: {sorted(self._missing)}"
        self._close()
        ownership.publish(self.aside, self.directory, self.kind)

    def abandon(self) -> None:
        """Remove what was written."""
        self._close()
        ownership.abandon(self.aside)

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def buckets(
    weights: Iterable[tuple[str, torch.Tensor]], limit: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Consecutive tensors of at most `limit` bytes together; a larger one comes alone."""
    bucket, size = [], 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if bucket and size + num_bytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += num_bytes
    if bucket:
        yield bucket


def copy_other_files(source: str | Path, target: str | Path) -> None:
    """Copy configuration and tokenizer files: all but weights and their index."""
    for file in Path(source).iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        ours = file.name in ownership.NOT_CONTENT
        if file.is_file() and not (weights or ours or file.name.endswith(".index.json")):
            shutil.copyfile(file, Path(target) / file.name)


def _read_header(file: Path) -> dict[str, TensorPlace]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file} is damaged or truncated: its header is not complete")
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{file} is damaged: its header is not JSON") from error
    places, end = {}, 0
    try:
        entries = [
            (*entry["data_offsets"], name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
        entries.sort()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged: its header is not a table of tensors") from error
    for begin, stop, name, kind, shape in entries:
        if kind not in DTYPES:
            raise UserError(f"{file}: {name} has type {kind}, which is not supported")
        dtype = DTYPES[kind]
        if begin != end:
            raise UserError(f"{file} is damaged: {name} begins at {begin}, not at {end}")
        if stop - begin != _num_bytes(dtype, shape):
            raise UserError(f"{file} is damaged: {name} has {stop - begin} bytes for {shape}")
        places[name] = TensorPlace(file, 8 + length + begin, stop - begin, dtype, shape)
        end = stop
    if 8 + length + end != size:
        raise UserError(
            f"{file} is damaged or truncated: {size} bytes, its header asks for {8 + length + end}"
        )
    return places


def _write_header(path: Path, shapes: dict) -> dict[str, TensorPlace]:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in shapes.items():
        stop = offset + _num_bytes(dtype, shape)
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    places = {}
    for name, (dtype, shape) in shapes.items():
        begin, stop = header[name]["data_offsets"]
        places[name] = TensorPlace(path, 8 + len(text) + begin, stop - begin, dtype, shape)
    return places


def _shards(shapes: dict, limit: int) -> list[list[str]]:
    """Names in order, cut into files of at most `limit` bytes; a larger tensor has its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in shapes.items():
        num_bytes = _num_bytes(dtype, shape)
        if shards[-1] and size + num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def _num_bytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count * dtype.itemsize
