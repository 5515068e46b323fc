"""What the distributed optimizer puts into a checkpoint: each rank its own part, as it lies there.

It shares out the flattened parameters among data-parallel ranks in ranges.  A range of a flattened
matrix is at most three rectangles (the end of a row, whole rows, the beginning of one), and torch's
distributed checkpoints are made of rectangles: any ranks can read what any others have written.

Megatron-Core (0.16.1) does that with formats of its own.  The one that another layout can read,
`fully_reshardable`, gathers the whole state, 12 bytes for each parameter of a tensor and pipeline
rank, in host memory of every data-parallel rank, while the run waits; to read, each rank reads all
of it again.  What is on disk is the same, tensor by tensor, and either reads the other's.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import MethodType

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_prepo import internals

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Megatron's name for what is on disk."""
PARTS = (
    "_get_main_param_and_optimizer_states",
    "_set_main_param_and_optimizer_states",
    "gbuf_ranges",
)
"""What is used of the distributed optimizer's internals."""


def write_own_parts(optimizer) -> None:
    """Have Megatron's `sharded_state_dict` take ours for what it gathers."""
    for part in distributed_parts(optimizer):
        internals.require(part, *PARTS)
        ours = MethodType(sharded_state, part)
        internals.replace(part, "sharded_param_state_fully_reshardable", ours)


def distributed_parts(optimizer) -> list[DistributedOptimizer]:
    """Of Megatron's chain of optimizers, those that share out their state."""
    return [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]


def sharded_state(
    part: DistributedOptimizer, weights: dict, /, is_loading: bool = False, *_, **__
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """By range of this rank and kind of state: its rectangles in the tensors of the whole model.

    `weights` is the model's sharded state.  To be loaded, they are without data.
    """
    tensors, _ = extract_sharded_tensors_and_factories(weights)
    places = {sharded.data: sharded for sharded in nested_values(tensors)}
    state = {}
    for index, (parameter, start, stop) in enumerate(ranges(part)):
        values = part._get_main_param_and_optimizer_states(parameter)
        values.pop("step", None)  # is in the groups of parameters
        if not isinstance(part.optimizer, HybridDeviceOptimizer) and (
            part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        ):
            values = {name: value.cpu() for name, value in values.items()}  # copies, in float32
        state[index] = {
            name: list(rectangles_of(places[parameter], parameter, start, stop, name, value, part))
            for name, value in values.items()
        }
        if is_loading:
            for name, rectangles in state[index].items():
                state[index][name] = [rectangle.without_data() for rectangle in rectangles]
    return state


@torch.no_grad()
def load_state(part: DistributedOptimizer, state: dict[int, dict[str, list[torch.Tensor]]]) -> None:
    """Give a rank its ranges; `state` is what `sharded_state` has asked for."""
    for index, (parameter, _, _) in enumerate(ranges(part)):
        values = {
            name: torch.cat([rectangle.flatten() for rectangle in rectangles])
            for name, rectangles in state[index].items()
        }
        part._set_main_param_and_optimizer_states(parameter, values)
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        part.optimizer._sync_hdo_state_to_sub_optimizers()


def ranges(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """This rank's parameters, and where its part of each begins and ends."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    yield parameter, places["param"].start, places["param"].end


def rectangles_of(
    place: ShardedTensor | ShardedTensorFactory,
    parameter: torch.nn.Parameter,
    start: int,
    stop: int,
    name: str,
    value: torch.Tensor,
    part: DistributedOptimizer,
) -> Iterator[ShardedTensor]:
    """`value`, the state `name` of elements `start` to `stop` of a parameter, in order.

    A parameter may be several tensors of the model (gate and up projection): parts of its memory,
    one behind the other.
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
                axis_fragmentations=None,  # no regular grid
                prepend_axis_num=0,
                replica_id=(*tensor.replica_id[:2], part.distributed_optimizer_instance_id),
            )
    assert end == parameter.numel(), f"{place.key} is not all of its parameter"


def rectangles(
    start: int, stop: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements `start` to `stop` of a flattened tensor: each piece's offset and shape, in order."""
    if start >= stop:
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # of the whole rows
    if first > last:
        yield from _in_row(last, start, stop, shape)
        return
    yield from _in_row(first - 1, start, first * row, shape)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, last * row, stop, shape)


def position(offset: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Of an element in the flattened tensor."""
    at = 0
    for index, size in zip(offset, shape, strict=True):
        at = at * size + index
    return at


def _in_row(index: int, start: int, stop: int, shape: tuple[int, ...]):
    before = index * math.prod(shape[1:])
    for offset, size in rectangles(start - before, stop - before, shape[1:]):
        yield (index, *offset), (1, *size)
