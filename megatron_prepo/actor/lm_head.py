"""Exact token log-probability and full-vocabulary entropy from hidden states and a sharded head.

For a token with logits z = W h / temperature over the whole vocabulary of V entries,

    logp = z_target - lse,   H = -sum_v p_v ln p_v,   p = softmax(z),   lse = ln sum_v e^(z_v),

each tensor-parallel rank holding the rows of W for its part of the vocabulary.  Three things make
it exact and small: the logits of `chunk_tokens` tokens exist at a time and never leave float32; a
rank condenses its columns to four numbers a token (max m, sum e^(z-m), sum (z-m)e^(z-m), z_target),
which an all-gather exchanges and every rank merges in the same order; and entropy is taken in
shifted form, ln S - T/S, which does not cancel.  Backward needs no statistics from other ranks:

    dlogp/dz_v = 1[v = target] - p_v,      dH/dz_v = -p_v (ln p_v + H).

`vocab_parallel_logprobs_and_entropy` computes the logits again in backward: 4 matrix products in
all, for any gradient that may arrive.  `vocab_parallel_loss` is told the loss, and so knows the
gradient while it still has the logits: 3 products.  docs/head.md derives and measures both.

Letters: T tokens, R scored ones among them, C tokens of a chunk, H hidden, V this rank's rows of W.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_prepo.actor import lm_head_torch as row_statistics
from megatron_prepo.models.fp32_matmul import add_product, product

IGNORE = -100
"""A target that says: leave this token out."""
HEAD_MEMORY_MIB = {"cuda": 900.0, "cpu": 16.0}
"""For a chunk's logits: a GPU's matrix products want 1,000 rows, a CPU's cache holds few."""
ALIGNMENT = 128
"""Chunks of more tokens than this are a multiple of it: matrix products like whole tiles."""


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
    """`logprobs_T` and `entropy_T`, float32 (float64 for float64 inputs), in nats.

    `hidden_TH`: the last hidden states, the same on every rank of `group`.
    `weight_VH`: this rank's rows of the output embedding; rank r holds rows r*V ... (r+1)*V - 1.
    `targets_T`: token ids; `IGNORE` gives 0 and 0 with zero gradient, and the token's hidden state
    is never looked at.
    `vocab_size`: rows from there on are padding, and take no part.
    `temperature`: one number, or one a token.
    `group`: the tensor-parallel group; None means that this rank holds the whole vocabulary.
    `chunk_tokens`: see `chunk_tokens_within`.
    `fp32_logits`: False rounds the logits to the type of the weights, as an engine may do.
    `into_main_grad`: add the weight's gradient to `weight_VH.main_grad`, where it has one in
    float32, and return none for it; the parameter's `grad_added_to_main_grad` is then set, as
    Megatron's own linear layer does.  Otherwise it is accumulated in float32, and returned.

    The gradient of `hidden_TH` is this rank's part only: the region that the hidden states came
    through must add the parts up once (`copy_to_tensor_model_parallel_region`, or
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


LossOf = Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""`loss_of(logprobs_C, entropy_C, scored)`: the loss of some tokens, and further sums over them.

`scored` says which of the scored tokens these are.  Losses and sums of disjoint tokens add up.
"""


