"""Checkpoint state of the distributed optimizer: each rank writes its part without gathering.

The distributed optimizer shards the flattened parameters over data-parallel ranks in ranges.  A
range of a flattened matrix is at most three rectangles (the end of a row, full rows, the start of a
row), and torch's distributed checkpoints consist of rectangles: they can be read under any layout.

Megatron-Core (0.16.1) has other ways to do this.  The only format that another layout can read,
`fully_reshardable`, gathers the complete state, 12 bytes per parameter of a tensor and pipeline
rank, in host memory of every data-parallel rank, while the run waits; for loading, each rank reads
all of it again.  The files on disk are the same, tensor by tensor, and either implementation reads
those of the other.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_prepo import internals

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Megatron's name of the format on disk."""
PARTS = (
    "_get_main_param_and_optimizer_states",
    "_set_main_param_and_optimizer_states",
    "gbuf_ranges",
)
"""Internals of the distributed optimizer that are used here."""


def write_own_parts(optimizer: MegatronOptimizer) -> None:
    """Make Megatron's `sharded_state_dict` use `sharded_state` instead of gathering."""
    for part in distributed_parts(optimizer):
        internals.require(part, *PARTS)
        ours = MethodType(sharded_state, part)
        internals.replace(part, "sharded_param_state_fully_reshardable", ours)


def distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Return the optimizers in Megatron's chain that shard their state."""
    return [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]


def sharded_state(
    part: DistributedOptimizer,
    weights: dict[str, Any],
    /,
    is_loading: bool = False,
    *_: Any,
    **__: Any,
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """Return the rectangles of this rank's ranges in the model's tensors, by range and state name.

    `weights` is the model's sharded state.  With `is_loading`, the rectangles have no data.
    """
    tensors, _ = extract_sharded_tensors_and_factories(weights)
    places = {sharded.data: sharded for sharded in nested_values(tensors)}
    state = {}
    for index, (parameter, start, stop) in enumerate(ranges(part)):
        values = part._get_main_param_and_optimizer_states(parameter)
        values.pop("step", None)  # saved in the parameter groups
        if not isinstance(part.optimizer, HybridDeviceOptimizer) and (
            part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        ):
            values = {name: value.cpu() for name, value in values.items()}  # copies, in float32
        state[index] = {
            name: list(
                split_into_rectangles(places[parameter], parameter, start, stop, name, value, part)
            )
            for name, value in values.items()
        }
        if is_loading:
            for name, rectangles in state[index].items():
                state[index][name] = [rectangle.without_data() for rectangle in rectangles]
    return state


@torch.no_grad()
def load_state(part: DistributedOptimizer, state: dict[int, dict[str, list[torch.Tensor]]]) -> None:
    """Load a rank's ranges from `state`, which has the structure of `sharded_state`."""
    for index, (parameter, _, _) in enumerate(ranges(part)):
        values = {
            name: torch.cat([rectangle.flatten() for rectangle in rectangles])
            for name, rectangles in state[index].items()
        }
        part._set_main_param_and_optimizer_states(parameter, values)
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        part.optimizer._sync_hdo_state_to_sub_optimizers()


def ranges(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Yield this rank's parameters with start and end of its range of each."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    yield parameter, places["param"].start, places["param"].end


def split_into_rectangles(
    place: ShardedTensor | ShardedTensorFactory,
    parameter: torch.nn.Parameter,
    start: int,
    stop: int,
    name: str,
    value: torch.Tensor,
    part: DistributedOptimizer,
) -> Iterator[ShardedTensor]:
    """Yield the rectangles of `value`, the state `name` of elements `start` to `stop`, in order.

    A parameter may consist of several tensors of the model (gate and up projection) that are
    consecutive in its memory.
    """
    tensors = place.build() if isinstance(place, ShardedTensorFactory) else place
    tensors = [tensors] if isinstance(tensors, ShardedTensor) else list(nested_values(tensors))
    end = 0
    for tensor in tensors:
        data = tensor.data
        assert data.is_contiguous() and data.data_ptr() == parameter.data_ptr() + end * (
            data.element_size()
        ), f"{tensor.key} is not the next part of its parameter's memory"
        begin, end = end, end + data.numel()
        for offset, shape in rectangles(
            max(start, begin) - begin, min(stop, end) - begin, data.shape
        ):
            size = math.prod(shape)
            at = begin + position(offset, data.shape) - start
            prepended = tensor.prepend_axis_num
            yield replace(
                tensor,
                key=f"optimizer.state.{name}.{tensor.key}",
                data=value.detach().flatten()[at : at + size].view((1,) * prepended + shape),
                dtype=value.dtype,
                local_shape=(1,) * prepended + shape,
                global_offset=tuple(
                    whole + own
                    for whole, own in zip(
                        tensor.global_offset, (0,) * prepended + offset, strict=True
                    )
                ),
                axis_fragmentations=None,  # not a regular grid
                prepend_axis_num=0,
                replica_id=(*tensor.replica_id[:2], part.distributed_optimizer_instance_id),
            )
    assert end == parameter.numel(), f"{place.key} does not cover its parameter"


def rectangles(
    start: int, stop: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offset and shape of each piece of elements `start` to `stop` of a flattened tensor."""
    if start >= stop:
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # range of full rows
    if first > last:
        yield from _in_row(last, start, stop, shape)
        return
    yield from _in_row(first - 1, start, first * row, shape)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, last * row, stop, shape)


def position(offset: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Return the index of an element in the flattened tensor."""
    at = 0
    for index, size in zip(offset, shape, strict=True):
        at = at * size + index
    return at


def _in_row(
    index: int, start: int, stop: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    before = index * math.prod(shape[1:])
    for offset, size in rectangles(start - before, stop - before, shape[1:]):
        yield (index, *offset), (1, *size)
