"""Implementations of log-probabilities and entropies from hidden states, for comparison.

A provider has up to three tasks, each a function of a case:

    forward            values without a graph: one matrix product
    forward+backward   values and the gradients of hidden states and weight: four products if the
                       logits are recomputed, three if they are kept
    known gradient     values and gradients in one pass, with dloss/dlogprob known in advance: three

`bare` computes only these products.  Peers are used if they are available on this machine; each
absent one is reported with the reason, by `Absent`.  `ours, epilogue` is a candidate for our
forward, which no run uses (`head_epilogue.py`).  To add a task, add its function to the provider's
dict here.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional

from megatron_prepo.actor.lm_head import (
    chunk_tokens_within,
    vocab_parallel_logprobs_and_entropy,
    vocab_parallel_loss,
)
from tools.bench.head_case import Case

FORWARD, FORWARD_BACKWARD, KNOWN_GRADIENT = "forward", "forward+backward", "known gradient"
PRODUCTS = {FORWARD: 1, FORWARD_BACKWARD: 4, KNOWN_GRADIENT: 3}
"""Number of matrix products of a task that does not keep logits."""


EPILOGUE = "ours, epilogue"
"""Beginning of the names of our forward without logits in memory, which end with its tile."""
NOT_ON_THE_CPU = {
    EPILOGUE: "needs CUDA",
    "verl": "needs CUDA",
    "liger": "its tensor parallelism needs CUDA",
    "torch": "its linear_cross_entropy has no tensor parallelism",
}


class Outcome(NamedTuple):
    """Results of a task; a provider may have no entropy, and `bare` has neither value."""

    logprobs_T: torch.Tensor | None
    entropy_T: torch.Tensor | None
    gradients: tuple[torch.Tensor, ...]


Task = Callable[[Case], Outcome]
Head = Callable[[Case], tuple[torch.Tensor, torch.Tensor | None]]


class Absent(Exception):
    """A peer that cannot be measured here; the message is the reason."""


def available(
    device: str, verl: Path | None, *, epilogue: bool = False
) -> tuple[dict[str, dict[str, Task]], dict[str, str]]:
    """Return tasks by provider, and the reason for each absent provider.

    Our kernel that has not run on a GPU yet must be asked for: an illegal access would end all.
    """
    providers = {"bare": BARE, "ours": OURS, "naive": tasks_of(naive)}
    if device == "cpu":
        return providers, dict(NOT_ON_THE_CPU)
    peers = {"verl": lambda: load_verl(verl), "liger": load_liger, "torch": load_torch}
    absent = {}
    for name, load in peers.items():
        try:
            providers[name] = tasks_of(load())
        except Absent as reason:
            absent[name] = str(reason)
    if not epilogue:
        return providers, absent | {EPILOGUE: "no --epilogue given"}
    try:
        providers |= load_epilogues()
    except Absent as reason:
        absent[EPILOGUE] = str(reason)
    return providers, absent


def tasks_of(head: Head) -> dict[str, Task]:
    """Return forward, and forward+backward by autograd, of a differentiable head."""

    def forward(case: Case) -> Outcome:
        with torch.no_grad():
            return Outcome(*head(case), ())

    def forward_backward(case: Case) -> Outcome:
        logprobs_T, entropy_T = head(case)
        outputs, grads = [logprobs_T], [case.grad_logprobs_T]
        if case.grad_entropy_T is not None:
            if entropy_T is None:
                raise Absent("it has no entropy, but the gradient needs one")
            outputs.append(entropy_T)
            grads.append(case.grad_entropy_T)
        return Outcome(logprobs_T, entropy_T, torch.autograd.grad(outputs, case.leaves, grads))

    return {FORWARD: forward, FORWARD_BACKWARD: forward_backward}


def ours_tasks(chunk_tokens: int | None = None) -> dict[str, Task]:
    """Return the tasks of the trainer's head, as the actor calls it; None: with its chunks."""

    def settings(case: Case) -> dict:
        chunk = chunk_tokens or chunk_tokens_within(None, case.weight_VH)
        return {"vocab_size": case.vocab_size, "group": case.group, "chunk_tokens": chunk}

    def ours(case: Case):
        inputs = (case.hidden_TH, case.weight_VH, case.targets_T)
        return vocab_parallel_logprobs_and_entropy(*inputs, **settings(case))

    def forward_backward(case: Case) -> Outcome:
        """Add the weight's gradient to Megatron's `main_grad`; returns all gradients."""
        outputs, grads = ours(case), [case.grad_logprobs_T, case.grad_entropy_T]
        with_gradient = 1 if case.grad_entropy_T is None else 2
        (grad_hidden_TH,) = torch.autograd.grad(
            outputs[:with_gradient], [case.hidden_TH], grads[:with_gradient]
        )
        return Outcome(*outputs, (grad_hidden_TH, case.weight_VH.main_grad))

    return tasks_of(ours) | {
        FORWARD_BACKWARD: forward_backward,
        KNOWN_GRADIENT: lambda case: _known_gradient(case, settings(case)),
    }


