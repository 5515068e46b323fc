"""Every rank of a layout, on one process without weights: the fake process group, the meta device.

A rank takes milliseconds and no memory whatever the model's size, so questions about layouts of
hundreds of GPUs (what does a rank hold, what will a checkpoint look like) are answered on a laptop,
by Megatron-Core itself.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_prepo.actor import cpu_shim as cpu
from megatron_prepo.actor.model import build_model
from megatron_prepo.config import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class Buffer:
    """One of the buffers in which Megatron-Core keeps parameters and gradients together."""

    numel: int
    """Parameters in it."""
    padded: int
    """Its length with the distributed optimizer, which aligns parameters and cuts it evenly."""
    ranks: int
    """Data-parallel ranks that the distributed optimizer cuts it over; for experts, fewer."""
    gradient_bytes: int
    """Of one gradient."""
    experts: bool
    """Whether it holds experts that are spread over ranks."""


@dataclass(frozen=True)
class Stage:
    """What each rank of a pipeline stage holds; its tensor- and data-parallel ranks are alike."""

    stage: int
    layers: int
    buffers: tuple[Buffer, ...]
    tensors: dict[str, tuple[int, ...]]
    """Shape of every whole tensor that a part of is here, as Megatron's checkpoint names it."""

    @property
    def parameters(self) -> int:
        """Parameters of a rank."""
        return sum(buffer.numel for buffer in self.buffers)


def each_stage(
    hf: dict,
    model: ModelConfig,
    parallel: ParallelConfig,
    ddp: DistributedDataParallelConfig,
    megatron: dict | None = None,
    *,
    world_size: int,
) -> Iterator[Stage]:
    """Every stage of a job of `world_size` ranks: Megatron's model and data-parallel buffers.

    One rank a stage is built, the first; the others of a stage hold parts of the same shape.
    Raises AssertionError in a process that is part of a job.
    """
    # TransformerEngine's layers want a GPU to be built; their parameters are the same
    model = dataclasses.replace(model, layers="torch")
    ddp = dataclasses.replace(ddp, use_distributed_optimizer=True)
    overrides = (megatron or {}) | {"perform_initialization": False}
    for stage in range(parallel.pipeline):
        rank = stage * (world_size // parallel.pipeline)
        with pretend(rank, world_size, parallel), torch.device("meta"), _buffers_on_meta():
            assert parallel_state.get_pipeline_model_parallel_rank() == stage
            chunks = build_model(hf, model, parallel, overrides)
            wrapped = [DistributedDataParallel(c.config, ddp, c) for c in chunks]
            buffers = [_buffer(b, experts=False) for w in wrapped for b in w.buffers]
            buffers += [
                _buffer(b, experts=True) for w in wrapped for b in w.expert_parallel_buffers
            ]
            yield Stage(
                stage,
                sum(chunk.decoder.num_layers_per_pipeline_rank for chunk in chunks),
                tuple(buffers),
                {name: s for chunk in chunks for name, s in _whole_tensors(chunk).items()},
            )


def count_parameters(hf: dict, stages: list[Stage]) -> int:
    """Parameters of the whole model, without vocabulary padding, tied embeddings once."""
    tensors = {name: shape for stage in stages for name, shape in stage.tensors.items()}
    total = sum(math.prod(shape) for shape in tensors.values())
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in tensors:
            rows, columns = tensors[name]
            total -= (rows - hf["vocab_size"]) * columns
    return total


def _buffer(buffer, *, experts: bool) -> Buffer:
    return Buffer(
        numel=sum(parameter.numel() for parameter in buffer.params),
        padded=buffer.numel,
        ranks=buffer.data_parallel_group.size(),
        gradient_bytes=buffer.grad_dtype.itemsize,
        experts=experts,
    )


def _whole_tensors(model: GPTModel) -> dict[str, tuple[int, ...]]:
    entries = model.sharded_state_dict()
    tensors = {}
    for name in dict(model.named_parameters()):
        entry = entries[name]
        parts = [entry] if isinstance(entry, ShardedTensor) else entry.build()
        tensors |= {part.key: tuple(part.global_shape) for part in parts}
    return tensors


def _buffers_on_meta():
    """Megatron asks CUDA where its buffers go, whatever the device of the parameters is."""
    return mock.patch.object(torch.cuda, "current_device", lambda: torch.device("meta"))


def each_rank(
    hf: dict, model: ModelConfig, parallel: ParallelConfig, megatron: dict | None = None
) -> Iterator[tuple[int, list[GPTModel]]]:
    """(rank, its part of the model on the meta device) for each rank of one data-parallel replica.

    With expert parallelism, of as many replicas as it takes to spread the experts.
    Raises AssertionError in a process that is part of a job.
    """
    world_size = parallel.replica * parallel.smallest_data
    for rank in range(world_size):
        with pretend(rank, world_size, parallel), torch.device("meta"):
            overrides = (megatron or {}) | {"perform_initialization": False}
            yield rank, build_model(hf, model, parallel, overrides)


@contextmanager
def pretend(rank: int, world_size: int, parallel: ParallelConfig) -> Iterator[None]:
    """This process as one rank of a job; collectives do nothing, and leave what they receive."""
    assert not dist.is_initialized(), "a layout is simulated outside of a job"
    if not torch.cuda.is_available():
        cpu.install()
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
