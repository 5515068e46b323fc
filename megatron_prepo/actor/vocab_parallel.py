"""Exact token log-probability and full-vocabulary entropy from hidden states and a sharded head.

For a token with logits z = W h / temperature over the whole vocabulary of V entries,

    logp = z_target - lse,   H = -sum_v p_v ln p_v,   p = softmax(z),   lse = ln sum_v e^(z_v),

each tensor-parallel rank holding the rows of W for its part of the vocabulary.  Three things make
it exact and small: the logits of `chunk_tokens` tokens exist at a time and never leave float32, in
backward they are computed again; a rank condenses its columns to four numbers a token
(max m, sum e^(z-m), sum (z-m)e^(z-m), z_target), which one all-gather exchanges and every rank
merges in the same order; and entropy is taken in shifted form, ln S - T/S, which does not cancel.
Backward needs no statistics from other ranks:

    dlogp/dz_v = 1[v = target] - p_v,      dH/dz_v = -p_v (ln p_v + H).

Letters: T tokens, C tokens of a chunk, H hidden, V this rank's vocabulary rows.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

IGNORE = -100
"""A target that says: leave this token out."""


def vocab_parallel_logprobs_and_entropy(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float | torch.Tensor = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logprobs_T` and `entropy_T`, float32 (float64 for float64 inputs), in nats.

    `hidden_TH`: the last hidden states, the same on every rank of `group`.
    `weight_VH`: this rank's rows of the output embedding; rank r holds rows r*V ... (r+1)*V - 1.
    `targets_T`: token ids; `IGNORE` gives 0 and 0 with zero gradient, and the token's hidden state
    is never looked at.
    `vocab_size`: rows from there on are padding, and take no part.
    `temperature`: one number, or one a token.
    `group`: the tensor-parallel group; None means that this rank holds the whole vocabulary.

    The gradient of `hidden_TH` is this rank's part only: the region that the hidden states came
    through must add the parts up once (`copy_to_tensor_model_parallel_region`, or
    `gather_from_sequence_parallel_region` with `tensor_parallel_output_grad=True`).  The weight's
    gradient is complete, accumulated over chunks in float32.

    A target outside the vocabulary gives -inf, never a plausible number.
    """
    rows = (targets_T != IGNORE).nonzero().squeeze(1)
    if torch.is_tensor(temperature):
        temperature = temperature[rows, None]
    logprobs_R, entropy_R = _LogprobsAndEntropy.apply(
        hidden_TH[rows],
        weight_VH,
        targets_T[rows],
        vocab_size,
        temperature,
        group,
        chunk_tokens,
    )
    zeros_T = logprobs_R.new_zeros(targets_T.shape)
    return zeros_T.index_copy(0, rows, logprobs_R), zeros_T.index_copy(0, rows, entropy_R)


class _LogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, targets_T, vocab_size, temperature, group, chunk_tokens):
        rank = 0 if group is None else group.rank()
        first = rank * weight_VH.shape[0]
        columns = max(0, min(weight_VH.shape[0], vocab_size - first))
        local_targets_T = targets_T - first
        stats = [
            _row_statistics(z_CV, target_C)
            for z_CV, target_C in _chunks(
                hidden_TH, weight_VH[:columns], temperature, chunk_tokens, local_targets_T
            )
        ]
        empty = hidden_TH.new_zeros(4, 0, dtype=_float(hidden_TH))
        stats_4T = torch.cat([empty, *stats], dim=1)
        lse_T, entropy_T, logprobs_T = _merge(_gather(stats_4T, group))
        ctx.save_for_backward(hidden_TH, weight_VH, local_targets_T, lse_T, entropy_T)
        ctx.columns, ctx.temperature, ctx.chunk_tokens = columns, temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs_T, grad_entropy_T):
        hidden_TH, weight_VH, local_targets_T, lse_T, entropy_T = ctx.saved_tensors
        rows_VH = weight_VH[: ctx.columns]
        grad_hidden_TH = torch.zeros_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=_float(weight_VH))
        first = 0
        for z_CV, target_C in _chunks(
            hidden_TH, rows_VH, ctx.temperature, ctx.chunk_tokens, local_targets_T
        ):
            chunk = slice(first, first + len(target_C))
            first = chunk.stop
            logp_CV = z_CV.sub_(lse_T[chunk, None])
            p_CV = logp_CV.exp()
            grad_z_CV = torch.zeros_like(p_CV)
            if grad_logprobs_T is not None:
                grad_C1 = grad_logprobs_T[chunk, None]
                grad_z_CV -= grad_C1 * p_CV
                hit_C = (target_C >= 0) & (target_C < ctx.columns)
                grad_z_CV[hit_C.nonzero().squeeze(1), target_C[hit_C]] += grad_C1[hit_C, 0]
            if grad_entropy_T is not None:
                # p ln p is 0 where p is 0, also at logits of -inf
                surprise_CV = torch.where(p_CV > 0, logp_CV, 0).add_(entropy_T[chunk, None])
                grad_z_CV -= grad_entropy_T[chunk, None] * p_CV * surprise_CV
            grad_z_CV /= _temperature_of(ctx.temperature, chunk)
            grad_z_CV = grad_z_CV.to(weight_VH.dtype)
            grad_hidden_TH[chunk] = grad_z_CV @ rows_VH
            grad_weight_VH[: ctx.columns] += _matmul(grad_z_CV.t(), hidden_TH[chunk])
        return grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None, None


