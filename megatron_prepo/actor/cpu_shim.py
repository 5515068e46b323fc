"""Substitutes that let Megatron-Core run on a machine without CUDA, all in one file.

Megatron-Core hard-codes the device "cuda" in many places and uses streams and random states of
`torch.cuda`, but its mathematics and its collectives run on a CPU over gloo.  `install` redirects
those calls to the CPU; numbers do not change.  It is called only if CUDA is absent.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.transformer.moe import token_dispatcher
from torch.overrides import TorchFunctionMode

from megatron_prepo import internals

_installed: list["_CudaMeansCpu"] = []


def install() -> None:
    """Redirect `device="cuda"` to the CPU in this process, once; only on machines without CUDA."""
    assert not torch.cuda.is_available(), "the CPU stand-ins must not hide a real GPU"
    if _installed:
        return
    mode = _CudaMeansCpu()
    mode.__enter__()  # never exited: it stays active as long as the process
    _installed.append(mode)
    warnings.filterwarnings("ignore", message="When using async grad allreduce")

    for owner, name, stand_in in (
        (torch.cuda, "current_device", lambda *_, **__: torch.device("cpu")),
        (torch.cuda, "current_stream", lambda *_, **__: _Stream()),
        (torch.cuda, "default_stream", lambda *_, **__: _Stream()),
        (torch.cuda, "Stream", _Stream),  # a class: other libraries name it in annotations
        (torch.cuda, "stream", lambda *_, **__: contextlib.nullcontext()),
        (torch.cuda, "synchronize", lambda *_, **__: None),
        (torch.cuda, "empty_cache", lambda *_, **__: None),
        (torch.cuda.nvtx, "range_push", lambda *_, **__: None),
        (torch.cuda.nvtx, "range_pop", lambda *_, **__: None),
        (torch.Tensor, "cuda", lambda self, *_, **__: self),
        # Megatron's CUDA generator states are the CPU's, so that dropout's `fork()` works
        (torch.cuda, "manual_seed", lambda seed, *_, **__: torch.manual_seed(seed)),
        (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", _set_rng_state),
        (mcore_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (mcore_random, "_set_cuda_rng_state", _set_rng_state),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _as_on_the_host),
    ):
        internals.replace(owner, name, stand_in)
    _split_as_on_a_gpu()


def model_settings() -> dict[str, Any]:
    """Return TransformerConfig fields without which Megatron-Core would call CUDA kernels."""
    return {
        "use_cpu_initialization": True,
        "batch_p2p_comm": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "tp_comm_overlap": False,
    }


class _Stream:
    """Substitute for a CUDA stream: work on a CPU is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        """Return immediately."""

    def wait(self, other: Any = None) -> None:
        """Return immediately."""

    def synchronize(self) -> None:
        """Return immediately."""

    def record_event(self) -> "_Stream":
        """Return an event that has already completed."""
        return self


class _CudaMeansCpu(TorchFunctionMode):
    """Redirection of factories, `.to` and type names from CUDA to the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizer sorts parameters by the name "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):  # only useful for copies to and from a GPU
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _HostIsElsewhere(TorchFunctionMode):
    """Tracking of tensors that went through `.cpu()`, and of results computed from them.

    All other tensors report that they are on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_host: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func == torch.Tensor.is_cuda.__get__:
            return id(args[0]) not in self.on_host
        moves = func in (torch.Tensor.cpu, torch.Tensor.pin_memory)
        result = args[0] if moves else func(*args, **(kwargs or {}))
        if moves or (args and id(args[0]) in self.on_host and torch.is_tensor(result)):
            self.on_host[id(result)] = result
        return result


def _split_as_on_a_gpu() -> None:
    """Make the offloaded optimizer choose parameters for the host although all are on a CPU."""

    def choose(*args: Any, **kwargs: Any) -> Any:
        with _HostIsElsewhere():
            return original(*args, **kwargs)

    original = internals.replace(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", choose)


def _as_on_the_host(tensor: Any, as_numpy: bool = False, *_: Any, **__: Any) -> Any:
    """Return sizes as numpy, since all-to-all needs numbers.

    Megatron's version returns a CPU tensor unchanged.
    """
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _set_rng_state(state: torch.Tensor, /, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return bool(device.type == "cuda")
    return isinstance(device, str) and device.startswith("cuda")
