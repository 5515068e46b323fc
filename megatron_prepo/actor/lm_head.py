"""Exact token log-probability and full-vocabulary entropy from hidden states and a sharded head.

For a token with logits z = W h / temperature over the full vocabulary of V entries,

    logp = z_target - lse,   H = -sum_v p_v ln p_v,   p = softmax(z),   lse = ln sum_v e^(z_v),

where each tensor-parallel rank holds the rows of W for its part of the vocabulary.  Three design
choices make this exact and memory-efficient: the logits of `chunk_tokens` tokens exist at a time
and never leave float32; a rank reduces its columns to four numbers per token (max m, sum e^(z-m),
sum (z-m)e^(z-m), z_target), which an all-gather exchanges and every rank merges in the same order;
and entropy is computed in the shifted form ln S - T/S, which does not cancel.  Backward needs no
statistics from other ranks:

    dlogp/dz_v = 1[v = target] - p_v,      dH/dz_v = -p_v (ln p_v + H).

`vocab_parallel_logprobs_and_entropy` recomputes the logits in backward: 4 matrix products in total,
for any incoming gradient.  `vocab_parallel_loss` takes the loss as an argument, and so knows the
gradient while it still has the logits: 3 products.  docs/head.md derives and measures both.

Letters: T tokens, R scored ones among them, C tokens per chunk, H hidden, V rows of W of this rank.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_prepo.actor import lm_head_torch
from megatron_prepo.models.fp32_matmul import add_product, product

IGNORE = -100
"""Target of tokens that are not scored."""
HEAD_MEMORY_MIB = {"cuda": 900.0, "cpu": 16.0}
"""Memory for a chunk's logits: matrix products on a GPU need about 1,000 rows to be efficient, the
cache of a CPU holds only a few."""
ALIGNMENT = 128
"""Divisor of the size of chunks with more tokens than this: matrix products prefer full tiles."""


def vocab_parallel_logprobs_and_entropy(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float | torch.Tensor = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    fp32_logits: bool = True,
    into_main_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `logprobs_T` and `entropy_T`, float32 (float64 for float64 inputs), in nats.

    `hidden_TH`: the last hidden states, the same on every rank of `group`.
    `weight_VH`: this rank's rows of the output embedding; rank r holds rows r*V ... (r+1)*V - 1.
    `targets_T`: token ids; `IGNORE` gives 0 and 0 with zero gradient, and the token's hidden state
    is never read.
    `vocab_size`: rows from this index on are padding, and are excluded.
    `temperature`: one number, or one per token.
    `group`: the tensor-parallel group; None means that this rank holds the full vocabulary.
    `chunk_tokens`: see `chunk_tokens_within`.
    `fp32_logits`: False rounds the logits to the type of the weights, as an engine may do.
    `into_main_grad`: add the weight's gradient to `weight_VH.main_grad`, if it has one in float32,
    and return none for it; the parameter's `grad_added_to_main_grad` is then set, as Megatron's
    linear layer does.  Otherwise it is accumulated in float32, and returned.  A weight that
    requires no gradient gets none.

    The gradient of `hidden_TH` is only this rank's part: the region that the hidden states come
    from must sum the parts once (`copy_to_tensor_model_parallel_region`, or
    `gather_from_sequence_parallel_region` with `tensor_parallel_output_grad=True`).  The weight's
    gradient is complete.

    A target outside the vocabulary gives -inf, never a plausible number.
    """
    head = _Head.of(weight_VH, targets_T, vocab_size, temperature, group, chunk_tokens)
    head = replace(head, fp32_logits=fp32_logits, into_main_grad=into_main_grad)
    logprobs_R, entropy_R = _LogprobsAndEntropy.apply(hidden_TH, weight_VH, head)
    zeros_T = logprobs_R.new_zeros(targets_T.shape)
    return (
        zeros_T.index_copy(0, head.rows_R, logprobs_R),
        zeros_T.index_copy(0, head.rows_R, entropy_R),
    )