def _known_gradient(case: Case, settings: dict) -> Outcome:
    """Compute the same gradients with a known loss: the product of gradients and values."""
    chunks = []

    def token_loss(logprobs_C, entropy_C, scored: slice):
        chunks.append((logprobs_C.detach(), entropy_C.detach()))
        loss = logprobs_C @ case.grad_logprobs_T[scored]
        if case.grad_entropy_T is not None:
            loss = loss + entropy_C @ case.grad_entropy_T[scored]
        return loss, {}

    inputs = (case.hidden_TH, case.weight_VH, case.targets_T)
    loss, _ = vocab_parallel_loss(*inputs, token_loss, **settings)
    (grad_hidden_TH,) = torch.autograd.grad(loss, [case.hidden_TH])
    values_T = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return Outcome(*values_T, (grad_hidden_TH, case.weight_VH.main_grad))


def naive(case: Case):
    """Megatron-Core's approach: all logits, in float32, then entropy and cross entropy over them.

    The output layer's product is in the weight's type and is converted to float32 afterwards, as in
    Megatron.  Cross entropy overwrites the logits: they are copied only if the entropy's backward
    still needs them, otherwise the entropy is computed first, without a graph.  Temperature is 1,
    and the division by it is skipped.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits_TV = functional.linear(case.hidden_TH, case.weight_VH).float()
    with torch.set_grad_enabled(torch.is_grad_enabled() and case.grad_entropy_T is not None):
        entropy_T = _VocabParallelEntropy.apply(logits_TV, case.group)
    if entropy_T.requires_grad:
        logits_TV = logits_TV.clone()
    return -vocab_parallel_cross_entropy(logits_TV, case.targets_T), entropy_T


def naive_bytes(case: Case) -> int:
    """Return the approximate free memory in bytes that `naive` needs, counted in float32 logits.

    Three copies are in use at a time, four with a gradient of the entropy; one more, because
    alternation with other providers fragments the memory.
    """
    times = 4 if case.grad_entropy_T is None else 5
    return times * 4 * case.shape.tokens * case.shape.columns


class _VocabParallelEntropy(torch.autograd.Function):
    """Entropy H = max + ln S - sum_v p_v z_v over the ranks' columns, by three all-reduces."""

    @staticmethod
    def forward(ctx, logits_TV, group):
        max_T1 = _reduced(logits_TV.amax(dim=1, keepdim=True), group, dist.ReduceOp.MAX)
        p_TV = (logits_TV - max_T1).exp_()
        sum_T1 = _reduced(p_TV.sum(dim=1, keepdim=True), group, dist.ReduceOp.SUM)
        p_TV.div_(sum_T1)
        mean_T1 = (p_TV * logits_TV).sum(dim=1, keepdim=True)
        _reduced(mean_T1, group, dist.ReduceOp.SUM)
        ctx.save_for_backward(logits_TV, p_TV, mean_T1)
        return (max_T1 + sum_T1.log() - mean_T1).squeeze(1)

    @staticmethod
    def backward(ctx, grad_T):
        logits_TV, p_TV, mean_T1 = ctx.saved_tensors
        return (mean_T1 - logits_TV).mul_(p_TV).mul_(grad_T[:, None]), None


def _reduced(x: torch.Tensor, group, how) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(x, how, group)
    return x


def _bare_forward(case: Case) -> Outcome:
    with torch.no_grad():
        functional.linear(case.hidden_TH, case.weight_VH)
    return Outcome(None, None, ())