def vocab_parallel_loss(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    loss_of: LossOf,
    *,
    vocab_size: int,
    temperature: float | torch.Tensor = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    fp32_logits: bool = True,
    into_main_grad: bool = True,
    loss_scale: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss that `loss_of` makes of the scored tokens, and the sums that it returns with it.

    Values and gradients are those of `loss_of` on what `vocab_parallel_logprobs_and_entropy`
    returns for the targets that are not `IGNORE`, in their order; `loss_of` sees a chunk of them at
    a time, on every rank of `group` the same, bit for bit.  All other arguments are as there.

    The gradients are computed here, in forward, where the logits still exist.

    `loss_scale`: the gradient that will arrive at the loss in backward.  It has to be known where
    the weight's gradient goes into `main_grad`, which cannot be scaled afterwards: another one
    then raises RuntimeError (without waiting for the device: on CUDA it is a device-side
    assertion), and so does a second backward.  Otherwise any gradient may arrive.
    """
    head = _Head.of(weight_VH, targets_T, vocab_size, temperature, group, chunk_tokens)
    head = replace(head, fp32_logits=fp32_logits, into_main_grad=into_main_grad)
    return _Loss.apply(hidden_TH, weight_VH, head, loss_of, loss_scale, torch.is_grad_enabled())


def chunk_tokens_within(memory_mib: float | None, weight_VH: torch.Tensor) -> int:
    """Tokens of a chunk whose float32 logits, and their gradient in the weight's type, fit.

    Float32 logits give their memory to their gradient.  At least 1, and a multiple of `ALIGNMENT`
    where that many fit; the same on every tensor-parallel rank.  None is the device's
    `HEAD_MEMORY_MIB`.

    >>> chunk_tokens_within(900, torch.empty(152064, 1, dtype=torch.bfloat16))
    1024
    """
    if memory_mib is None:
        memory_mib = HEAD_MEMORY_MIB[weight_VH.device.type]
    size = weight_VH.element_size()
    bytes_per_token = weight_VH.shape[0] * (4 + size if size < 4 else size)
    tokens = int(memory_mib * 2**20) // bytes_per_token
    return max(1, tokens if tokens < ALIGNMENT else tokens - tokens % ALIGNMENT)


def row_operations(device: torch.device):
    """The module with the two row operations for this device: `row_kernels` or `row_statistics`."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from megatron_prepo.actor import lm_head_triton as row_kernels

        return row_kernels
    return row_statistics


@dataclass(frozen=True)
class _Chunk:
    """Some of the scored tokens, with their logits before division by the temperature."""

    scored: slice
    rows_C: torch.Tensor
    hidden_CH: torch.Tensor
    z_CV: torch.Tensor
    target_C: torch.Tensor
    temperature: float | torch.Tensor


@dataclass(frozen=True)
class _Head:
    """This rank's part of the output layer, and the tokens that it is to score."""

    rows_R: torch.Tensor
    """Where the scored tokens are among the hidden states."""
    target_R: torch.Tensor
    """Their targets, counted from this rank's first column."""
    temperature: float | torch.Tensor
    columns: int
    """Rows of this rank's weight that are no padding."""
    group: dist.ProcessGroup | None
    chunk_tokens: int
    fp32_logits: bool = True
    into_main_grad: bool = True

    @classmethod
    def of(cls, weight_VH, targets_T, vocab_size, temperature, group, chunk_tokens) -> "_Head":
        # waits for the device, once a call: the number of scored tokens is the size of what follows
        rows_R = (targets_T != IGNORE).nonzero().squeeze(1)
        first = weight_VH.shape[0] * (0 if group is None else group.rank())
        if torch.is_tensor(temperature):
            temperature = temperature[rows_R].to(_float(weight_VH))
        columns = max(0, min(weight_VH.shape[0], vocab_size - first))
        return cls(rows_R, targets_T[rows_R] - first, temperature, columns, group, chunk_tokens)

    def only(self, keep_K: torch.Tensor) -> "_Head":
        """The same for some of the scored tokens."""
        per_row = torch.is_tensor(self.temperature)
        return replace(
            self,
            rows_R=self.rows_R[keep_K],
            target_R=self.target_R[keep_K],
            temperature=self.temperature[keep_K] if per_row else self.temperature,
        )

    def chunks(self, hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> Iterator[_Chunk]:
        """Chunk after chunk; their logits share a workspace, so that one is to be done first."""
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
            per_row = torch.is_tensor(self.temperature)
            temperature = self.temperature[chunk] if per_row else self.temperature
            yield _Chunk(chunk, rows_C, hidden_CH, z_CV, self.target_R[chunk], temperature)


class _LogprobsAndEntropy(torch.autograd.Function):
    """The logits are computed again in backward."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, head):
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
    def backward(ctx, grad_logprobs_R, grad_entropy_R):
        hidden_TH, weight_VH, lse_R, entropy_R = ctx.saved_tensors
        if grad_logprobs_R is None:
            grad_logprobs_R = torch.zeros_like(lse_R)
        # Tokens without a gradient (clipped ones, say) need no product.  Their number waits for the
        # device, once a call: less than the products of one chunk.
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
        return gradients.hidden_TH, gradients.of_weight(), None


class _Loss(torch.autograd.Function):
    """The gradient of the loss is known in forward: the logits are computed once."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, head, loss_of, loss_scale, with_gradient):
        rows = row_operations(hidden_TH.device)
        gradients = _Gradients(hidden_TH, weight_VH, head) if with_gradient else None
        losses, sums = [], []
        for chunk in head.chunks(hidden_TH, weight_VH):
            stats_4C = rows.row_statistics(chunk.z_CV, chunk.target_C, chunk.temperature)
            lse_C, entropy_C, logprobs_C = _merge(_gather(stats_4C, head.group))
            with torch.set_grad_enabled(with_gradient):
                values = [v.detach().requires_grad_(with_gradient) for v in (logprobs_C, entropy_C)]
                loss, chunk_sums = loss_of(*values, chunk.scored)
            losses.append(loss.detach())
            sums.append({name: value.detach() for name, value in chunk_sums.items()})
            if with_gradient:
                arriving = torch.full_like(loss, loss_scale)
                grads = torch.autograd.grad(loss, values, arriving, allow_unused=True)
                gradients.add(chunk, lse_C, entropy_C, *grads)
        if with_gradient:
            grad_weight_VH = gradients.of_weight()
            ctx.in_main_grad = grad_weight_VH is None
            ctx.save_for_backward(gradients.hidden_TH, grad_weight_VH)
            ctx.loss_scale, ctx.used = loss_scale, False
        return sum(losses), {name: sum(part[name] for part in sums) for name in sums[0]}

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        grad_hidden_TH, grad_weight_VH = ctx.saved_tensors
        if not ctx.in_main_grad:
            factor = grad_loss / ctx.loss_scale
            return grad_hidden_TH * factor, grad_weight_VH * factor, None, None, None, None
        if ctx.used:
            raise RuntimeError("vocab_parallel_loss: the weight's gradient is in main_grad already")
        ctx.used = True
        # (1 / M) M of Megatron's schedule and its caller is 1 to rounding only
        torch._assert_async(
            (grad_loss - ctx.loss_scale).abs() <= 1e-6 * abs(ctx.loss_scale),
            f"vocab_parallel_loss: main_grad was given the gradient for loss_scale={ctx.loss_scale}"
            ", but another gradient arrived at the loss",
        )
        return grad_hidden_TH, None, None, None, None, None


class _Gradients:
    """Gradients of hidden states and weight, from the gradients of chunks of logits."""

    def __init__(self, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, head: _Head):
        self.hidden_TH = torch.zeros_like(hidden_TH)
        self.weight_VH, self.head = weight_VH, head
        dtype = _float(weight_VH)
        self.in_main_grad = (
            head.into_main_grad
            and hasattr(weight_VH, "main_grad")
            and weight_VH.main_grad.dtype == dtype
        )
        self.total_VH = (
            weight_VH.main_grad
            if self.in_main_grad
            else torch.zeros_like(weight_VH, dtype=dtype, requires_grad=False)
        )
        self.workspace_CV: torch.Tensor | None = None

    def add(self, chunk: _Chunk, lse_C, entropy_C, grad_logprobs_C, grad_entropy_C) -> None:
        """Two matrix products; the chunk's logits are overwritten."""
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
        add_product(self.total_VH[:columns], grad_z_CV.t(), chunk.hidden_CH)

    def of_weight(self) -> torch.Tensor | None:
        """What autograd is to get for the weight: nothing if it is in `main_grad`.

        Megatron's hook then adds nothing more, unless `zero_out_wgrad` tells it that the parameter
        is an embedding of the same stage as well: what that one gives is then all that it sees.
        """
        if not self.in_main_grad:
            return self.total_VH.to(self.weight_VH.dtype)
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
    """As few chunks of at most `chunk_tokens` tokens as will do, as equal as possible.

    Matrix products of very few rows are slow, and on a CPU also rounded worse.  Chunks of
    `ALIGNMENT` tokens and more are multiples of it, but for the last.  No token makes one chunk.

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


def _gather(stats_4T: torch.Tensor, group) -> torch.Tensor:
    """[ranks, 4, T]: the only collective, once a call (of `vocab_parallel_loss`: once a chunk)."""
    if group is None or group.size() == 1:
        return stats_4T[None]
    stats_R4T = stats_4T.new_empty(group.size(), *stats_4T.shape)
    dist.all_gather(list(stats_R4T), stats_4T.contiguous(), group=group)
    return stats_R4T


def _merge(stats_R4T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-sum-exp, entropy and the target's log-probability over all ranks' columns."""
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
