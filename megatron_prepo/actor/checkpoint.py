"""Megatron `torch_dist` checkpoints: written under any layout, read under any other.

The layout on disk is Megatron-LM's: `iter_0000042/` with the shards, and beside it
`latest_checkpointed_iteration.txt`; an imported model is in `release/`.  A checkpoint gets its name
only once it is whole (`saving.py`), and its manifest (`manifest.py`) says what whole means.

Beside the shards there may be

| file | what |
|---|---|
| `run.json` | what the training loop needs to go on (`resume.py`) |
| `random_N.safetensors` | the random states of rank N |
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prepo.actor import optimizer_shards
from megatron_prepo.actor.async_save import HostBuffers, PendingCheckpoint
from megatron_prepo.actor.cpu_offload import HostAdam, fill_adam_state
from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import rename_tree, write_text
from megatron_prepo.models.record import architecture_record, check_record
from megatron_prepo.models.torch_dist import TorchDistReader

TRACKER = "latest_checkpointed_iteration.txt"
RUN_STATE = "run.json"
KIND = "checkpoint"
"""What its marker calls it (`ownership.py`)."""
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def start_saving(
    chunks: Sequence[torch.nn.Module],
    directory: str | Path,
    *,
    step: int,
    optimizer=None,
    scheduler=None,
    updates: int = 0,
    run_state: str | None = None,
    buffers: HostBuffers | None = None,
    hf: dict | None = None,
) -> PendingCheckpoint:
    """Begin to write the (unwrapped) model chunks as the newest checkpoint below `directory`.

    Collective.  With optimizer and scheduler if given; then with this rank's random states, too.
    `run_state` is the text of `run.json`.  `hf`, the model's settings, become the checkpoint's own
    record of it (`megatron_prepo/models/record.py`).  It is there once this is finished, and
    nothing else may be saved below `directory` before; without `buffers`, nor may model and
    optimizer change.  Raises OSError if a rank cannot write: older checkpoints stay.
    """
    final = path_of(directory, step)
    aside = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        for left_behind in final.parent.glob("iter_*.partial"):
            ownership.make_room(left_behind, ownership.UNFINISHED)
        ownership.create(aside, ownership.UNFINISHED)
    dist.barrier()
    weights = _sharded_weights(chunks)
    state = {**weights, **(architecture_record(hf) if hf else {})}
    state |= {"iteration": step, "updates": updates, "checkpoint_version": 3.0}
    if optimizer is not None:
        _fill_adam_state(optimizer)
        optimizer_shards.write_own_parts(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(
            weights, metadata=optimizer_shards.SHARDING
        )
        state["opt_param_scheduler"] = scheduler.state_dict()

    def publish() -> None:
        ownership.seal(aside, KIND)
        ownership.make_room(final, KIND)
        rename_tree(aside, final)
        write_text(Path(directory) / TRACKER, str(step))

    small_files = {}
    if optimizer is not None:
        small_files[f"random_{dist.get_rank()}.safetensors"] = as_bytes(_random_states())
    if run_state is not None and dist.get_rank() == 0:
        small_files[RUN_STATE] = run_state.encode()
    return PendingCheckpoint(
        state,
        aside,
        metadata=optimizer_shards.SHARDING,
        buffers=buffers,
        small_files=small_files,
        publish=publish,
    )


def load(path: Path, chunks: Sequence[torch.nn.Module], optimizer, scheduler, hf: dict) -> int:
    """Read what `save` wrote with an optimizer, under any layout; returns `updates`; collective.

    Under the number of ranks that wrote it, random states are restored, too.  Raises UserError if
    the optimizer is one that has another form on disk, and if the weights are not of the model
    whose settings are `hf`.
    """
    check_record(path, hf, "model.hf")
    _check_form(path, optimizer)
    _fill_adam_state(optimizer)
    weights = _sharded_weights(chunks)
    optimizer_shards.write_own_parts(optimizer)
    sharded = optimizer.sharded_state_dict(
        weights, is_loading=True, metadata=optimizer_shards.SHARDING
    )
    state = load_without_running(path, {**weights, "optimizer": sharded})
    _load_chunks(chunks, state)
    _load_optimizer(optimizer, state["optimizer"])
    scheduler.load_state_dict(state["opt_param_scheduler"])
    if len(list(path.glob("random_*.safetensors"))) == dist.get_world_size():
        _restore_random_states(load_file(path / f"random_{dist.get_rank()}.safetensors"))
    return state["updates"]


def load_weights(chunks: Sequence[torch.nn.Module], directory: str | Path, hf: dict) -> None:
    """Read the newest checkpoint of `directory` into the (unwrapped) model chunks; collective.

    Raises UserError if there is none, or if it is not of this model, whose settings are `hf`.
    """
    path = newest(directory)
    check_record(path, hf, "model.hf")
    weights = _sharded_weights(chunks)
    try:
        state = load_without_running(path, weights)
    except dist_checkpointing.core.CheckpointingException as error:
        raise UserError(f"{path} does not fit the model of model.hf: {error}") from error
    _load_chunks(chunks, state)


def load_without_running(path: Path, sharded: dict) -> dict:
    """Megatron's `load` of a checkpoint from anywhere: nothing that is in it gets executed.

    Megatron unpickles the table of tensors whatever it holds, so it is looked at before, and torch
    unpickles what the table calls bytes, unless it is told to build tensors and plain values only.
    Raises UserError for a table that holds anything else or names files that are not whole.
    """
    TorchDistReader(path)
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        return dist_checkpointing.load(sharded, str(path))
    except CheckpointException as error:  # not an Exception; what the ranks raised is in it
        first = " ".join(str(next(iter(error.failures.values()))[0]).split())
        raise UserError(f"{path} cannot be read: {first[-400:]}") from error
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = before


def newest(directory: str | Path) -> Path:
    """The newest whole checkpoint below `directory`, or the directory if it is one itself."""
    directory = Path(directory)
    if (directory / "metadata.json").is_file():
        return directory
    tracker = directory / TRACKER
    if not tracker.is_file():
        raise UserError(f"no Megatron checkpoint in {directory}: {tracker} is missing")
    name = tracker.read_text(errors="replace").strip()
    if name != "release" and not name.isdecimal():
        raise UserError(f"{tracker} is damaged: it says {name[:20]!r}, neither a step nor release")
    path = directory / name if name == "release" else path_of(directory, int(name))
    if not (path / "metadata.json").is_file():
        raise UserError(
            f"{tracker} names {path.name}, which is not a whole checkpoint: it has no metadata.json"
        )
    return path


def path_of(directory: str | Path, step: int) -> Path:
    """The checkpoint of a step."""
    return Path(directory) / f"iter_{step:07d}"


def all_of(directory: str | Path) -> dict[int, Path]:
    """The checkpoints below `directory` by step, the oldest first, whole or not."""
    names = [path.name.removeprefix("iter_") for path in Path(directory).glob("iter_*")]
    steps = sorted(int(name) for name in names if name.isdecimal())
    return {step: path_of(directory, step) for step in steps}


def prune(
    directory: str | Path, *, keep_last: int | None, keep_every: int | None
) -> dict[Path, list[Path]]:
    """Remove checkpoints but the newest `keep_last`, and those of every `keep_every`-th step.

    An empty `keep_last` keeps all.  One process calls it, after the newest has been saved.  Returns
    those that stay because they hold what is not known to be ours, and what that is.
    """
    steps, kept = all_of(directory), {}
    for step in list(steps)[: -keep_last if keep_last else 0]:
        if not keep_every or step % keep_every:
            if strangers := ownership.strangers(steps[step], KIND):
                kept[steps[step]] = strangers
            else:
                shutil.rmtree(steps[step])
    return kept


def _sharded_weights(chunks: Sequence[torch.nn.Module]) -> dict[str, dict]:
    """Without TransformerEngine's `_extra_state`: empty in bf16, and absent elsewhere.

    The sections of chunks are for this rank only: on disk a tensor has its name in the whole model.
    """
    return {
        section: {
            name: value
            for name, value in chunk.sharded_state_dict().items()
            if not name.endswith("_extra_state")
        }
        for section, chunk in _sections(chunks).items()
    }


def _load_chunks(chunks: Sequence[torch.nn.Module], state: dict) -> None:
    for section, chunk in _sections(chunks).items():
        chunk.load_state_dict(state[section], strict=False)


def _sections(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """As Megatron-LM calls them."""
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{i}": chunk for i, chunk in enumerate(chunks)}


def _fill_adam_state(optimizer) -> None:
    """Without it Megatron's distributed optimizer can be neither saved nor loaded."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HostAdam):
            part.optimizer.fill_state()
        elif isinstance(part.optimizer, torch.optim.Adam):  # which AdamW is, too
            fill_adam_state(part.optimizer)


