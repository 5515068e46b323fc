"""Simulation of every rank of a layout in one process: fake process group, meta device, no weights.

A rank takes milliseconds and no memory whatever the size of the model.  So the memory per rank and
the content of a checkpoint for layouts of hundreds of GPUs are computed on a laptop, by
Megatron-Core itself.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_prepo.actor import cpu_shim
from megatron_prepo.actor.model import build_model
from megatron_prepo.config import LoraConfig, ModelConfig, ParallelConfig
from megatron_prepo.models.mapping import is_adapter


@dataclass(frozen=True)
class Buffer:
    """One of Megatron-Core's contiguous buffers of parameters and gradients."""

    numel: int
    """Number of parameters."""
    padded: int
    """Length with the distributed optimizer, which aligns parameters and shards it evenly."""
    ranks: int
    """Data-parallel ranks over which the distributed optimizer shards it; fewer for experts."""
    gradient_bytes: int
    """Bytes per gradient element."""
    experts: bool
    """Whether it holds experts that are distributed over ranks."""


@dataclass(frozen=True)
class Stage:
    """Contents of each rank of a pipeline stage, equal for its tensor- and data-parallel ranks."""

    stage: int
    layers: int
    buffers: tuple[Buffer, ...]
    """Buffers of the trained parameters."""
    frozen: int
    """Number of parameters per rank that are not trained."""
    tensors: dict[str, tuple[int, ...]]
    """Global shape of every tensor of which this stage has a part, by its checkpoint name."""

    @property
    def parameters(self) -> int:
        """Number of parameters per rank."""
        return self.frozen + self.trained

    @property
    def trained(self) -> int:
        """Number of trained parameters per rank."""
        return sum(buffer.numel for buffer in self.buffers)


def each_stage(
    hf: dict[str, Any],
    model: ModelConfig,
    parallel: ParallelConfig,
    ddp: DistributedDataParallelConfig,
    megatron: dict[str, Any] | None = None,
    *,
    world_size: int,
    lora: LoraConfig | None = None,
) -> Iterator[Stage]:
    """Yield every stage of a job of `world_size` ranks: Megatron's model and data-parallel buffers.

    One rank per stage is built, the first; the other ranks of a stage hold parts of the same shape.
    Raises AssertionError in a process that is part of a job.
    """
    # TransformerEngine's layers need a GPU to be built; their parameters are the same
    model = dataclasses.replace(model, layers="torch")
    ddp = dataclasses.replace(ddp, use_distributed_optimizer=True)
    overrides = (megatron or {}) | {"perform_initialization": False}
    for stage in range(parallel.pipeline):
        rank = stage * (world_size // parallel.pipeline)
        with pretend(rank, world_size, parallel), torch.device("meta"), _buffers_on_meta():
            assert parallel_state.get_pipeline_model_parallel_rank() == stage
            chunks = build_model(hf, model, parallel, overrides, lora)
            wrapped = [DistributedDataParallel(c.config, ddp, c) for c in chunks]
            buffers = [_buffer(b, experts=False) for w in wrapped for b in w.buffers]
            buffers += [
                _buffer(b, experts=True) for w in wrapped for b in w.expert_parallel_buffers
            ]
            yield Stage(
                stage,
                sum(chunk.decoder.num_layers_per_pipeline_rank for chunk in chunks),
                tuple(buffers),
                sum(p.numel() for c in chunks for p in c.parameters() if not p.requires_grad),
                {name: s for chunk in chunks for name, s in _whole_tensors(chunk).items()},
            )


def count_parameters(hf: dict[str, Any], stages: list[Stage]) -> int:
    """Return the parameters of the complete model, without vocabulary padding, tied ones once.

    Adapters are not counted: they are merged into the model.
    """
    tensors = {
        name: shape
        for stage in stages
        for name, shape in stage.tensors.items()
        if not is_adapter(name)
    }
    total = sum(math.prod(shape) for shape in tensors.values())
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in tensors:
            rows, columns = tensors[name]
            total -= (rows - hf["vocab_size"]) * columns
    return total


def _buffer(buffer: Any, *, experts: bool) -> Buffer:
    return Buffer(
        numel=sum(parameter.numel() for parameter in buffer.params),
        padded=buffer.numel,
        ranks=buffer.data_parallel_group.size(),
        gradient_bytes=buffer.grad_dtype.itemsize,
        experts=experts,
    )


def _whole_tensors(model: GPTModel) -> dict[str, tuple[int, ...]]:
    entries = model.sharded_state_dict()
    tensors: dict[str, tuple[int, ...]] = {}
    for name in dict(model.named_parameters()):
        entry = entries[name]
        parts = [entry] if isinstance(entry, ShardedTensor) else entry.build()
        tensors |= {part.key: tuple(part.global_shape) for part in parts}
    return tensors


def _buffers_on_meta() -> AbstractContextManager[Any]:
    """Put Megatron's buffers on the meta device.

    Megatron allocates them on the current CUDA device, whatever the device of the parameters.
    """
    return mock.patch.object(torch.cuda, "current_device", lambda: torch.device("meta"))


def each_rank(
    hf: dict[str, Any],
    model: ModelConfig,
    parallel: ParallelConfig,
    megatron: dict[str, Any] | None = None,
    lora: LoraConfig | None = None,
) -> Iterator[tuple[int, list[GPTModel]]]:
    """Yield (rank, its part of the model on the meta device) per rank of a data-parallel replica.

    With expert parallelism, the ranks are those of as many replicas as are needed to distribute the
    experts.  Raises AssertionError in a process that is part of a job.
    """
    world_size = parallel.replica * parallel.smallest_data
    for rank in range(world_size):
        with pretend(rank, world_size, parallel), torch.device("meta"):
            overrides = (megatron or {}) | {"perform_initialization": False}
            yield rank, build_model(hf, model, parallel, overrides, lora)


@contextmanager
def pretend(rank: int, world_size: int, parallel: ParallelConfig) -> Iterator[None]:
    """Simulate one rank of a job; collectives do nothing and leave their outputs unchanged."""
    assert not dist.is_initialized(), "a layout must be simulated outside a job"
    if not torch.cuda.is_available():
        cpu_shim.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            context_parallel_size=parallel.context,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_size,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
