"""Construction of Megatron's optimizer and learning-rate schedule from the settings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prepo.actor.cpu_offload import offloaded
from megatron_prepo.actor.model import DTYPES, megatron_overrides
from megatron_prepo.config import OptimizerConfig, TrainConfig


def ddp_config(
    optimizer: OptimizerConfig, megatron: dict[str, Any]
) -> DistributedDataParallelConfig:
    """Return DDP settings; gradients are accumulated and reduced in float32."""
    settings = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": optimizer.use_distributed_optimizer,
    }
    overrides = megatron_overrides(megatron, DistributedDataParallelConfig)
    return DistributedDataParallelConfig(**(settings | overrides))


def build_optimizer(
    settings: OptimizerConfig,
    train: TrainConfig,
    megatron: dict[str, Any],
    model_chunks: Sequence[DistributedDataParallel],
    *,
    dtype: str,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Return the optimizer and its schedule; `dtype` is that of the model (`model.dtype`)."""
    ours = dataclasses.asdict(settings)
    for name in ("lr_decay_style", "lr_warmup_steps", "lr_decay_steps"):  # used by the schedule
        del ours[name]
    arguments = ours | {
        "optimizer": "adam",
        "bf16": dtype == "bfloat16",
        "params_dtype": DTYPES[dtype],
    }
    arguments |= megatron_overrides(megatron, MegatronOptimizerConfig)
    if megatron.get("optimizer_cpu_offload"):
        mcore = offloaded(arguments)
    else:
        mcore = MegatronOptimizerConfig(**arguments)
    optimizer = get_megatron_optimizer(mcore, model_chunks)
    fuse_adam(optimizer, fused=torch.cuda.is_available())
    return optimizer, build_schedule(settings, train, optimizer)


def fuse_adam(optimizer: MegatronOptimizer, *, fused: bool) -> None:
    """Select the form of torch's Adam, which Megatron uses without TransformerEngine and apex.

    Fused, an update is one kernel that reads and writes each number once, 28 bytes per parameter;
    torch's default on CUDA takes a kernel per operation, 80 bytes, and a temporary of 4 bytes per
    parameter.  A loaded state has the form that wrote it, so call this after loading, too.
    """
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.Adam):  # AdamW is a subclass
            continue
        for group in part.optimizer.param_groups:
            group["fused"] = fused or None
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter, {})
                if "step" in state:
                    state["step"] = state["step"].to(parameter.device if fused else "cpu")


def build_schedule(
    settings: OptimizerConfig, train: TrainConfig, optimizer: MegatronOptimizer
) -> OptimizerParamScheduler:
    """Return Megatron's learning-rate schedule; one of its steps is one optimizer update.

    Update u of W warm-up updates, counted from 0, has the learning rate ``lr (u + 1) / W``: no
    update has learning rate 0, and the last one has the peak.  Megatron's warm-up is linear from
    `init_lr` at its step 0 to the peak at step `lr_warmup_steps`, hence `lr / W` and W - 1.
    """
    warmup_updates = max(1, settings.lr_warmup_steps * train.mini_batches)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr / warmup_updates,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_updates - 1,
        lr_decay_steps=(settings.lr_decay_steps or train.total_steps) * train.mini_batches,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # only the number of updates is read from a checkpoint: an extended run may decay later
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
