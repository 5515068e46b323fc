"""Every rank of a layout, on one process without weights: the fake process group, the meta device.

A rank takes milliseconds and no memory whatever the model's size, so questions about layouts of
hundreds of GPUs (what does a rank hold, what will a checkpoint look like) are answered on a laptop,
by Megatron-Core itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_prepo.actor import cpu
from megatron_prepo.actor.model import build_model
from megatron_prepo.config import ModelConfig, ParallelConfig


def each_rank(
    hf: dict, model: ModelConfig, parallel: ParallelConfig, megatron: dict | None = None
) -> Iterator[tuple[int, GPTModel]]:
    """(rank, its part of the model on the meta device) for each rank of one data-parallel replica.

    With expert parallelism, of as many replicas as it takes to spread the experts.
    Raises AssertionError in a process that is part of a job.
    """
    world_size = parallel.tensor * parallel.pipeline * parallel.smallest_data
    for rank in range(world_size):
        with _pretend(rank, world_size, parallel), torch.device("meta"):
            overrides = (megatron or {}) | {"perform_initialization": False}
            yield rank, build_model(hf, model, parallel, overrides)


@contextmanager
def _pretend(rank: int, world_size: int, parallel: ParallelConfig) -> Iterator[None]:
    assert not dist.is_initialized(), "a layout is simulated outside of a job"
    if not torch.cuda.is_available():
        cpu.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
