"""Patches of other packages, which Python applies in each process of a server on a CPU.

Each entry of `BEFORE` and `AFTER` runs before or after the module of that name is first imported,
so that it costs nothing in a process that never imports the module.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

TRAINER = str(Path(__file__).parents[4])


def declare_torchvision_operators() -> None:
    """Define two operators of torchvision if they are missing.

    The package index's torchvision is linked to CUDA, and its operators do not load with a CPU
    torch; its module then fails on the schema of these two.  With a torch for CUDA, or a CPU build
    of torchvision, they are loaded by now, and a second definition is fatal.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def allow_seeds_with_torch_native(choices: ModuleType) -> None:
    """Allow `torch_native` in deterministic inference, without which seeds have no effect."""
    names = (
        "DETERMINISTIC_ATTENTION_BACKEND_CHOICES",
        "RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND",
    )
    _internals().require(choices, *names)
    for name in names:
        getattr(choices, name).append("torch_native")


def leave_kernels_alone(batch_invariant_ops: ModuleType) -> None:
    """Disable the batch-invariant kernels, which are Triton's and need a GPU."""
    _internals().replace(
        batch_invariant_ops, "enable_batch_invariant_mode", lambda *args, **kwargs: None
    )


def pin_no_memory(host_pools: ModuleType) -> None:
    """Keep CUDA from pinning the host memory of the routed experts."""
    _internals().replace(host_pools, "_cuda_host_register", lambda *args, **kwargs: None)


def _internals() -> ModuleType:
    """Return the trainer's module `internals`, which is not on the server's path."""
    sys.path.append(TRAINER)
    try:
        from megatron_prepo import internals
    finally:
        sys.path.remove(TRAINER)
    return internals


BEFORE = {"torchvision._meta_registrations": declare_torchvision_operators}
AFTER = {
    "sglang.srt.arg_groups.choices": allow_seeds_with_torch_native,
    "sglang.srt.batch_invariant_ops": leave_kernels_alone,
    "sglang.srt.mem_cache.pool_host.common": pin_no_memory,
}
_kept: list[object] = []


class _Mending(importlib.abc.MetaPathFinder):
    """Finder that is called first, to patch modules, and leaves finding to others."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in BEFORE:
            BEFORE.pop(name)()
        if name in AFTER:
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            if spec is not None:
                _mend_after(spec.loader, AFTER.pop(name))
            return spec
        return None


def _mend_after(loader: Any, mend: Callable[[ModuleType], None]) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        mend(module)

    loader.exec_module = exec_module


sys.meta_path.insert(0, _Mending())
