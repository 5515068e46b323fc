"""Megatron `torch_dist` checkpoints: written under any layout, read under any other.

The layout on disk is Megatron-LM's: `iter_0000042/` with the shards, next to
`latest_checkpointed_iteration.txt`; an imported model is in `release/`.  A checkpoint is renamed to
its final name only when it is complete (`async_save.py`), as its manifest defines (`manifest.py`).

In addition to the shards there may be

| file | content |
|---|---|
| `run.json` | state from which the training loop resumes (`resume.py`) |
| `random_N.safetensors` | random states of rank N |
"""

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prepo.actor import optimizer_shards
from megatron_prepo.actor.async_save import HostBuffers, PendingCheckpoint
from megatron_prepo.actor.cpu_offload import HostAdam, fill_adam_state
from megatron_prepo.actor.optimizer import fuse_adam
from megatron_prepo.config import LoraConfig
from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import rename_tree, write_text
from megatron_prepo.models.lora import adapters
from megatron_prepo.models.record import (
    adapter_record,
    architecture_record,
    check_record,
    refuse_adapters,
)
from megatron_prepo.models.torch_dist import TorchDistReader

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best.json"
"""Names the best checkpoint, if the run keeps one (`checkpoint.keep_best`)."""
RUN_STATE = "run.json"
KIND = "checkpoint"
"""Kind of directory in its marker (`ownership.py`)."""
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def start_saving(
    chunks: Sequence[torch.nn.Module],
    directory: str | Path,
    *,
    step: int,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    updates: int = 0,
    run_state: str | None = None,
    buffers: HostBuffers | None = None,
    hf: dict[str, Any] | None = None,
    lora: LoraConfig | None = None,
) -> PendingCheckpoint:
    """Start to write the (unwrapped) model chunks as the newest checkpoint below `directory`.

    Collective.  Optimizer and scheduler are saved if both are given, together with this rank's
    random states.  `run_state` is the text of `run.json`.  `hf`, the model's settings, and `lora`
    are stored as the checkpoint's record of the model (`models/record.py`).  The checkpoint exists
    when this is finished; until then nothing else may be saved below `directory` and, without
    `buffers`, model and optimizer must not change.  Raises OSError if a rank cannot write: older
    checkpoints are kept.
    """
    final = checkpoint_path(directory, step)
    aside = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        for left_behind in final.parent.glob("iter_*.partial"):
            ownership.make_room(left_behind, ownership.UNFINISHED, ownership.run_identity(aside))
        ownership.create(aside, ownership.UNFINISHED)
    dist.barrier()
    weights = _sharded_weights(chunks)
    state = {**weights, **(architecture_record(hf) if hf else {}), **adapter_record(lora)}
    state |= {"iteration": step, "updates": updates, "checkpoint_version": 3.0}
    if optimizer is not None:
        assert scheduler is not None, "an optimizer is saved with its scheduler"
        _fill_adam_state(optimizer)
        optimizer_shards.write_own_parts(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(
            weights, metadata=optimizer_shards.SHARDING
        )
        state["opt_param_scheduler"] = scheduler.state_dict()

    def publish() -> None:
        ownership.seal(aside, KIND)
        ownership.make_room(final, KIND, ownership.run_identity(final))
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


def load(
    path: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    hf: dict[str, Any],
) -> int:
    """Load a checkpoint with optimizer state, under any layout, and return `updates`; collective.

    With the same number of ranks as at saving, random states are restored as well.  Raises
    UserError if the optimizer has a different format on disk, and if the weights are not those of
    the model with settings `hf`.
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
    updates: int = state["updates"]
    return updates


def load_weights(
    chunks: Sequence[torch.nn.Module], directory: str | Path, hf: dict[str, Any]
) -> None:
    """Load the newest checkpoint of `directory` into the (unwrapped) model chunks; collective.

    Raises UserError if there is no checkpoint, if it is not one of the model with settings `hf`, or
    if only one of checkpoint and model has adapters.
    """
    path = newest(directory)
    check_record(path, hf, "model.hf")
    if not adapters(chunks):
        refuse_adapters(TorchDistReader(path))
    try:
        state = load_without_running(path, _sharded_weights(chunks))
    except dist_checkpointing.core.CheckpointingException as error:
        raise UserError(f"{path} does not fit the model of model.hf: {error}") from error
    _load_chunks(chunks, state)


def load_without_running(path: Path, sharded: dict[str, Any]) -> dict[str, Any]:
    """Call Megatron's `load` on an untrusted checkpoint without executing anything in it.

    Megatron unpickles the table of tensors whatever it contains, so the table is checked first, and
    torch unpickles the entries that the table marks as bytes, unless it is restricted to tensors
    and plain values.  Raises UserError for a table that contains anything else or names incomplete
    files.
    """
    TorchDistReader(path)
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        state: dict[str, Any] = dist_checkpointing.load(sharded, str(path))
        return state
    except CheckpointException as error:  # not an Exception; it holds the errors of the ranks
        first = " ".join(str(next(iter(error.failures.values()))[0]).split())
        raise UserError(f"{path} cannot be read: {first[-400:]}") from error
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = before


def newest(directory: str | Path) -> Path:
    """Return the newest complete checkpoint below `directory`, or the directory if it is one."""
    directory = Path(directory)
    if (directory / "metadata.json").is_file():
        return directory
    tracker = directory / TRACKER
    if not tracker.is_file():
        raise UserError(f"no Megatron checkpoint in {directory}: {tracker} is missing")
    name = tracker.read_text(errors="replace").strip()
    if name != "release" and not name.isdecimal():
        raise UserError(
            f"{tracker} is damaged: it contains {name[:20]!r}, neither a step nor release"
        )
    path = directory / name if name == "release" else checkpoint_path(directory, int(name))
    if not (path / "metadata.json").is_file():
        raise UserError(
            f"{tracker} names {path.name}, which is not a complete checkpoint: it has no "
            "metadata.json"
        )
    return path


def checkpoint_path(directory: str | Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return Path(directory) / f"iter_{step:07d}"


def step_number(path: Path) -> int:
    """Return the step of a checkpoint with this path."""
    return int(path.name.removeprefix("iter_"))


def by_step(directory: str | Path) -> dict[int, Path]:
    """Return the checkpoints below `directory` by step, oldest first, complete or not."""
    names = [path.name.removeprefix("iter_") for path in Path(directory).glob("iter_*")]
    steps = sorted(int(name) for name in names if name.isdecimal())
    return {step: checkpoint_path(directory, step) for step in steps}


def prune(
    directory: str | Path,
    *,
    keep_last: int | None,
    keep_every: int | None,
    keep: Collection[int | None] = (),
    damaged: Collection[int] = (),
) -> dict[Path, list[Path]]:
    """Remove all checkpoints except the newest `keep_last`, each `keep_every`-th step's and `keep`.

    Only this run's checkpoints are counted, without those of the steps `damaged`, and only older
    ones are removed.  An empty `keep_last` keeps all; `keep` are steps.  Called by one process,
    after the newest has been saved.  Returns the checkpoints that are kept because they contain
    files that are not known to be ours, with these files.
    """
    if not keep_last:
        return {}
    run, found = ownership.run_identity(directory), by_step(directory)
    ours = {step: path for step, path in found.items() if ownership.is_marked(path, KIND, run)}
    kept = {path: [path] for step, path in found.items() if step not in ours}
    newest = [step for step in ours if step not in damaged][-keep_last:]
    for step, path in ours.items():
        is_older = step < min(newest, default=0)
        if is_older and step not in keep and (not keep_every or step % keep_every):
            if strangers := ownership.strangers(path, KIND, run):
                kept[path] = strangers
            else:
                shutil.rmtree(path)
    return kept


def _sharded_weights(chunks: Sequence[torch.nn.Module]) -> dict[str, dict[str, Any]]:
    """Return sharded weights without TransformerEngine's `_extra_state`.

    That entry is empty in bf16, and other layers do not have it.  The sections of chunks are local
    to this rank: on disk a tensor has its name in the complete model.
    """
    return {
        section: {
            name: value
            for name, value in chunk.sharded_state_dict().items()
            if not name.endswith("_extra_state")
        }
        for section, chunk in _sections(chunks).items()
    }


def _load_chunks(chunks: Sequence[torch.nn.Module], state: dict[str, Any]) -> None:
    for section, chunk in _sections(chunks).items():
        chunk.load_state_dict(state[section], strict=False)


def _sections(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """Return model chunks under the names that Megatron-LM uses."""
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{i}": chunk for i, chunk in enumerate(chunks)}


def _fill_adam_state(optimizer: MegatronOptimizer) -> None:
    """Create Adam's state, which Megatron's distributed optimizer needs to be saved or loaded."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HostAdam):
            part.optimizer.fill_state()
        elif isinstance(part.optimizer, torch.optim.Adam):  # AdamW is a subclass
            fill_adam_state(part.optimizer)


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Call `optimizer.load_state_dict` with corrections for torch's Adam (megatron-core 0.16.1).

    A `step` of 0 is not saved.  The distributed optimizer looks for `step` among the tensors of a
    checkpoint, which has none, and then assigns one tensor to all parameters, each of which
    increments it.
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
    fuse_adam(optimizer, fused=torch.cuda.is_available())


def _check_form(path: Path, optimizer: MegatronOptimizer) -> None:
    """Raise UserError where Megatron would list hundreds of missing tensors.

    Experts that are distributed over ranks have a separate optimizer there, and only the
    distributed optimizer stores float32 weights of float32 models.
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
                f"optimizer state cannot be read {'with' if here else 'without'} it: use the same "
                "setting, or start a new run from the weights (model.megatron)"
            )


def _random_states() -> dict[str, torch.Tensor]:
    """Return the states of this rank's generators: torch, CUDA, and Megatron's tracker."""
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    states = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state()}
    return states | {f"tracker/{name}": state.cpu() for name, state in tracker.items()}


def _restore_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.cuda.set_rng_state(states.pop("cuda"))
    torch.set_rng_state(states.pop("torch"))
    tensor_parallel.get_cuda_rng_tracker().set_states(
        {name.removeprefix("tracker/"): state for name, state in states.items()}
    )