TokenLoss = Callable[
    [torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, dict[str, torch.Tensor]]
]
"""Type of `token_loss(logprobs_C, entropy_C, scored)`: the loss of some tokens, and sums over them.

`scored` is the range of these among the scored tokens.  Losses and sums of disjoint ranges add up.
"""


def vocab_parallel_loss(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    token_loss: TokenLoss,
    *,
    vocab_size: int,
    temperature: float | torch.Tensor = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    fp32_logits: bool = True,
    into_main_grad: bool = True,
    loss_scale: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of `token_loss` on the scored tokens, and the sums that it returns.

    Values and gradients are those of `token_loss` on the results of
    `vocab_parallel_logprobs_and_entropy` for the targets that are not `IGNORE`, in their order;
    `token_loss` gets one chunk of them at a time, bit-identical on every rank of `group`.  All
    other arguments are the same.

    The gradients are computed in forward, while the logits still exist.

    `loss_scale`: the gradient that will arrive at the loss in backward.  It must be known if the
    weight's gradient is added to `main_grad`, which cannot be scaled afterwards: a different
    gradient then raises RuntimeError (without waiting for the device: on CUDA it is a device-side
    assertion), and so does a second backward.  Otherwise any gradient may arrive.
    """
    head = _Head.of(weight_VH, targets_T, vocab_size, temperature, group, chunk_tokens)
    head = replace(head, fp32_logits=fp32_logits, into_main_grad=into_main_grad)
    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    with_gradient = torch.is_grad_enabled()
    loss, sums = _Loss.apply(hidden_TH, weight_VH, head, token_loss, loss_scale, with_gradient)
    return loss, sums


def chunk_tokens_within(memory_mib: float | None, weight_VH: torch.Tensor) -> int:
    """Return the tokens per chunk whose float32 logits and gradient in the weight's type fit.

    The gradient of float32 logits reuses their memory.  At least 1, and a multiple of `ALIGNMENT`
    if at least that many fit; the same on every tensor-parallel rank.  None means the device's
    `HEAD_MEMORY_MIB`.

    >>> chunk_tokens_within(900, torch.empty(152064, 1, dtype=torch.bfloat16))
    1024
    """
    if memory_mib is None:
        memory_mib = HEAD_MEMORY_MIB[weight_VH.device.type]
    size: int = weight_VH.element_size()
    bytes_per_token: int = weight_VH.shape[0] * (4 + size if size < 4 else size)
    tokens = int(memory_mib * 2**20) // bytes_per_token
    return max(1, tokens if tokens < ALIGNMENT else tokens - tokens % ALIGNMENT)


def row_operations(device: torch.device) -> ModuleType:
    """Return the module of the row operations for a device: `lm_head_triton` or `lm_head_torch`."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from megatron_prepo.actor import lm_head_triton

        return lm_head_triton
    return lm_head_torch


@dataclass(frozen=True)
class _Chunk:
    """A range of the scored tokens, with their logits before division by the temperature."""

    scored: slice
    rows_C: torch.Tensor
    hidden_CH: torch.Tensor
    z_CV: torch.Tensor
    target_C: torch.Tensor
    temperature: float | torch.Tensor


@dataclass(frozen=True)
class _Head:
    """This rank's part of the output layer, and the tokens to score."""

    rows_R: torch.Tensor
    """Indices of the scored tokens in the hidden states."""
    target_R: torch.Tensor
    """Targets of the scored tokens, relative to this rank's first column."""
    temperature: float | torch.Tensor
    columns: int
    """Rows of this rank's weight that are not padding."""
    group: dist.ProcessGroup | None
    chunk_tokens: int
    fp32_logits: bool = True
    into_main_grad: bool = True

    @classmethod
    def of(
        cls,
        weight_VH: torch.Tensor,
        targets_T: torch.Tensor,
        vocab_size: int,
        temperature: float | torch.Tensor,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
    ) -> "_Head":
        # waits for the device, once per call: the number of scored tokens is a size needed below
        rows_R = (targets_T != IGNORE).nonzero().squeeze(1)
        first = weight_VH.shape[0] * (0 if group is None else group.rank())
        if isinstance(temperature, torch.Tensor):
            temperature = temperature[rows_R].to(_float(weight_VH))
        columns = max(0, min(weight_VH.shape[0], vocab_size - first))
        return cls(rows_R, targets_T[rows_R] - first, temperature, columns, group, chunk_tokens)

    def only(self, keep_K: torch.Tensor) -> "_Head":
        """Return the head for a subset of the scored tokens."""
        return replace(
            self,
            rows_R=self.rows_R[keep_K],
            target_R=self.target_R[keep_K],
            temperature=self._temperature(keep_K),
        )

    def _temperature(self, rows: slice | torch.Tensor) -> float | torch.Tensor:
        """Return the temperature of some of the scored tokens."""
        if isinstance(self.temperature, torch.Tensor):
            return self.temperature[rows]
        return self.temperature

    def chunks(self, hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> Iterator[_Chunk]:
        """Yield the chunks; their logits share a workspace, so finish one before the next."""
        slices = equal_chunks(len(self.rows_R), self.chunk_tokens)
        rows_VH = weight_VH[: self.columns]
        longest = max(chunk.stop - chunk.start for chunk in slices)
        workspace_CV = weight_VH.new_empty(longest, self.columns, dtype=_float(weight_VH))
        for chunk in slices:
            rows_C = self.rows_R[chunk]
            hidden_CH = hidden_TH.index_select(0, rows_C)
            z_CV = workspace_CV[: len(rows_C)]
            if self.fp32_logits:
                product(hidden_CH, rows_VH.t(), out=z_CV)
            else:
                z_CV.copy_(hidden_CH @ rows_VH.t())
            target_C, temperature = self.target_R[chunk], self._temperature(chunk)
            yield _Chunk(chunk, rows_C, hidden_CH, z_CV, target_C, temperature)


class _LogprobsAndEntropy(torch.autograd.Function):
    """Log-probabilities and entropies; the logits are recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, head: _Head
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = row_operations(hidden_TH.device)
        stats = [
            rows.row_statistics(chunk.z_CV, chunk.target_C, chunk.temperature)
            for chunk in head.chunks(hidden_TH, weight_VH)
        ]
        lse_R, entropy_R, logprobs_R = _merge(_gather(torch.cat(stats, dim=1), head.group))
        ctx.save_for_backward(hidden_TH, weight_VH, lse_R, entropy_R)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return logprobs_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_R: torch.Tensor | None, grad_entropy_R: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TH, weight_VH, lse_R, entropy_R = ctx.saved_tensors
        if grad_logprobs_R is None:
            grad_logprobs_R = torch.zeros_like(lse_R)
        # Tokens without a gradient (such as clipped ones) need no product.  Counting them waits for
        # the device, once per call: this takes less time than the products of one chunk.
        counts_R = grad_logprobs_R != 0
        if grad_entropy_R is not None:
            counts_R |= grad_entropy_R != 0
        keep_K = counts_R.nonzero().squeeze(1)
        head, gradients = ctx.head.only(keep_K), _Gradients(hidden_TH, weight_VH, ctx.head)
        per_token = [
            None if value_R is None else value_R[keep_K]
            for value_R in (lse_R, entropy_R, grad_logprobs_R, grad_entropy_R)
        ]
        for chunk in head.chunks(hidden_TH, weight_VH):
            gradients.add(chunk, *(None if v is None else v[chunk.scored] for v in per_token))
        return gradients.hidden_TH, gradients.finish_weight(), None


class _Loss(torch.autograd.Function):
    """Loss whose gradient is known in forward, so that the logits are computed once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        head: _Head,
        token_loss: TokenLoss,
        loss_scale: float,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows = row_operations(hidden_TH.device)
        gradients = _Gradients(hidden_TH, weight_VH, head) if with_gradient else None
        losses, sums = [], []
        for chunk in head.chunks(hidden_TH, weight_VH):
            stats_4C = rows.row_statistics(chunk.z_CV, chunk.target_C, chunk.temperature)
            lse_C, entropy_C, logprobs_C = _merge(_gather(stats_4C, head.group))
            with torch.set_grad_enabled(with_gradient):
                values = [v.detach().requires_grad_(with_gradient) for v in (logprobs_C, entropy_C)]
                loss, chunk_sums = token_loss(values[0], values[1], chunk.scored)
            losses.append(loss.detach())
            sums.append({name: value.detach() for name, value in chunk_sums.items()})
            if gradients is not None:
                arriving = torch.full_like(loss, loss_scale)
                grads = torch.autograd.grad(loss, values, arriving, allow_unused=True)
                gradients.add(chunk, lse_C, entropy_C, *grads)
        if gradients is not None:
            grad_weight_VH = gradients.finish_weight()
            ctx.in_main_grad = gradients.in_main_grad
            ctx.save_for_backward(gradients.hidden_TH, grad_weight_VH)
            ctx.loss_scale, ctx.used = loss_scale, False
        total: torch.Tensor = sum(losses)
        return total, {name: sum(part[name] for part in sums) for name in sums[0]}

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: torch.Tensor, _: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor | None, ...]:
        grad_hidden_TH, grad_weight_VH = ctx.saved_tensors
        if not ctx.in_main_grad:
            factor = grad_loss / ctx.loss_scale
            scaled = (None if g is None else g * factor for g in (grad_hidden_TH, grad_weight_VH))
            return *scaled, None, None, None, None
        if ctx.used:
            raise RuntimeError("vocab_parallel_loss: the weight's gradient is in main_grad already")
        ctx.used = True
        # (1 / M) M of Megatron's schedule and its caller equals 1 only up to rounding
        torch._assert_async(
            (grad_loss - ctx.loss_scale).abs() <= 1e-6 * abs(ctx.loss_scale),
            f"vocab_parallel_loss: main_grad was given the gradient for loss_scale={ctx.loss_scale}"
            ", but another gradient arrived at the loss",
        )
        return grad_hidden_TH, None, None, None, None, None


class _Gradients:
    """Gradients of hidden states and weight, accumulated from gradients of chunks of logits."""

    def __init__(self, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, head: _Head) -> None:
        self.hidden_TH = torch.zeros_like(hidden_TH)
        self.weight_VH, self.head = weight_VH, head
        dtype = _float(weight_VH)
        self.in_main_grad = (
            weight_VH.requires_grad
            and head.into_main_grad
            and hasattr(weight_VH, "main_grad")
            and weight_VH.main_grad.dtype == dtype
        )
        self.total_VH: torch.Tensor | None = None
        if weight_VH.requires_grad:
            self.total_VH = (
                weight_VH.main_grad
                if self.in_main_grad
                else torch.zeros_like(weight_VH, dtype=dtype, requires_grad=False)
            )
        self.workspace_CV: torch.Tensor | None = None

    def add(
        self,
        chunk: _Chunk,
        lse_C: torch.Tensor,
        entropy_C: torch.Tensor,
        grad_logprobs_C: torch.Tensor | None,
        grad_entropy_C: torch.Tensor | None,
    ) -> None:
        """Add a chunk's gradients by two matrix products; the chunk's logits are overwritten."""
        grad_z_CV = self._space_for(chunk.z_CV)
        if grad_logprobs_C is None:
            grad_logprobs_C = torch.zeros_like(lse_C)
        row_operations(chunk.z_CV.device).row_gradient(
            chunk.z_CV,
            chunk.target_C,
            chunk.temperature,
            lse_C,
            entropy_C,
            grad_logprobs_C,
            grad_entropy_C,
            grad_z_CV,
        )
        columns = self.head.columns
        grad_CH = product(grad_z_CV, self.weight_VH[:columns])
        self.hidden_TH.index_copy_(0, chunk.rows_C, grad_CH.to(self.hidden_TH.dtype))
        if self.total_VH is not None:
            add_product(self.total_VH[:columns], grad_z_CV.t(), chunk.hidden_CH)

    def finish_weight(self) -> torch.Tensor | None:
        """Return the weight's gradient for autograd: None if it is in `main_grad`, or frozen.

        Megatron's hook then adds nothing more, unless `zero_out_wgrad` marks the parameter as an
        embedding of the same stage as well: the hook then adds only the embedding's gradient.
        """
        if not self.in_main_grad:
            return None if self.total_VH is None else self.total_VH.to(self.weight_VH.dtype)
        if hasattr(self.weight_VH, "grad_added_to_main_grad"):
            self.weight_VH.grad_added_to_main_grad = True
        return None

    def _space_for(self, z_CV: torch.Tensor) -> torch.Tensor:
        if z_CV.dtype == self.weight_VH.dtype:
            return z_CV
        if self.workspace_CV is None or len(self.workspace_CV) < len(z_CV):
            self.workspace_CV = torch.empty_like(z_CV, dtype=self.weight_VH.dtype)
        return self.workspace_CV[: len(z_CV)]


def equal_chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Return as few chunks of at most `chunk_tokens` tokens as possible, of nearly equal size.

    Matrix products of very few rows are slow, and on a CPU also have larger rounding errors.
    Chunks of `ALIGNMENT` tokens and more are multiples of it, except for the last.  Zero tokens
    make one chunk.

    >>> equal_chunks(7, 3)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
    >>> equal_chunks(1100, 1024), equal_chunks(0, 4)
    ([slice(0, 512, None), slice(512, 1100, None)], [slice(0, 0, None)])
    """
    unit = ALIGNMENT if chunk_tokens >= ALIGNMENT else 1
    num_chunks = max(1, -(-num_tokens // (chunk_tokens - chunk_tokens % unit)))
    num_units = -(-num_tokens // unit)
    cuts = [min(num_tokens, unit * (num_units * n // num_chunks)) for n in range(num_chunks + 1)]
    return [slice(*cut) for cut in pairwise(cuts)]


def _gather(stats_4T: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Gather statistics [ranks, 4, T]: the only collective, once per call.

    In `vocab_parallel_loss` it is once per chunk.
    """
    if group is None or group.size() == 1:
        return stats_4T[None]
    stats_R4T = stats_4T.new_empty(group.size(), *stats_4T.shape)
    dist.all_gather(list(stats_R4T), stats_4T.contiguous(), group=group)
    return stats_R4T


def _merge(stats_R4T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-sum-exp, entropy and the target's log-probability over all ranks' columns."""
    max_RT, sum_RT, weighted_RT, target_RT = stats_R4T.unbind(1)
    max_T = max_RT.amax(dim=0)
    nothing_RT = max_RT == -torch.inf
    shift_RT = torch.where(nothing_RT, 0, max_RT - max_T)
    scale_RT = torch.where(nothing_RT, 0, shift_RT.exp())
    sum_T = (scale_RT * sum_RT).sum(dim=0)
    weighted_T = (scale_RT * (weighted_RT + shift_RT * sum_RT)).sum(dim=0)
    log_sum_T = sum_T.log()
    logprobs_T = (target_RT.amax(dim=0) - max_T) - log_sum_T  # in this order nothing cancels
    return max_T + log_sum_T, log_sum_T - weighted_T / sum_T, logprobs_T


def _float(like: torch.Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
