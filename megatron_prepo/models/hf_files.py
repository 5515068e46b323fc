"""Reader and writer of Hugging Face directories that hold one tensor in memory at a time.

A safetensors file consists of eight bytes (the header's length), a JSON header with the type, shape
and offset of each tensor, and the tensors' bytes.  Reading with `pread` instead of a memory map
limits resident memory to tensors in use; writing to offsets known in advance lets threads write
concurrently, and no file is ever entirely in memory.
"""

import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import naming
from megatron_prepo.models.hf_config import QUANTIZATION_KEYS, listed
from megatron_prepo.models.raw import read_into, tensor_bytes, write_at

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
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot"),
    *(".onnx", ".onnx_data", ".tflite", ".npz", ".distcp"),
)
"""Suffixes of files with weights, in our format or another one."""
OTHER_FOLDERS = ("consolidated", "original", "onnx", "openvino", "coreml", "checkpoints", "release")
OWN_MARKS = ("config.yaml", "latest_checkpointed_iteration.txt", "metadata.json", SINGLE, INDEX)
"""Files in a folder below a model that show a run, a checkpoint or another model."""
DTYPE_KEYS = ("dtype", "torch_dtype")
EMBEDDING, HEAD, PREFIX = "model.embed_tokens.weight", "lm_head.weight", "model."
WHOLE_NAME = re.compile(r"model\.(embed_tokens|layers|norm)\.|lm_head\.")
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|SCB|weight_packed|weight_scale|weight_scale_inv"
    r"|weight\.(absmax|quant_map|nested_absmax|quant_state.*))$"
)
"""Names of tensors in the formats of GPTQ, AWQ, bitsandbytes, compressed tensors and FP8."""
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type of a table of tensors: name -> (dtype, shape), in the order in which files are filled."""


@dataclass(frozen=True)
class TensorPlace:
    """Location of a tensor's bytes."""

    file: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class HFTensors:
    """Tensors of a Hugging Face directory by name, read on demand; thread-safe.

    Files and names are resolved as in `transformers`: `model.safetensors` if it exists, else the
    files of the index; a missing or additional prefix `model.`; all experts of a layer in one
    tensor, which have separate names here.  `tied`: the embedding may be stored under the head's
    name.

    Raises UserError for a directory without weights, with quantised ones or those of an adapter, a
    damaged or truncated file, and an index that names a missing file or tensor.
    """

    def __init__(self, directory: str | Path, *, tied: bool = False) -> None:
        self.directory = Path(directory)
        if (self.directory / ADAPTER).is_file():
            raise UserError(
                f"{directory} contains an adapter ({ADAPTER}) for another model; merge it into "
                "that model's weights first"
            )
        self.places: dict[str, TensorPlace] = {}
        headers = {file: _read_header(file) for file in self._files()}
        for name, file in self._weight_map.items():
            if name not in headers[file]:
                where = f"{listed([name])} in {file.name}"
                raise UserError(f"{self.directory / INDEX} lists {where}, which does not have it")
        for file, header in headers.items():
            for name, place in header.items():
                self._add(name, file, place)
        if quantized := [name for name in self.places if QUANTIZED.search(name)]:
            raise UserError(
                f"{directory} contains a quantised model, which is not supported; use the original "
                f"weights, or dequantise them: {listed(quantized)}"
            )
        if tied and HEAD in self.places and EMBEDDING not in self.places:
            self.places[EMBEDDING] = self.places.pop(HEAD)
        self._descriptors = {file: os.open(file, os.O_RDONLY) for file in headers}

    def __enter__(self) -> "HFTensors":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name, lambda shape, dtype: torch.empty(shape, dtype=dtype))

    def read(self, name: str, empty: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return a tensor, read into the memory of `empty(shape, dtype)`."""
        if name not in self.places:
            raise UserError(f"{self.directory} has no tensor {name}")
        place = self.places[name]
        tensor = empty(place.shape, place.dtype)
        read_into(self._descriptors[place.file], tensor, place.offset)
        return tensor

    def names(self) -> set[str]:
        """Return all tensor names."""
        return set(self.places)

    def _add(self, stored: str, file: Path, place: TensorPlace) -> None:
        for name, part in _experts(_full_name(stored), place):
            if name in self.places:
                other = self.places[name].file
                where = f"{listed([name])} is in {other.name} and in {file.name}"
                raise UserError(f"{self.directory}: {where}")
            self.places[name] = part

    def _files(self) -> list[Path]:
        """Return the files to read, and set the table of names (empty for a single file)."""
        index, self._weight_map = self.directory / INDEX, {}
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        if not index.is_file():
            others = sorted(p.name for p in self.directory.glob("*") if p.suffix in OTHER_WEIGHTS)
            besides = f"; transformers would not read {listed(others)} either" if others else ""
            raise UserError(
                f"no weights in {self.directory}: it has neither {SINGLE} nor {INDEX}{besides}"
            )
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{index} is damaged: {error!r}") from error
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} is damaged: weight_map is not a table of tensors and files")
        for name, file in weight_map.items():
            if type(file) is not str or not file:
                raise UserError(f"{index} is damaged: the file of {listed([name])} is {file!r}")
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise UserError(f"{index} names {listed([file])}, which is outside its directory")
            if not os.path.isfile(self.directory / file):
                raise UserError(f"{index} names {listed([file])}, which is missing")
        self._weight_map = {name: self.directory / file for name, file in weight_map.items()}
        return sorted(set(self._weight_map.values()))


def _full_name(stored: str) -> str:
    """Return a tensor's name in the complete model, with the prefix as `transformers` sets it."""
    short = stored.removeprefix(PREFIX)
    if short != stored and WHOLE_NAME.match(short):
        return short
    return PREFIX + stored if WHOLE_NAME.match(PREFIX + stored) else stored


def _experts(name: str, place: TensorPlace) -> Iterator[tuple[str, TensorPlace]]:
    """Yield name and place, or those of each expert's parts.

    In memory, and optionally in files, transformers 5 stores the experts of a layer in two tensors:
    gate over up `[experts, 2 * width, hidden]` and down `[experts, hidden, width]`.
    """
    layer, _, kind = name.rpartition(".mlp.experts.")
    parts = FUSED.get(kind, ())
    if not parts or len(place.shape) != 3 or not place.num_bytes or place.shape[1] % len(parts):
        yield name, place
        return
    experts, rows, columns = place.shape
    shape = (rows // len(parts), columns)
    size = _num_bytes(place.dtype, shape)
    for number in range(experts * len(parts)):
        expert, part = divmod(number, len(parts))
        yield (
            f"{layer}.mlp.experts.{expert}.{parts[part]}.weight",
            TensorPlace(place.file, place.offset + number * size, size, place.dtype, shape),
        )


class HFWriter:
    """Writer of a Hugging Face directory, under a temporary name until `finish` renames it.

    `shapes`: all tensors.
    `like`: a directory whose files other than weights are copied (`carry_over`); None: no files.
    `kind`: kind in its marker (`ownership.py`); an existing directory of the same kind is replaced.
    None: the directory belongs to the user when it is finished.
    """

    def __init__(
        self,
        directory: str | Path,
        shapes: Shapes,
        *,
        like: str | Path | None,
        shard_bytes: int = 5 << 30,
        kind: str | None = None,
    ) -> None:
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

    def _start(self, shapes: Shapes, like: str | Path | None, shard_bytes: int) -> None:
        """Write headers, index and other files."""
        shards = _shards(shapes, shard_bytes)
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            path = self.aside / (file if len(shards) > 1 else "model.safetensors")
            self.places |= _write_header(path, {name: shapes[name] for name in names})
        for path in {place.file for place in self.places.values()}:
            self._descriptors[path] = os.open(path, os.O_WRONLY)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(p.num_bytes for p in self.places.values())},
                "weight_map": {name: p.file.name for name, p in sorted(self.places.items())},
            }
            with naming(self.aside / INDEX):
                (self.aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        if like is not None:
            carry_over(like, self.aside, dtype=widest(dtype for dtype, _ in shapes.values()))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor to its place; callable from any thread, once per name."""
        place = self.places[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape), (
            f"{name}: {tensor.dtype} {tuple(tensor.shape)}, announced {place.dtype} {place.shape}"
        )
        self._missing.remove(name)
        if place.num_bytes:
            data = tensor_bytes(tensor.contiguous().cpu())
            with naming(place.file):
                write_at(self._descriptors[place.file], data, place.offset)

    def finish(self) -> None:
        """Flush to disk and rename; replaces a directory that is ours, and no other."""
        assert not self._missing, f"never written: {sorted(self._missing)}"
        self._close()
        ownership.publish(self.aside, self.directory, self.kind)

    def abandon(self) -> None:
        """Remove everything that was written."""
        self._close()
        ownership.abandon(self.aside)

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def buckets(
    weights: Iterable[tuple[str, torch.Tensor]], limit: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield consecutive tensors of at most `limit` bytes in total; a larger one comes alone."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if bucket and size + num_bytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += num_bytes
    if bucket:
        yield bucket


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the type that represents every number of tensors of these types."""
    return functools.reduce(torch.promote_types, dtypes)


def carry_over(source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Copy all files other than weights (`other_files`), and adapt `config.json` to the weights.

    `dtype`: value of `dtype` in `config.json`, to which `transformers` and the engines round
    weights when they load them; quantisation settings are then removed.  None keeps the file
    unchanged.
    """
    for file in other_files(source, skip=target):
        copy = Path(target) / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(source) / file, copy)
    config = Path(target) / "config.json"
    if dtype is not None and config.is_file():
        before = json.loads(config.read_text(encoding="utf-8"))
        if (described := _described(before, str(dtype).removeprefix("torch."))) != before:
            config.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def other_files(source: str | Path, *, skip: str | Path | None = None) -> list[Path]:
    """Return the files of a model other than weights, also in folders, relative to `source`.

    Links are followed: snapshots in Hugging Face's cache consist of them.  Not included: weights in
    any format and their indices, hidden folders, folders of other formats, of checkpoints and of
    runs, and folders that contain `skip`.

    Raises UserError for a broken link, unless its name is one of weights.
    """
    source, files = Path(source), []
    seen = {source.resolve()}
    if skip is not None:
        seen |= {Path(skip).resolve(), *Path(skip).resolve().parents}

    def walk(folder: Path) -> None:
        for path in sorted((source / folder).iterdir()):
            if path.is_dir():
                if path.resolve() not in seen and not _is_of_its_own(path):
                    seen.add(path.resolve())
                    walk(folder / path.name)
            elif _is_weights(path.name):
                continue
            elif not path.exists():
                raise UserError(f"{path} is a link to {os.readlink(path)}, which is missing")
            elif path.is_file():
                files.append(folder / path.name)

    walk(Path())
    return files


def _is_weights(name: str) -> bool:
    """Return whether a file has weights, is an index of weights, or is our marker of a folder."""
    index = ".index." in name and name.endswith(".json")
    return index or name.endswith(OTHER_WEIGHTS) or name in ownership.NOT_CONTENT


def _is_of_its_own(folder: Path) -> bool:
    """Return whether a subfolder is hidden, another format of the model, a checkpoint or a run."""
    other = folder.name in OTHER_FOLDERS or folder.name.endswith(".partial")
    other = other or folder.name.startswith((".", "checkpoint-", "iter_"))
    return other or any((folder / mark).is_file() for mark in OWN_MARKS)


def _described(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a `config.json` for tensors of `dtype`.

    `transformers` 5 reads `dtype` before `torch_dtype`, older tools only the latter.
    """
    config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    for key in [key for key in DTYPE_KEYS if key in config] or DTYPE_KEYS:
        config[key] = dtype
    for name, part in config.items():  # models with several parts
        if (
            name.endswith("_config")
            and isinstance(part, dict)
            and not part.keys().isdisjoint(DTYPE_KEYS)
        ):
            config[name] = _described(part, dtype)
    return config


def _read_header(file: Path) -> dict[str, TensorPlace]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file} is damaged or truncated: its header is not complete")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is damaged: its header is not JSON") from error
    places, end = {}, 0
    try:
        entries = sorted(
            (*entry["data_offsets"], name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        )
        sound = all(_is_entry(*entry) for entry in entries)
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError(f"{file} is damaged: its header is not a table of tensors")
    for begin, stop, name, kind, shape in entries:
        shown = listed([name])
        if kind not in DTYPES:
            quantized = "; the model is quantised" if kind.startswith(("F8", "F4", "F6")) else ""
            raise UserError(f"{file}: {shown} has type {kind!r}, which is not supported{quantized}")
        dtype = DTYPES[kind]
        if begin != end:
            raise UserError(f"{file} is damaged: {shown} starts at {begin}, not at {end}")
        if stop - begin != _num_bytes(dtype, shape):
            raise UserError(f"{file} is damaged: {shown} has {stop - begin} bytes for {shape}")
        places[name] = TensorPlace(file, 8 + length + begin, stop - begin, dtype, shape)
        end = stop
    if 8 + length + end != size:
        raise UserError(
            f"{file} is damaged or truncated: {size} bytes, but its header describes "
            f"{8 + length + end}"
        )
    return places


def _is_entry(begin: Any, stop: Any, name: str, kind: Any, shape: tuple[Any, ...]) -> bool:
    """Return whether a header's entry has the required types."""
    counts = (begin, stop, *shape)
    return type(kind) is str and all(type(n) is int and 0 <= n < 1 << 63 for n in counts)


def _write_header(path: Path, shapes: Shapes) -> dict[str, TensorPlace]:
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
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


def _shards(shapes: Shapes, limit: int) -> list[list[str]]:
    """Return names in order, split into files of at most `limit` bytes or a single tensor."""
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
    return math.prod(shape) * int(dtype.itemsize)
