"""Megatron's CPU-offloaded Adam (`megatron.optimizer_cpu_offload`), with corrections.

A fraction of a rank's parameters has float32 weights and moments in host memory, where torch's
AdamW computes their update; the remaining parameters are updated by Adam on the GPU.  Megatron-Core
(0.16.1) implements this as `HybridDeviceOptimizer` inside its distributed optimizer.  Checkpoints
have the format of the distributed optimizer without offloading, and can be exchanged with it.

`HostAdam` replaces it and corrects the following:

| megatron-core 0.16.1 | effect |
|---|---|
| the optimizer is built twice, first over full parameters | all of them are copied in vain |
| float32 parameters: their shards are not leaf tensors | torch rejects them |
| float32 parameters that stay on the GPU | get no gradient |
| float32 parameters, loading | KeyError |
| `state_dict` | contains classes, which checkpoints must not: reading would execute them |
| before the first update | no state to save; for loading, a random update creates one |
| loading | keeps views of full tensors: each rank holds the memory of all shards |
| loading, torch's AdamW on the GPU | is mistaken for the one on the host; its state goes there |
| after loading, TransformerEngine's Adam on the GPU | all its updates have the same step count |
"""

from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_prepo import internals
from megatron_prepo.errors import UserError

SETTINGS = (
    "optimizer_offload_fraction",
    "overlap_cpu_optimizer_d2h_h2d",
    "pin_cpu_grads",
)
"""Settings without effect unless `optimizer_cpu_offload` is set."""
ALL = 1.0
"""Megatron-LM's default of `--optimizer-offload-fraction`; Megatron-Core's default is 0."""
MOMENTS = ("exp_avg", "exp_avg_sq")
NO_STATE = {
    "offload_fraction",
    "cpu_optimizer_cls",
    "gpu_optimizer_cls",
    "param_update_in_fp32",
    "pin_cpu_grads",
    "pin_cpu_params",
    "overlap_cpu_optimizer_d2h_h2d",
    "fused",
}
"""Entries of a parameter group that describe its placement."""


def check_offload(megatron: dict[str, Any], *, use_distributed_optimizer: bool) -> None:
    """Raise UserError for incompatible settings of the offloaded optimizer."""
    if "pin_cpu_params" in megatron:
        raise UserError(
            "megatron.pin_cpu_params is not supported: megatron-core ignores it, and always pins "
            "them; remove it"
        )
    if not megatron.get("optimizer_cpu_offload"):
        for name in SETTINGS:
            if name in megatron:
                raise UserError(
                    f"megatron.{name} has no effect without megatron.optimizer_cpu_offload=true"
                )
        return
    if not use_distributed_optimizer:
        raise UserError(
            "megatron.optimizer_cpu_offload=true needs optimizer.use_distributed_optimizer=true"
        )
    fraction = offload_fraction(megatron)
    if not 0 < fraction <= 1:
        raise UserError(
            f"megatron.optimizer_offload_fraction={fraction} must be above 0 and at most 1; "
            "remove it to offload all parameters"
        )
    for name in ("use_precision_aware_optimizer", "decoupled_weight_decay"):
        if not megatron.get(name, True):
            raise UserError(
                f"megatron.{name}=false is incompatible with megatron.optimizer_cpu_offload=true; "
                "remove it"
            )


def offload_fraction(megatron: dict[str, Any]) -> float:
    """Return the fraction of parameters whose optimizer state is on the host.

    On each rank, Megatron offloads one parameter after another until the fraction is reached.
    """
    if not megatron.get("optimizer_cpu_offload"):
        return 0.0
    fraction: float = megatron.get("optimizer_offload_fraction", ALL)
    return fraction


def offloaded(settings: dict[str, Any]) -> OptimizerConfig:
    """Return Megatron's OptimizerConfig for float32 weights on the host.

    Megatron-LM requires `use_precision_aware_optimizer` for this; without it, a second copy of the
    weights stays on the GPU.  Its check of that setting fails without TransformerEngine
    (megatron-core 0.16.1), so the setting is changed afterwards.
    """
    asked = {"optimizer_offload_fraction": ALL} | settings
    mcore = OptimizerConfig(**asked | {"use_precision_aware_optimizer": False})
    mcore.use_precision_aware_optimizer = True
    mcore.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    mcore.store_param_remainders = False  # only TransformerEngine's Adam supports it
    return mcore