def _load_optimizer(optimizer, state: dict) -> None:
    """`optimizer.load_state_dict`, mended for torch's Adam (megatron-core 0.16.1).

    A `step` of 0 is not saved.  The distributed optimizer looks for a `step` among the tensors of a
    checkpoint, where none is, and then gives one tensor to all parameters, which each count it up.
    """
    parts = optimizer.chained_optimizers
    states = [state] if len(parts) == 1 else [state[key] for key in sorted(state)]
    for part, part_state in zip(parts, states, strict=True):
        inner = part_state.get("optimizer", part_state)
        if isinstance(part.optimizer, torch.optim.Adam) and "state" in inner:
            inner["state"].setdefault("common_step", torch.zeros((), dtype=torch.float32))
    moments = [part_state.pop("param_state", None) for part_state in states]
    optimizer.load_state_dict(state)
    for part, moment in zip(parts, moments, strict=True):
        steps = [(s, s.pop("step")) for s in part.optimizer.state.values() if "step" in s]
        if moment is not None:
            optimizer_shards.load_state(part, moment)
        for parameter_state, step in steps:
            parameter_state["step"] = step.clone()


def _check_form(path: Path, optimizer) -> None:
    """UserError where Megatron would name hundreds of missing tensors.

    Experts that are spread over ranks have an optimizer of their own there, and only the
    distributed optimizer has float32 weights of float32 models.
    """
    names = [name for name in TorchDistReader(path).tensors if "optimizer.state." in name]
    parts = optimizer.chained_optimizers
    if not names:
        raise UserError(f"{path} has weights only; model.megatron starts a new run from them")
    for setting, there, here in (
        ("parallel.expert above 1", names[0].startswith("chained_"), len(parts) > 1),
        (
            "optimizer.use_distributed_optimizer=true",
            any("optimizer.state.param." in name for name in names),
            isinstance(parts[0], DistributedOptimizer),
        ),
    ):
        if there != here:
            raise UserError(
                f"{path} was written {'with' if there else 'without'} {setting}, and its "
                f"optimizer's state cannot be read {'with' if here else 'without'} it: set it as "
                "there, or start a new run from the weights (model.megatron)"
            )


def _random_states() -> dict[str, torch.Tensor]:
    """Of this rank's generators: torch's, CUDA's, and Megatron's tracker."""
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    states = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state()}
    return states | {f"tracker/{name}": state.cpu() for name, state in tracker.items()}


def _restore_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.cuda.set_rng_state(states.pop("cuda"))
    torch.set_rng_state(states.pop("torch"))
    tensor_parallel.get_cuda_rng_tracker().set_states(
        {name.removeprefix("tracker/"): state for name, state in states.items()}
    )
