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

Letters: T tokens, R scored ones among them, C tokens per chunk, H hidden, V rows of W of this rank,
S rows of W per slab.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_prepo.actor import lm_head_torch
from megatron_prepo.models.fp32_matmul import add_product, product

IGNORE = -100
"""Target of tokens that are not scored."""
HEAD_MEMORY_MIB = {"cuda": 640.0, "cpu": 16.0}
"""Memory for a chunk's logits: matrix products on a GPU need about 1,000 rows to be efficient, the
cache of a CPU holds only a few."""
ALIGNMENT = 128
"""Divisor of the size of larger chunks and slabs: matrix products prefer full tiles."""


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
    `chunk_tokens`: see `chunk_tokens_within`; for a gradient, blocks within the same memory.
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
    with_gradient = torch.is_grad_enabled()
    logprobs_R, entropy_R = _LogprobsAndEntropy.apply(hidden_TH, weight_VH, head, with_gradient)
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
    """Return the tokens per chunk whose float32 logits fit; their gradient takes their place.

    At least 1, and a multiple of `ALIGNMENT` if at least that many fit; the same on every
    tensor-parallel rank.  None means the device's `HEAD_MEMORY_MIB`.

    >>> chunk_tokens_within(640, torch.empty(152064, 1, dtype=torch.bfloat16))
    1024
    """
    if memory_mib is None:
        memory_mib = HEAD_MEMORY_MIB[weight_VH.device.type]
    bytes_per_token: int = weight_VH.shape[0] * _float(weight_VH).itemsize
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
    """A range of the scored tokens."""

    scored: slice
    rows_C: torch.Tensor
    hidden_CH: torch.Tensor
    target_C: torch.Tensor
    temperature: float | torch.Tensor