class HostAdam(HybridDeviceOptimizer):
    """`HybridDeviceOptimizer` with the corrections listed above."""

    def __init__(self, params: list[dict[str, Any]], **settings: Any) -> None:
        for group in params:
            for parameter in group["params"]:
                if not parameter.is_leaf:
                    parameter.retain_grad()  # torch then accepts it
        super().__init__(params, **settings)

    def fill_state(self) -> None:
        """Create the state of all parameters that the first update would create."""
        for optimizer in self.sub_optimizers:
            fill_adam_state(optimizer)
        self._sync_sub_optimizers_state_to_hdo()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with only those group options that exist without offloading."""
        state: dict[str, Any] = super().state_dict()
        groups = [
            {name: value for name, value in group.items() if name not in NO_STATE}
            for group in state["param_groups"]
        ]
        return state | {"param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load options and the number of updates.

        Tensors are loaded by `load_parameter_state_from_...` of the distributed optimizer.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            names = (saved.keys() & group.keys()) - NO_STATE - {"params"}
            group.update({name: saved[name] for name in names})
        self._sync_hdo_param_groups_to_sub_optimizers()
        steps = {float(group.get("step", 0)) for group in state_dict["param_groups"]}
        assert len(steps) <= 1, f"parameter groups have different numbers of updates: {steps}"
        for step in steps:
            self._set_step(step)

    def _set_step(self, step: float) -> None:
        """Set the number of updates: per parameter for torch's Adam, per group for other Adams.

        A count in `self.param_groups` would overwrite that of a group before each update.
        """
        for optimizer in self.sub_optimizers:
            of_parameters = isinstance(optimizer, torch.optim.Adam)
            for group in optimizer.param_groups:
                if not of_parameters:
                    group["step"] = int(step)
                for parameter in group["params"]:
                    state = optimizer.state[parameter]
                    state.pop("step", None)
                    if of_parameters:
                        state["step"] = torch.tensor(step, device=parameter.device)

    def _init_sub_optimizers(self) -> None:
        """Skip the first of the two builds by Megatron, which is over the model's parameters."""
        if any(isinstance(p, torch.nn.Parameter) for g in self.param_groups for p in g["params"]):
            return
        super()._init_sub_optimizers()

    def _set_sub_optimizer_grads(self) -> None:
        """Set gradients, also of float32 parameters on the GPU, which have no separate weights."""
        super()._set_sub_optimizer_grads()
        for group in self.gpu_param_groups:
            for parameter in group["params"]:
                if self.inner_param_to_orig_param[parameter] is parameter:
                    parameter.grad = parameter.decoupled_grad

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """Copy loaded state, which Megatron puts into the optimizers' dicts, to its tensors."""
        for optimizer in self.sub_optimizers:
            for parameter, state in optimizer.state.items():
                parameter.data.copy_(state["master_param"])
                state["master_param"] = parameter
                for name in MOMENTS:
                    state[name] = state[name].to(parameter.device, copy=True)


def fill_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of an Adam that its first update would create."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
                device = parameter.device if group["fused"] else "cpu"
                state.setdefault("step", torch.zeros((), dtype=torch.float32, device=device))
            for moment in MOMENTS:
                state.setdefault(moment, torch.zeros_like(parameter))


internals.require(
    HybridDeviceOptimizer,
    "_init_sub_optimizers",
    "_set_sub_optimizer_grads",
    "_sync_hdo_param_groups_to_sub_optimizers",
    "_sync_hdo_state_to_sub_optimizers",
    "_sync_sub_optimizers_state_to_hdo",
)
internals.replace(megatron_optimizer, "HybridDeviceOptimizer", HostAdam)
internals.replace(distrib_optimizer, "HybridDeviceOptimizer", HostAdam)
