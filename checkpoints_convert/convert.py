"""Streamed conversion of complete models: one tensor group is in memory at a time.

The structure of a Megatron checkpoint comes from Megatron-Core: each rank of the requested layout
is built on the meta device (`actor.dry_run`), and its sharded state dict names every chunk.  The
mapping table lists the Hugging Face tensors of each chunk.  No other code depends on either format.
Adapters in a Megatron checkpoint (LoRA) are merged into its weights.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_prepo.config import LoraConfig, ParallelConfig
from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import write_text
from megatron_prepo.models.arena import Arena
from megatron_prepo.models.fit import check_fit
from megatron_prepo.models.hf_config import (
    listed,
    read_hf_config,
    transformer_settings,
)
from megatron_prepo.models.hf_files import HFTensors, HFWriter, carry_over, widest
from megatron_prepo.models.mapping import (
    Heads,
    Mapping,
    adapter_mappings,
    check_parts,
    to_hf,
    to_megatron,
)
from megatron_prepo.models.record import (
    HF_FILES,
    architecture_record,
    check_record,
    check_tokenizer,
    stored_adapters,
)
from megatron_prepo.models.torch_dist import Chunk, TorchDistReader, TorchDistWriter
from megatron_prepo.process import progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORKERS = min(4, os.cpu_count() or 1)
ARENA_BYTES = 1 << 30
"""Total memory that the workers keep between tensors."""


@dataclass
class PlannedParameter:
    """One parameter of the complete model and its chunks in a Megatron checkpoint."""

    mapping: Mapping
    leading: int
    """Number of leading dimensions added by stacking: layers, experts."""
    chunks: list[Chunk] = field(default_factory=list)
    adapter: "PlannedAdapter | None" = None
    """Adapter of the weight, in a checkpoint that has some."""

    @property
    def key(self) -> str:
        """Name in the checkpoint."""
        return self.chunks[0].key

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape over all tensor-parallel ranks, including vocabulary padding, without stacking."""
        return self.chunks[0].global_shape[self.leading :]


@dataclass(frozen=True)
class PlannedAdapter:
    """Matrices of a weight's adapter in a Megatron checkpoint."""

    matrices: tuple[PlannedParameter, PlannedParameter]
    """A and B."""
    scale: float