class _Block(NamedTuple):
    """A chunk's logits of a range of columns, before division by the temperature."""

    slab: slice
    z_CS: torch.Tensor


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

    def chunks(
        self,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        chunks: list[slice],
        slabs: list[slice],
    ) -> Iterator[tuple[_Chunk, Iterator[_Block]]]:
        """Yield chunks with their blocks; these share a workspace, so finish one before the next.

        `chunks` and `slabs` are ranges of the scored tokens and of the columns.
        """
        workspace = weight_VH.new_empty(_longest(chunks) * _longest(slabs), dtype=_float(weight_VH))
        for scored in chunks:
            rows_C = self.rows_R[scored]
            hidden_CH = hidden_TH.index_select(0, rows_C)
            target_C, temperature = self.target_R[scored], self._temperature(scored)
            chunk = _Chunk(scored, rows_C, hidden_CH, target_C, temperature)
            yield chunk, (_Block(s, self._logits(chunk, weight_VH[s], workspace)) for s in slabs)

    def _logits(
        self, chunk: _Chunk, rows_SH: torch.Tensor, workspace: torch.Tensor
    ) -> torch.Tensor:
        size = len(chunk.rows_C), len(rows_SH)
        z_CS = workspace[: math.prod(size)].view(size)
        if self.fp32_logits:
            return product(chunk.hidden_CH, rows_SH.t(), out=z_CS)
        return z_CS.copy_(chunk.hidden_CH @ rows_SH.t())

    def complete_rows(self) -> tuple[list[slice], list[slice]]:
        """Return chunks of tokens, and all columns as one slab."""
        return equal_chunks(len(self.rows_R), self.chunk_tokens), [slice(0, self.columns)]

    def fewest_bytes(self, weight_VH: torch.Tensor) -> tuple[list[slice], list[slice]]:
        """Return chunks and slabs of the blocks by which gradients move the fewest bytes.

        Each slab reads and writes the gradient of all hidden states, and each chunk that of the
        weight: in blocks of C tokens and S columns, H V R (1 / S + 1 / C) numbers.  The memory of
        `chunk_tokens` rows of logits, E numbers, holds a block, and a chunk's hidden states and
        their gradient, e numbers per token: C (S + e) = E.  The sum is least at S = sqrt(E).
        """
        numbers, hidden = self.chunk_tokens * len(weight_VH), weight_VH.shape[1]
        per_token = hidden + hidden * weight_VH.element_size() // _float(weight_VH).itemsize
        columns = min(len(weight_VH), math.isqrt(numbers))
        chunks = equal_chunks(len(self.rows_R), max(1, numbers // (columns + per_token)))
        columns = max(1, numbers // max(1, _longest(chunks)) - per_token)
        return chunks, equal_chunks(self.columns, columns)


class _LogprobsAndEntropy(torch.autograd.Function):
    """Log-probabilities and entropies; the logits are recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        head: _Head,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # in backward a product of the same shape rounds the logits as here, if it has all tokens
        again = with_gradient and any(ctx.needs_input_grad)
        blocks = head.fewest_bytes(weight_VH) if again else head.complete_rows()
        stats = [
            _combine(torch.stack([_statistics(chunk, block) for block in of_chunk]))
            for chunk, of_chunk in head.chunks(hidden_TH, weight_VH, *blocks)
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
        for chunk, blocks in head.chunks(hidden_TH, weight_VH, *head.fewest_bytes(weight_VH)):
            values = (None if v is None else v[chunk.scored] for v in per_token)
            gradients.add(chunk, blocks, *values)
        return gradients.hidden_TH, gradients.finish_weight(), None, None


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
        gradients = _Gradients(hidden_TH, weight_VH, head) if with_gradient else None
        losses, sums = [], []
        for chunk, blocks in head.chunks(hidden_TH, weight_VH, *head.complete_rows()):
            [block] = blocks
            stats_4C = _statistics(chunk, block)
            lse_C, entropy_C, logprobs_C = _merge(_gather(stats_4C, head.group))
            with torch.set_grad_enabled(with_gradient):
                values = [v.detach().requires_grad_(with_gradient) for v in (logprobs_C, entropy_C)]
                loss, chunk_sums = token_loss(values[0], values[1], chunk.scored)
            losses.append(loss.detach())
            sums.append({name: value.detach() for name, value in chunk_sums.items()})
            if gradients is not None:
                arriving = torch.full_like(loss, loss_scale)
                grads = torch.autograd.grad(loss, values, arriving, allow_unused=True)
                gradients.add(chunk, [block], lse_C, entropy_C, *grads)
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

    def add(
        self,
        chunk: _Chunk,
        blocks: Iterable[_Block],
        lse_C: torch.Tensor,
        entropy_C: torch.Tensor,
        grad_logprobs_C: torch.Tensor | None,
        grad_entropy_C: torch.Tensor | None,
    ) -> None:
        """Add a chunk's gradients by two matrix products per block, whose logits are overwritten.

        The gradient of the hidden states is added up over blocks before it is rounded.
        """
        if grad_logprobs_C is None:
            grad_logprobs_C = torch.zeros_like(lse_C)
        grad_CH = torch.zeros_like(chunk.hidden_CH, dtype=lse_C.dtype)
        for slab, z_CS in blocks:
            grad_z_CS = in_place(z_CS, self.weight_VH.dtype)
            row_operations(z_CS.device).row_gradient(
                z_CS,
                chunk.target_C - slab.start,
                chunk.temperature,
                lse_C,
                entropy_C,
                grad_logprobs_C,
                grad_entropy_C,
                grad_z_CS,
            )
            add_product(grad_CH, grad_z_CS, self.weight_VH[slab])
            if self.total_VH is not None:
                add_product(self.total_VH[slab], grad_z_CS.t(), chunk.hidden_CH)
        self.hidden_TH.index_copy_(0, chunk.rows_C, grad_CH.to(self.hidden_TH.dtype))

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


def in_place(z_CS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the memory of logits as a tensor of a type of at most their size.

    Row c of it lies in row c of the logits: column v of 2 bytes in the place of column v // 2.
    """
    return z_CS.view(dtype)[:, : z_CS.shape[1]]


def equal_chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Return as few chunks of at most `chunk_tokens` tokens as possible, of nearly equal size.

    Matrix products of very few rows are slow, and on a CPU also have larger rounding errors.
    Slabs of columns are made in the same way.  Chunks of `ALIGNMENT` tokens and more are multiples
    of it, except for the last.  Zero tokens make one chunk.

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


def _statistics(chunk: _Chunk, block: _Block) -> torch.Tensor:
    """Return statistics [4, C] of a block."""
    rows = row_operations(block.z_CS.device)
    stats_4C: torch.Tensor = rows.row_statistics(
        block.z_CS, chunk.target_C - block.slab.start, chunk.temperature
    )
    return stats_4C


def _gather(stats_4T: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Gather statistics [ranks, 4, T]: the only collective, once per call.

    In `vocab_parallel_loss` it is once per chunk.
    """
    if group is None or group.size() == 1:
        return stats_4T[None]
    stats_R4T = stats_4T.new_empty(group.size(), *stats_4T.shape)
    dist.all_gather(list(stats_R4T), stats_4T.contiguous(), group=group)
    return stats_R4T


def _combine(stats_R4T: torch.Tensor) -> torch.Tensor:
    """Return statistics [4, T] of all columns from those of R parts, slabs or ranks."""
    max_RT, sum_RT, weighted_RT, target_RT = stats_R4T.unbind(1)
    max_T = max_RT.amax(dim=0)
    nothing_RT = max_RT == -torch.inf
    shift_RT = torch.where(nothing_RT, 0, max_RT - max_T)
    scale_RT = torch.where(nothing_RT, 0, shift_RT.exp())
    sum_T = (scale_RT * sum_RT).sum(dim=0)
    weighted_T = (scale_RT * (weighted_RT + shift_RT * sum_RT)).sum(dim=0)
    return torch.stack([max_T, sum_T, weighted_T, target_RT.amax(dim=0)])


def _merge(stats_R4T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-sum-exp, entropy and the target's log-probability over all ranks' columns."""
    max_T, sum_T, weighted_T, target_T = _combine(stats_R4T)
    log_sum_T = sum_T.log()
    logprobs_T = (target_T - max_T) - log_sum_T  # in this order nothing cancels
    return max_T + log_sum_T, log_sum_T - weighted_T / sum_T, logprobs_T


def _float(like: torch.Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _longest(ranges: list[slice]) -> int:
    longest: int = max(part.stop - part.start for part in ranges)
    return longest
