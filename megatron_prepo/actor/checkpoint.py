"""Megatron `torch_dist` checkpoints: written under any layout, read under any other.

The layout on disk is Megatron-LM's: `iter_0000042/` with the shards, and beside it
`latest_checkpointed_iteration.txt`; an imported model is in `release/`.  A checkpoint gets its name
only once it is whole.
"""

import os
import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from checkpoints_convert.torch_dist import TorchDistReader
from megatron_prepo.durable import rename_tree, write_text
from megatron_prepo.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
OPTIMIZER_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(model, directory: str | Path, *, step: int, optimizer=None) -> None:
    """Write the (unwrapped) model, and the optimizer's state if given; collective."""
    final = Path(directory) / f"iter_{step:07d}"
    aside = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    weights = _sharded_weights(model)
    state = {"model": weights, "iteration": step, "checkpoint_version": 3.0}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(weights, metadata=OPTIMIZER_SHARDING)
    # one writer a rank: the default of two starts a process for each
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(aside), strategy, content_metadata=OPTIMIZER_SHARDING)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        rename_tree(aside, final)
        write_text(Path(directory) / TRACKER, str(step))
    dist.barrier()


def load_weights(model, directory: str | Path) -> None:
    """Read the newest checkpoint of `directory` into the (unwrapped) model; collective.

    Raises UserError if there is none, or if it is not of this model.
    """
    path = newest(directory)
    weights = _sharded_weights(model)
    try:
        state = load_without_running(path, {"model": weights})
    except dist_checkpointing.core.CheckpointingException as error:
        raise UserError(f"{path} does not fit the model of model.hf: {error}") from error
    model.load_state_dict(state["model"], strict=False)


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
    name = tracker.read_text().strip()
    if name != "release" and not name.isdecimal():
        raise UserError(f"{tracker} is damaged: it says {name[:20]!r}, neither a step nor release")
    path = directory / (name if name == "release" else f"iter_{int(name):07d}")
    if not (path / "metadata.json").is_file():
        raise UserError(f"{tracker} names {path.name}, which is not a whole checkpoint")
    return path


def _sharded_weights(model) -> dict:
    """Without TransformerEngine's `_extra_state`: empty in bf16, and absent elsewhere."""
    return {
        name: value
        for name, value in model.sharded_state_dict().items()
        if not name.endswith("_extra_state")
    }
