"""Megatron's CPU-offloaded Adam (`megatron.optimizer_cpu_offload`), mended.

A fraction of a rank's parameters has float32 weights and moments in host memory, where torch's
AdamW computes their update; the rest stays with the GPU's Adam.  Megatron-Core (0.16.1) calls it
`HybridDeviceOptimizer` and puts it inside its distributed optimizer.  Checkpoints are those of the
distributed optimizer without it, and either reads the other's.

`HostAdam` takes its place and changes what a run of ours would lose by:

| megatron-core 0.16.1 | what it does |
|---|---|
| builds it twice, at first over whole parameters | copies all of them for nothing |
| float32 parameters: their shards are no leaves | torch refuses them |
| float32 parameters that stay on the GPU | get no gradient |
| float32 parameters, loading | KeyError |
| `state_dict` | holds classes, which no checkpoint of ours may: reading would execute them |
| before the first update | has no state to save, and makes one for loading by a random update |
| loading | keeps views of whole tensors: each rank holds what all should share |
| loading, torch's AdamW on the GPU | takes it for the one on the host; its state goes there |
| after loading, TransformerEngine's Adam on the GPU | all its updates count as the same one |
"""

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_prepo import internals
from megatron_prepo.config import Config
from megatron_prepo.errors import UserError

SETTINGS = (
    "optimizer_offload_fraction",
    "overlap_cpu_optimizer_d2h_h2d",
    "pin_cpu_grads",
)
"""Of no use without `optimizer_cpu_offload`."""
ALL = 1.0
"""Megatron-LM's default of `--optimizer-offload-fraction`; Megatron-Core's offloads nothing."""
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
"""What a group of parameters says of where it is computed."""


def check_offload(config: Config) -> None:
    """UserError if the settings of the offloaded optimizer do not go together."""
    megatron = config.megatron
    if "pin_cpu_params" in megatron:
        raise UserError(
            "megatron.pin_cpu_params is not supported: megatron-core passes over it, and pins them "
            "in any case; leave it out"
        )
    if not megatron.get("optimizer_cpu_offload"):
        for name in SETTINGS:
            if name in megatron:
                raise UserError(
                    f"megatron.{name} has nothing to act on without "
                    "megatron.optimizer_cpu_offload=true"
                )
        return
    if not config.optimizer.use_distributed_optimizer:
        raise UserError(
            "megatron.optimizer_cpu_offload=true needs optimizer.use_distributed_optimizer=true"
        )
    fraction = offload_fraction(megatron)
    if not 0 < fraction <= 1:
        raise UserError(
            f"megatron.optimizer_offload_fraction={fraction} must be above 0 and at most 1; "
            "without it, all is offloaded"
        )
    for name in ("use_precision_aware_optimizer", "decoupled_weight_decay"):
        if not megatron.get(name, True):
            raise UserError(
                f"megatron.{name}=false does not go with megatron.optimizer_cpu_offload=true; "
                "leave it out"
            )


def offload_fraction(megatron: dict) -> float:
    """The fraction of parameters whose optimizer state is on the host, by the section `megatron`.

    On each rank Megatron offloads one parameter after another until it is reached.
    """
    if not megatron.get("optimizer_cpu_offload"):
        return 0.0
    return megatron.get("optimizer_offload_fraction", ALL)


def offloaded(settings: dict) -> OptimizerConfig:
    """Megatron's OptimizerConfig, for float32 weights on the host.

    That is what Megatron-LM asks `use_precision_aware_optimizer` for; without, a second copy of
    them stays on the GPU.  Its check of that setting fails on the version of a TransformerEngine
    that is not there (megatron-core 0.16.1), so it is set afterwards.
    """
    asked = {"optimizer_offload_fraction": ALL} | settings
    mcore = OptimizerConfig(**asked | {"use_precision_aware_optimizer": False})
    mcore.use_precision_aware_optimizer = True
    mcore.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    mcore.store_param_remainders = False  # of TransformerEngine's Adam, not of this one
    return mcore


class HostAdam(HybridDeviceOptimizer):
    """`HybridDeviceOptimizer`, mended as said above."""

    def __init__(self, params, **settings):
        for group in params:
            for parameter in group["params"]:
                if not parameter.is_leaf:
                    parameter.retain_grad()  # torch then takes it
        super().__init__(params, **settings)

    def fill_state(self) -> None:
        """Give all parameters the state that the first update would make."""
        for optimizer in self.sub_optimizers:
            fill_adam_state(optimizer)
        self._sync_sub_optimizers_state_to_hdo()

    def state_dict(self) -> dict:
        """With such options of groups only as the optimizer has that is not offloaded."""
        state = super().state_dict()
        groups = [
            {name: value for name, value in group.items() if name not in NO_STATE}
            for group in state["param_groups"]
        ]
        return state | {"param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over options and the number of updates.

        Tensors follow by `load_parameter_state_from_...` of the distributed optimizer.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            names = (saved.keys() & group.keys()) - NO_STATE - {"params"}
            group.update({name: saved[name] for name in names})
        self._sync_hdo_param_groups_to_sub_optimizers()
        steps = {float(group.get("step", 0)) for group in state_dict["param_groups"]}
        assert len(steps) <= 1, f"groups of parameters have seen different updates: {steps}"
        for step in steps:
            self._set_step(step)

    def _set_step(self, step: float) -> None:
        """Torch's Adam counts updates of each parameter, the others those of a group.

        A count in `self.param_groups` would overwrite a group's before each update.
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
        """The first of the two that Megatron builds is over the model's own parameters."""
        if any(isinstance(p, torch.nn.Parameter) for g in self.param_groups for p in g["params"]):
            return
        super()._init_sub_optimizers()

    def _set_sub_optimizer_grads(self) -> None:
        """Float32 parameters on the GPU are their own float32 weights, and need a gradient, too."""
        super()._set_sub_optimizer_grads()
        for group in self.gpu_param_groups:
            for parameter in group["params"]:
                if self.inner_param_to_orig_param[parameter] is parameter:
                    parameter.grad = parameter.decoupled_grad

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """What was loaded goes where it belongs; Megatron has put it into dicts of theirs."""
        for optimizer in self.sub_optimizers:
            for parameter, state in optimizer.state.items():
                parameter.data.copy_(state["master_param"])
                state["master_param"] = parameter
                for name in MOMENTS:
                    state[name] = state[name].to(parameter.device, copy=True)


def fill_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Give an Adam the state that it would make in its first update."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if isinstance(optimizer, torch.optim.Adam):  # which AdamW is, too
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
