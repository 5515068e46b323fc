"""Python runs this at the start of each process of a server on a CPU: it mends modules of others.

Each entry of `MENDS` runs right before or after the module of that name is first imported, so that
a process which never imports it pays nothing.
"""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path

TRAINER = str(Path(__file__).parents[4])


def declare_torchvision_operators() -> None:
    """The package index's torchvision is linked to CUDA, and its operators do not load next to a
    CPU torch; its module then fails at asking for the schema of these two.  Next to a torch for
    CUDA, or of a build for a CPU, they have loaded by now, and a second definition is fatal.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def allow_seeds_with_torch_native(choices) -> None:
    """Sampling seeds count under deterministic inference only, and that wants one of these."""
    names = (
        "DETERMINISTIC_ATTENTION_BACKEND_CHOICES",
        "RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND",
    )
    _internals().require(choices, *names)
    for name in names:
        getattr(choices, name).append("torch_native")


def leave_kernels_alone(batch_invariant_ops) -> None:
    """The kernels that do not depend on the batch are Triton's, and need a GPU."""
    _internals().replace(
        batch_invariant_ops, "enable_batch_invariant_mode", lambda *args, **kwargs: None
    )


def pin_no_memory(host_pools) -> None:
    """The routed experts are kept in host memory, which it would have CUDA pin."""
    _internals().replace(host_pools, "_cuda_host_register", lambda *args, **kwargs: None)


def _internals():
    """The trainer's module, which is on no path of the server's."""
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
_kept: list = []


class _Mending(importlib.abc.MetaPathFinder):
    """Finds nothing itself; it is asked first, and so knows what is about to be imported."""

    def find_spec(self, name, path=None, target=None):
        if name in BEFORE:
            BEFORE.pop(name)()
        if name in AFTER:
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            if spec is not None:
                _mend_after(spec.loader, AFTER.pop(name))
            return spec
        return None


def _mend_after(loader, mend) -> None:
    execute = loader.exec_module

    def exec_module(module) -> None:
        execute(module)
        mend(module)

    loader.exec_module = exec_module


sys.meta_path.insert(0, _Mending())