@torch.no_grad()
def _bare_gradients(case: Case, times_logits: int) -> Outcome:
    for _ in range(times_logits):
        logits_TV = functional.linear(case.hidden_TH, case.weight_VH)
    # the logits have the shape and type of their gradient; the values do not affect the time
    return Outcome(None, None, (logits_TV @ case.weight_VH, logits_TV.t() @ case.hidden_TH))


BARE: dict[str, Task] = {
    FORWARD: _bare_forward,
    FORWARD_BACKWARD: lambda case: _bare_gradients(case, times_logits=2),
    KNOWN_GRADIENT: lambda case: _bare_gradients(case, times_logits=1),
}


OURS: dict[str, Task] = ours_tasks()


def load_epilogues() -> dict[str, dict[str, Task]]:
    """Return our forward with statistics in the product's epilogue, by tile (`head_epilogue`)."""
    try:
        from tools.bench import head_epilogue
    except ImportError as error:
        raise Absent(f"it cannot be imported: {error}") from error
    if not torch.cuda.is_available():
        raise Absent(NOT_ON_THE_CPU[EPILOGUE])
    device = torch.cuda.get_device_properties()
    if device.major not in head_epilogue.TILES:
        raise Absent(f"no tiles for compute capability {device.major}.{device.minor}")

    def forward(case: Case, tile: head_epilogue.Tile) -> Outcome:
        values = head_epilogue.logprobs_and_entropy(
            case.hidden_TH,
            case.weight_VH,
            case.targets_T,
            vocab_size=case.vocab_size,
            group=case.group,
            tile=tile,
            multiprocessors=device.multi_processor_count,
        )
        return Outcome(*values, ())

    tiles = head_epilogue.TILES[device.major]
    return {f"{EPILOGUE} {tile}": {FORWARD: partial(forward, tile=tile)} for tile in tiles}


def load_verl(folder: Path | None) -> Head:
    """verl's Triton kernel, from a checkout's `verl/utils/kernel` (as of its PR #5349, or later).

    Before that change, results for a vocabulary that is not a multiple of 1024 are wrong, as the
    errors in the result show.  Its files run without the package, which needs Ray and more; the one
    module of verl that they import is replaced.
    """
    if folder is None:
        raise Absent("no --verl FOLDER given")
    if not (folder / "linear_cross_entropy.py").is_file():
        raise Absent("the --verl folder has no linear_cross_entropy.py")
    if not importlib.util.find_spec("triton"):
        raise Absent("triton is not installed")
    device = ModuleType("verl.utils.device")
    device.is_cuda_available = torch.cuda.is_available()
    device.get_device_capability = lambda: torch.cuda.get_device_capability()
    device.get_device_name = lambda: "cuda"
    device.get_torch_device = lambda: torch.cuda
    kernel = _package("verl.utils.kernel", str(folder))
    for module in (_package("verl"), _package("verl.utils"), device, kernel):
        sys.modules[module.__name__] = module
    try:
        module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    except ImportError as error:
        raise Absent(f"it cannot be imported: {error}") from error

    def head(case: Case):
        temperature, reduction, group = 1.0, "none", None
        return module.linear_cross_entropy(
            case.hidden_TH, case.weight_VH, case.targets_T, temperature, reduction, group
        )

    return head


def load_liger() -> Head:
    """Liger's per-token cross entropy with entropy: its CuTe kernel on Hopper.

    On Hopper it needs `liger-kernel[cutedsl]`; on other GPUs it is chunked plain PyTorch.
    """
    try:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as function
    except ImportError as error:
        raise Absent(f"it cannot be imported: {error}") from error

    def head(case: Case):
        nll_T, entropy_T = function.apply(
            case.hidden_TH, case.weight_VH, case.targets_T, return_entropy=True
        )
        return -nll_T, entropy_T.float()

    return head


def load_torch() -> Head:
    """PyTorch's own chunked `linear_cross_entropy`, which has no entropy."""
    if not hasattr(functional, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has")

    def head(case: Case):
        loss_T = functional.linear_cross_entropy(
            case.hidden_TH,
            case.weight_VH,
            case.targets_T,
            reduction="none",
            options=torch.nn.LinearCrossEntropyOptions(),
        )
        return -loss_T, None

    return head


def _package(name: str, *folders: str) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = list(folders)
    return package
