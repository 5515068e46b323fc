"""Megatron's optimizer and learning-rate schedule, from our settings."""

import dataclasses

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prepo.actor import offload
from megatron_prepo.actor.model import DTYPES, megatron_overrides
from megatron_prepo.config import Config


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """Gradients are accumulated and reduced in float32."""
    settings = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": config.optimizer.use_distributed_optimizer,
    }
    overrides = megatron_overrides(config.megatron, DistributedDataParallelConfig)
    return DistributedDataParallelConfig(**(settings | overrides))


def build_optimizer(
    config: Config, model_chunks
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """The optimizer and its schedule; one step of the schedule is one optimizer update."""
    ours = dataclasses.asdict(config.optimizer)
    names = ("lr_decay_style", "lr_warmup_steps", "lr_decay_steps")
    steps = {name: ours.pop(name) for name in names}
    settings = ours | {
        "optimizer": "adam",
        "bf16": config.model.dtype == "bfloat16",
        "params_dtype": DTYPES[config.model.dtype],
    }
    overrides = megatron_overrides(config.megatron, MegatronOptimizerConfig)
    if config.megatron.get("optimizer_cpu_offload"):
        mcore = offload.offloaded(settings | overrides)
    else:
        mcore = MegatronOptimizerConfig(**(settings | overrides))
    optimizer = get_megatron_optimizer(mcore, model_chunks)
    updates_a_step = config.train.mini_batches
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=steps["lr_warmup_steps"] * updates_a_step,
        lr_decay_steps=(steps["lr_decay_steps"] or config.train.total_steps) * updates_a_step,
        lr_decay_style=steps["lr_decay_style"],
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # of a checkpoint only the number of updates counts: a run that is extended may decay later
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
