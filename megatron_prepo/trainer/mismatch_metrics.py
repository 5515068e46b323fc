"""Differences between the probabilities of engine and actor, and the effect of their correction."""

from collections.abc import Sequence

import torch

from megatron_prepo.config import LossConfig
from megatron_prepo.prepo.loss import k3
from megatron_prepo.prepo.statistics import effective_share, nearest_rank, quantiles

OFF_BY = (0.01, 0.1, 1.0)
"""Differences, in nats, whose share of tokens is a metric."""


def mismatch_metrics(
    old_logprobs_N: Sequence[torch.Tensor], engine_logprobs_N: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Return differences of tokens, log ratios of rollouts, and the cost of correcting for them.

    The effective sample size is a share: 1 if all ratios are equal, 1 / N if one dominates.
    """
    difference_T = (torch.cat([*engine_logprobs_N]) - torch.cat([*old_logprobs_N])).double()
    lengths = [len(old_T) for old_T in old_logprobs_N]
    log_ratio_N = torch.stack([-part_T.sum() for part_T in difference_T.split(lengths)])
    return {
        "mismatch/kl": float(k3(difference_T).mean()),
        "mismatch/logprob_abs/mean": float(difference_T.abs().mean()),
        **{
            f"mismatch/logprob_abs/{name}": nearest_rank(difference_T.abs(), q)
            for name, q in (("q50", 0.5), ("q90", 0.9), ("q99", 0.99), ("max", 1.0))
        },
        **{
            f"mismatch/share_off_by_{x:g}": float((difference_T.abs() > x).double().mean())
            for x in OFF_BY
        },
        "mismatch/token_ess": effective_share(-difference_T),
        "mismatch/sequence_ess": effective_share(log_ratio_N),
        **quantiles("mismatch/sequence_log_ratio", log_ratio_N),
    }


def importance_metrics(settings: LossConfig, importance_T: torch.Tensor) -> dict[str, float]:
    """Return the mean weight of a step's tokens, and the share that was truncated or masked."""
    changed_T = importance_T == 0
    if settings.importance == "truncated":
        changed_T = importance_T >= settings.importance_high
    return {
        "importance/mean": float(importance_T.double().mean()),
        f"importance/{settings.importance}_share": float(changed_T.double().mean()),
    }
