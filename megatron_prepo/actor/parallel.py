"""Process groups: Megatron's own, plus one gloo group for control messages.

Ranks and sizes come from `parallel_state`; there is no second topology object.  Control messages
(rollout records, rewards, flags) use gloo with the timeout `parallel.timeout_minutes`, so that they
neither occupy the GPU nor trigger NCCL's watchdog.
"""

import concurrent.futures
import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_prepo.actor import cpu_shim
from megatron_prepo.config import ParallelConfig
from megatron_prepo.errors import Stopped, UserError
from megatron_prepo.process.local_ranks import MEETING_FILE

T = TypeVar("T")
ADDRESSING = ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables for the rendezvous of ranks."""
NO_CUDNN_ATTENTION = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
"""Environment variable that torch reads at its first attention.  On Hopper torch prefers cuDNN,
which plans a kernel for every new length: slower than the attention to sequences one by one."""
_control: list[dist.ProcessGroup] = []


def initialize(config: ParallelConfig, seed: int) -> None:
    """Join the job that the environment describes (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, ...).

    Without these variables, the job is a single process.  Raises UserError if the number of ranks
    does not fit the layout, and Stopped if the rendezvous fails.
    """
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    check_world_size(config, world_size)
    _use_device()
    timeout = timedelta(minutes=config.timeout_minutes)
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if torch.cuda.is_available() else "gloo",
                store=_meeting_place(world_size),
                rank=rank,
                world_size=world_size,
                timeout=timeout,
            )
        except (RuntimeError, ValueError) as error:  # invalid address, or no peers
            where = {name: os.environ[name] for name in ADDRESSING if name in os.environ}
            reason = " ".join(str(error).split())[:400]
            raise Stopped(
                f"error: rendezvous of the {world_size} ranks failed: {reason}; the environment "
                f"has {where}",
                exit_code=1,
            ) from error
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        context_parallel_size=config.context,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_size,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        distributed_timeout_minutes=max(1, round(config.timeout_minutes)),
        create_gloo_process_groups=True,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    _control[:] = [dist.new_group(backend="gloo", timeout=timeout)]


def _use_device() -> None:
    """Use this rank's GPU, or a CPU with stand-ins for CUDA's functions."""
    if not torch.cuda.is_available():
        cpu_shim.install()
        return
    torch.cuda.set_device(_number("LOCAL_RANK", 0))
    os.environ.setdefault(NO_CUDNN_ATTENTION, "1")


def _number(name: str, default: int) -> int:
    """Return a number from the environment, as set by torchrun."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment must be an integer; unset it")
    return int(text)


def _meeting_place(world_size: int) -> dist.Store | None:
    """Return the rendezvous store: in memory for one rank, a file if our launcher set one.

    The result is None for other launchers, whose ranks use MASTER_ADDR and MASTER_PORT.
    """
    if world_size == 1:
        return dist.HashStore()
    file = os.environ.get(MEETING_FILE)
    return dist.FileStore(file, world_size) if file else None


def check_world_size(config: ParallelConfig, world_size: int) -> None:
    """Raise UserError unless the layout, tensor x pipeline x context (x data, if given), fits."""
    fits = world_size % (config.replica * config.smallest_data) == 0
    if not fits or (config.data and config.num_ranks != world_size):
        context = f"parallel.context={config.context} x " if config.context > 1 else ""
        raise UserError(
            f"{world_size} ranks do not fit parallel.tensor={config.tensor} x "
            f"parallel.pipeline={config.pipeline} x {context}parallel.data={config.data or 'any'}, "
            f"with parallel.expert={config.expert}; start {config.num_ranks} ranks or change the "
            "layout"
        )


def shut_down() -> None:
    """Leave the job and forget the groups."""
    _control.clear()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def control_group() -> dist.ProcessGroup:
    """Return the gloo group of all ranks."""
    assert _control, "parallel.initialize must be called first"
    return _control[0]


def from_rank_zero(value: T) -> T:
    """Return rank 0's argument, any picklable value, on every rank."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=control_group())
    received: T = box[0]
    return received


SIGN_OF_LIFE_SECONDS = 5.0


def from_rank_zero_when_done(future: concurrent.futures.Future[Any] | None) -> Any:
    """Return the result of rank 0's future on every rank; other ranks pass None.

    The future may take any time: rank 0 sends a sign of life every few seconds, so that the timeout
    of the control group detects a dead rank 0 but does not limit its work.  An exception of the
    future is raised on every rank.
    """
    while True:
        state: tuple[Any, BaseException | None] | None = None
        if future is not None:
            concurrent.futures.wait([future], timeout=SIGN_OF_LIFE_SECONDS)
            if future.done():
                error = future.exception()
                state = (None, error) if error else (future.result(), None)
        state = from_rank_zero(state)
        if state is None:
            continue
        value, error = state
        if error is not None:
            raise error
        return value


def gather_to_all(value: T) -> list[T]:
    """Return the values of all ranks, in the order of ranks, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def assert_equal_on_all_ranks(name: str, value: Any) -> None:
    """Assert that a decision that each rank computes is the same on all ranks."""
    values = gather_to_all(value)
    odd = [rank for rank, other in enumerate(values) if other != values[0]]
    assert not odd, f"{name} differs from rank 0's on ranks {odd}"


def device() -> torch.device:
    """Return the device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