def import_hf(
    hf: str | Path,
    out: str | Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    dtype: str | None = None,
) -> list[str]:
    """Write a Hugging Face model as a Megatron `torch_dist` checkpoint; returns warnings.

    It can be loaded under any layout; the sizes given here only determine how it is split into
    chunks.  `dtype`: float32 or bfloat16; None keeps the type of every tensor.

    Raises UserError for a missing or damaged source, and for an `out` that is not empty.  `out`
    exists only when it is complete.
    """
    out = Path(out).absolute().resolve()
    must_be_empty(out)
    settings = read_hf_config(hf)
    warnings: list[str] = []
    with HFTensors(hf, tied=settings["tie_word_embeddings"]) as tensors, _aside(out) as aside:
        check_fit(tensors, settings)
        plan = plan_checkpoint(settings, tensor=tensor, pipeline=pipeline, expert=expert)
        if dtype is None:
            _check_types(plan, tensors)
        writer = TorchDistWriter(aside / "release")
        heads, arena = hf_attention_heads(settings), Arena(ARENA_BYTES // WORKERS)

        def convert(parameter: PlannedParameter) -> int:
            sources = [tensors.read(name, arena.empty) for name in parameter.mapping.hf_names]
            for name, source in zip(parameter.mapping.hf_names, sources, strict=True):
                if not _is_finite(source):
                    warnings.append(f"{name} has non-finite values")
            if dtype is not None:
                sources = [source.to(DTYPES[dtype]) for source in sources]
            full = _megatron_tensor(parameter, sources, heads, settings)
            for chunk in parameter.chunks:
                region = _region(
                    full, chunk.offset[parameter.leading :], chunk.shape[parameter.leading :]
                )
                writer.write(chunk, region)
            return sum(source.nbytes for source in sources)

        sizes = [sum(tensors.places[n].num_bytes for n in p.mapping.hf_names) for p in plan]
        try:
            _in_parallel("import", convert, plan, sizes, arena)
        finally:
            writer.close()
        writer.finish(architecture_record(settings))
        kept = {tensors.places[name].dtype for p in plan for name in p.mapping.hf_names}
        (aside / HF_FILES).mkdir()
        carry_over(hf, aside / HF_FILES, dtype=DTYPES[dtype] if dtype else widest(kept))
        write_text(aside / "latest_checkpointed_iteration.txt", "release")
    return warnings


def export_hf(
    megatron: str | Path,
    out: str | Path,
    *,
    hf: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 << 30,
) -> None:
    """Write a Megatron checkpoint as a Hugging Face model.

    `megatron`: a checkpoint, or a directory whose newest checkpoint is exported.
    `hf`: a directory with the model's configuration and tokenizer files, whose weights are not
    read; None uses the files stored with the checkpoint.  Raises UserError if it describes a model
    other than the checkpoint's record.
    """
    from megatron_prepo.actor.checkpoint import newest

    out = Path(out).absolute().resolve()
    must_be_empty(out)
    checkpoint, hf = newest(megatron), find_hf_files(megatron, hf)
    settings = read_hf_config(hf, quantized=True)
    check_record(checkpoint, settings, hf)
    check_tokenizer(checkpoint, hf)
    reader = TorchDistReader(checkpoint)
    plan, shapes = plan_export(settings, reader, DTYPES.get(dtype or ""))
    writer = HFWriter(out, shapes, like=hf, shard_bytes=shard_bytes)
    heads, arena = hf_attention_heads(settings), Arena(ARENA_BYTES // WORKERS)

    def convert(parameter: PlannedParameter) -> int:
        done = 0
        for name, tensor in hf_tensors(parameter, reader, heads, settings, arena.empty):
            writer.write(name, tensor.to(shapes[name][0]))
            done += tensor.nbytes
        return done

    sizes = [
        sum(writer.places[name].num_bytes for name in parameter.mapping.hf_names)
        for parameter in plan
    ]
    try:
        _in_parallel("export", convert, plan, sizes, arena)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def refuse_layout(layout: ParallelConfig, settings: dict[str, Any]) -> None:
    """Raise UserError if a layout does not fit the model."""
    mcore = transformer_settings(settings)
    experts = mcore.get("num_moe_experts") or 1
    width = mcore.get("moe_ffn_hidden_size", layout.expert_tensor)
    for name, what, count, size in (
        ("tensor", "attention heads", mcore["num_attention_heads"], layout.tensor),
        ("tensor", "feed-forward size", mcore["ffn_hidden_size"], layout.tensor),
        ("tensor", "width of an expert", width, layout.expert_tensor),
        ("expert", "experts", experts, layout.expert),
    ):
        if count % size:
            raise UserError(
                f"{name} parallelism of {size} does not divide the model's {what}, {count}"
            )
    groups = mcore["num_query_groups"]
    if groups % layout.tensor and layout.tensor % groups:
        raise UserError(
            f"tensor parallelism of {layout.tensor} neither divides nor is a multiple of the "
            f"model's {groups} key-value heads"
        )
    if layout.pipeline > mcore["num_layers"]:
        raise UserError(
            f"pipeline parallelism of {layout.pipeline} is more than the model's "
            f"{mcore['num_layers']} layers"
        )


def uneven_stages(layers: int, pipeline: int) -> dict[str, int]:
    """Return Megatron's setting for stages of unequal size; empty if the layers divide evenly.

    The last stage has the remaining layers, at least one.

    >>> uneven_stages(5, 2), uneven_stages(5, 4), uneven_stages(6, 3)
    ({'num_layers_in_last_pipeline_stage': 2}, {'num_layers_in_last_pipeline_stage': 2}, {})
    """
    if layers % pipeline == 0:
        return {}
    others = -(-layers // pipeline) * (pipeline - 1)
    if others >= layers:
        others = layers // pipeline * (pipeline - 1)
    return {"num_layers_in_last_pipeline_stage": layers - others}


def plan_checkpoint(
    settings: dict[str, Any],
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    lora: LoraConfig | None = None,
) -> list[PlannedParameter]:
    """Return every parameter of the model with its chunks in a checkpoint of this layout.

    With `lora`, adapters are part of the parameters that they belong to.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

    from megatron_prepo.actor.dry_run import each_rank
    from megatron_prepo.config import ModelConfig
    from megatron_prepo.models.hf_to_megatron import stage_parameters
    from megatron_prepo.models.lora import adapter_parameters

    if min(tensor, pipeline, expert) < 1:
        sizes = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
        raise UserError(f"the sizes of a layout must be at least 1, not {sizes}")
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert)
    refuse_layout(layout, settings)
    model_config = ModelConfig(hf="", dtype="bfloat16")
    plan: dict[tuple[str, ...], PlannedParameter] = {}
    uneven = uneven_stages(transformer_settings(settings)["num_layers"], pipeline)
    for _, (model,) in each_rank(settings, model_config, layout, uneven, lora):
        entries = model.sharded_state_dict()
        for name, mapping, _ in (*stage_parameters([model]), *adapter_parameters([model])):
            entry = entries[name]
            parts = [entry] if isinstance(entry, ShardedTensor) else entry.build()
            for part in parts:
                if not is_main_replica(part.replica_id):
                    continue
                leading = part.prepend_axis_num
                shape = (1,) * leading + tuple(part.local_shape)
                chunk = Chunk(part.key, tuple(part.global_shape), tuple(part.global_offset), shape)
                planned = plan.setdefault(mapping.hf_names, PlannedParameter(mapping, leading))
                if chunk not in planned.chunks:
                    planned.chunks.append(chunk)
    if lora:
        _join_adapters(plan, lora)
    return list(plan.values())


def _join_adapters(plan: dict[tuple[str, ...], PlannedParameter], lora: LoraConfig) -> None:
    """Move the matrices of adapters from the plan to the parameters that they belong to."""
    for parameter in list(plan.values()):
        a, b = adapter_mappings(parameter.mapping, lora.target_modules)
        if a.hf_names in plan:
            matrices = plan.pop(a.hf_names), plan.pop(b.hf_names)
            parameter.adapter = PlannedAdapter(matrices, lora.scale)


def plan_export(
    settings: dict[str, Any], reader: TorchDistReader, dtype: torch.dtype | None
) -> tuple[list[PlannedParameter], dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Return the model's parameters, and type and shape of each Hugging Face tensor.

    Raises UserError if the checkpoint lacks a parameter or has one that the model does not have.
    """
    plan = plan_checkpoint(settings, lora=stored_adapters(reader))
    matrices = [matrix for p in plan if p.adapter for matrix in p.adapter.matrices]
    keys = {parameter.key for parameter in (*plan, *matrices)}
    known = reader.weights()
    if keys != known:
        raise UserError(
            f"{reader.directory} does not fit the model of config.json: missing "
            f"{listed(sorted(keys - known)) or 'nothing'}, unexpected "
            f"{listed(sorted(known - keys)) or 'nothing'}"
        )
    heads, shapes = hf_attention_heads(settings), {}
    for parameter in plan:
        stored = reader.shape(parameter.key)
        padded = parameter.mapping.kind == "vocab"
        expected = parameter.chunks[0].global_shape
        fits = stored[1:] == expected[1:] and stored[0] >= settings["vocab_size"]
        if stored != expected and not (padded and fits):
            raise UserError(
                f"{reader.directory}: {parameter.key} has shape {stored}, "
                f"the model of config.json {expected}"
            )
        kind = dtype or reader.dtype(parameter.key)
        full = torch.empty(parameter.full_shape, dtype=kind, device="meta")
        tensors = to_hf(parameter.mapping, full, heads, settings["vocab_size"])
        for name, tensor in zip(parameter.mapping.hf_names, tensors, strict=True):
            shapes[name] = (kind, tuple(tensor.shape))
    return plan, shapes


def hf_tensors(
    parameter: PlannedParameter,
    reader: TorchDistReader,
    heads: Heads,
    settings: dict[str, Any],
    empty: Callable[..., torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the Hugging Face tensors in a parameter, with its adapter merged.

    `empty(shape, dtype)` allocates the memory to read into.
    """
    tensors = _stored_tensors(parameter, reader, heads, settings, empty)
    if parameter.adapter is None:
        yield from tensors
        return
    matrices: dict[str, torch.Tensor] = {}
    for matrix in parameter.adapter.matrices:
        matrices |= _stored_tensors(matrix, reader, heads, settings, empty)
    for name, tensor in tensors:
        stem = name.removesuffix("weight")
        if (a := matrices.get(f"{stem}lora_A.weight")) is not None:
            b = matrices[f"{stem}lora_B.weight"]
            product = parameter.adapter.scale * (b.float() @ a.float())
            tensor = (tensor.float() + product).to(tensor.dtype)
        yield name, tensor


def _stored_tensors(
    parameter: PlannedParameter,
    reader: TorchDistReader,
    heads: Heads,
    settings: dict[str, Any],
    empty: Callable[..., torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the Hugging Face tensors in a parameter of a checkpoint."""
    shape = parameter.full_shape
    if parameter.mapping.kind == "vocab":
        shape = (settings["vocab_size"], *shape[1:])
    first = parameter.chunks[0].offset[: parameter.leading]
    offset, extent = (*first, *(0 for _ in shape)), (*(1 for _ in first), *shape)
    full = reader.read(parameter.key, offset, extent, empty).reshape(shape)
    tensors = to_hf(parameter.mapping, full, heads, settings["vocab_size"])
    yield from zip(parameter.mapping.hf_names, tensors, strict=True)


def hf_attention_heads(settings: dict[str, Any]) -> Heads:
    """Return the attention geometry of a Hugging Face configuration."""
    mcore = transformer_settings(settings)
    return Heads(
        num_groups=mcore["num_query_groups"],
        head_dim=mcore["kv_channels"],
        queries_per_group=mcore["num_attention_heads"] // mcore["num_query_groups"],
    )


def find_hf_files(megatron: str | Path, hf: str | Path | None) -> Path:
    """Return the directory with the model's configuration and tokenizer files."""
    candidates = [Path(hf)] if hf else [Path(megatron) / HF_FILES, Path(megatron).parent / HF_FILES]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(
        f"no config.json in {' or '.join(map(str, candidates))}; set --hf to the Hugging Face "
        "directory of the original model"
    )


def must_be_empty(out: Path) -> None:
    """Raise UserError unless `out` is absent or an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty directory; choose another")


def _megatron_tensor(
    parameter: PlannedParameter, sources: list[torch.Tensor], heads: Heads, settings: dict[str, Any]
) -> list[torch.Tensor]:
    """Return Megatron's full tensor as blocks of rows, with zero rows for vocabulary padding.

    The blocks are not joined, since concatenating gate and up, most of a model, would only copy
    them.
    """
    mapping, shape = parameter.mapping, parameter.full_shape
    try:
        check_parts(mapping, [source.shape for source in sources], heads)
        blocks = sources if mapping.kind == "gated" else [to_megatron(mapping, sources, heads)]
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{', '.join(mapping.hf_names)} do not fit config.json: {error}") from error
    rows = sum(len(block) for block in blocks)
    if mapping.kind == "vocab" and rows != settings["vocab_size"]:
        raise UserError(
            f"{mapping.hf_names[0]} has {rows} rows, but config.json has vocab_size="
            f"{settings['vocab_size']}"
        )
    if mapping.kind == "vocab" and rows == settings["vocab_size"] < shape[0]:
        blocks.append(blocks[0].new_zeros(shape[0] - rows, *shape[1:]))
    found = (sum(len(block) for block in blocks), *blocks[0].shape[1:])
    if found != shape or len({block.shape[1:] for block in blocks}) > 1:
        raise UserError(
            f"{', '.join(mapping.hf_names)}: joined shape {found}, but by config.json the Megatron "
            f"parameter has {shape}"
        )
    return blocks


def _check_types(plan: Sequence[PlannedParameter], tensors: HFTensors) -> None:
    """Raise UserError for different types in one Megatron tensor (stacked layers, joined parts)."""
    first: dict[str, str] = {}
    for parameter in plan:
        for name in parameter.mapping.hf_names:
            other = first.setdefault(parameter.key, name)
            types = [tensors.places[n].dtype for n in (other, name)]
            if types[0] != types[1]:
                raise UserError(
                    f"{other} is {types[0]} and {name} is {types[1]}, but Megatron stores them in "
                    "one tensor; choose a type by --dtype"
                )


def _region(
    blocks: list[torch.Tensor], offset: Sequence[int], shape: Sequence[int]
) -> torch.Tensor:
    """Return the region of `shape` at `offset` in the vertically stacked blocks."""
    pieces, first = [], 0
    for block in blocks:
        low, high = max(offset[0], first), min(offset[0] + shape[0], first + len(block))
        if low < high:
            rest = (slice(a, a + n) for a, n in zip(offset[1:], shape[1:], strict=True))
            region = (slice(low - first, high - first), *rest)
            pieces.append(block[region])
        first += len(block)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # both are NaN if any value is
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _in_parallel(
    label: str,
    convert: Callable[[PlannedParameter], int],
    plan: Sequence[PlannedParameter],
    sizes: Sequence[int],
    arena: Arena,
) -> None:
    """Convert all parameters in threads, with a progress bar in bytes; the first error stops it.

    The bytes in flight, and so the memory, are limited to the largest group (and 256 MB).
    """
    budget = _ByteBudget(max([256 << 20, *sizes]))

    def one(parameter: PlannedParameter, size: int) -> int:
        with budget.use(size), arena.task():
            return convert(parameter)

    bar = progress.bar(total=sum(sizes), desc=label, unit="B", unit_scale=True)
    with bar, ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(one, p, size) for p, size in zip(plan, sizes, strict=True)]
        try:
            for future in as_completed(futures):
                bar.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _ByteBudget:
    """Limit on the number of bytes in use at a time, which always admits at least one use."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._change = threading.Condition()

    @contextmanager
    def use(self, size: int) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: not self._used or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._change:
                self._used -= size
                self._change.notify_all()


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `out` on success, and removed otherwise."""
    aside = ownership.begin(out)
    try:
        yield aside
        ownership.publish(aside, out, kind=None)
    except BaseException:
        ownership.abandon(aside)
        raise