def _chunks(hidden_TH, rows_VH, temperature, chunk_tokens, local_targets_T):
    """Logits and local targets of at most `chunk_tokens` tokens at a time.

    The chunks are of equal size: matrix products of very few rows are slow, and on a CPU also
    rounded worse.
    """
    num_chunks = -(-len(hidden_TH) // chunk_tokens)
    for number in range(num_chunks):
        bounds = (len(hidden_TH) * n // num_chunks for n in (number, number + 1))
        chunk = slice(*bounds)
        z_CV = _matmul(hidden_TH[chunk], rows_VH.t())
        yield z_CV.div_(_temperature_of(temperature, chunk)), local_targets_T[chunk]


def _temperature_of(temperature, chunk):
    return temperature[chunk] if torch.is_tensor(temperature) else temperature


def _row_statistics(z_CV: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
    """[4, C]: max, sum e^(z-max), sum (z-max) e^(z-max), and the target's logit or -inf."""
    num_columns = z_CV.shape[1]
    target_logit_C = z_CV.new_full((len(z_CV),), -torch.inf)
    if num_columns == 0:  # every row of this rank is vocabulary padding
        zero_C = torch.zeros_like(target_logit_C)
        return torch.stack([target_logit_C, zero_C, zero_C, target_logit_C])
    hit_C = (target_C >= 0) & (target_C < num_columns)
    at = hit_C.nonzero().squeeze(1)
    target_logit_C[at] = z_CV[at, target_C[at]]
    max_C = z_CV.amax(dim=1)
    shifted_CV = z_CV - torch.where(max_C.isinf(), 0, max_C)[:, None]
    exp_CV = shifted_CV.exp()
    # 0 * -inf is not a number: logits of -inf have no share in either sum
    weighted_CV = torch.where(exp_CV > 0, shifted_CV, 0) * exp_CV
    return torch.stack([max_C, exp_CV.sum(dim=1), weighted_CV.sum(dim=1), target_logit_C])


def _gather(stats_4T: torch.Tensor, group) -> torch.Tensor:
    """[ranks, 4, T]: the only collective of a forward call."""
    if group is None or group.size() == 1:
        return stats_4T[None]
    parts = [torch.empty_like(stats_4T) for _ in range(group.size())]
    dist.all_gather(parts, stats_4T.contiguous(), group=group)
    return torch.stack(parts)


def _merge(stats_R4T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-sum-exp, entropy and the target's log-probability over all ranks' columns."""
    max_RT, sum_RT, weighted_RT, target_RT = stats_R4T.unbind(1)
    max_T = max_RT.amax(dim=0)
    shift_RT = torch.where(max_RT.isinf(), 0, max_RT - max_T)
    scale_RT = torch.where(max_RT.isinf(), 0, shift_RT.exp())
    sum_T = (scale_RT * sum_RT).sum(dim=0)
    weighted_T = (scale_RT * (weighted_RT + shift_RT * sum_RT)).sum(dim=0)
    log_sum_T = sum_T.log()
    logprobs_T = (target_RT.amax(dim=0) - max_T) - log_sum_T  # in this order nothing cancels
    return max_T + log_sum_T, log_sum_T - weighted_T / sum_T, logprobs_T


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with float32 accumulation and a float32 result, at the speed of the inputs' type."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _float(like: torch.Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
