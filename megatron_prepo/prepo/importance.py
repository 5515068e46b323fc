"""How far the engine's probabilities are from the actor's, and the loss's correction for it.

    r_t = p_actor(y_t) / p_engine(y_t)          before the update, at the sampling temperature

Rollouts come from the engine, so the actor's expectations are the engine's weighted by the ratio:
of the token (`token_ratios`, which overlooks that the text before it is the engine's, too) or of
the rollout (`sequence_ratios`: exact, with a variance that grows with the length).  What is then
used of the ratio is `truncated` (Ionides 2008) or `masked`.  Neither touches a normaliser.
"""

import math
from collections.abc import Sequence

import torch

from megatron_prepo.config import LossConfig
from megatron_prepo.prepo.loss import k3
from megatron_prepo.trainer.step_metrics import quantiles

OFF_BY = (0.01, 0.1, 1.0)
"""Differences, in nats, whose share of tokens is a metric."""


def token_ratios(old_logprobs_T: torch.Tensor, engine_logprobs_T: torch.Tensor) -> torch.Tensor:
    """r_t, float64."""
    return (old_logprobs_T.double() - engine_logprobs_T.double()).exp()


def sequence_ratios(old_logprobs_T: torch.Tensor, engine_logprobs_T: torch.Tensor) -> torch.Tensor:
    """The product of all r_t of one rollout, at each of its tokens, float64."""
    log_ratio = (old_logprobs_T.double() - engine_logprobs_T.double()).sum()
    return log_ratio.exp().expand(len(old_logprobs_T))


def truncated(ratio_T: torch.Tensor, high: float) -> torch.Tensor:
    """min(r, high): biased, but never far from any token's share.

    >>> truncated(torch.tensor([0.25, 1.0, 3.0]), 2.0).tolist()
    [0.25, 1.0, 2.0]
    """
    return ratio_T.clamp(max=high)


def masked(ratio_T: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """r where low <= r <= high, and 0 elsewhere: what the engine got wrong is not learnt from.

    >>> masked(torch.tensor([0.25, 1.0, 3.0]), 0.5, 2.0).tolist()
    [0.0, 1.0, 0.0]
    """
    inside_T = (low <= ratio_T) & (ratio_T <= high)
    return torch.where(inside_T, ratio_T, torch.zeros_like(ratio_T))


RATIOS = {"token": token_ratios, "sequence": sequence_ratios}
"""By `loss.importance_level`."""


def importance(
    settings: LossConfig, old_logprobs_T: torch.Tensor, engine_logprobs_T: torch.Tensor
) -> torch.Tensor:
    """What each token of one rollout counts in the loss; `loss.importance` is not off."""
    ratio_T = RATIOS[settings.importance_level](old_logprobs_T, engine_logprobs_T)
    if settings.importance == "truncated":
        return truncated(ratio_T, settings.importance_high).float()
    return masked(ratio_T, settings.importance_low, settings.importance_high).float()


def mismatch_metrics(
    old_logprobs_N: Sequence[torch.Tensor], engine_logprobs_N: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Of N rollouts: differences of tokens, log ratios of rollouts, and what correcting would cost.

    The effective sample size is a share: 1 where all ratios are equal, 1 / N where one is all.
    """
    difference_T = (torch.cat([*engine_logprobs_N]) - torch.cat([*old_logprobs_N])).double()
    lengths = [len(old_T) for old_T in old_logprobs_N]
    log_ratio_N = torch.stack([-part_T.sum() for part_T in difference_T.split(lengths)])
    return {
        "mismatch/kl": float(k3(difference_T).mean()),
        "mismatch/logprob_abs_mean": float(difference_T.abs().mean()),
        **{
            f"mismatch/logprob_abs_{name}": nearest_rank(difference_T.abs(), q)
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
    """Of all tokens of a step: the mean, and how many were truncated or left out."""
    changed_T = importance_T == 0
    if settings.importance == "truncated":
        changed_T = importance_T >= settings.importance_high
    return {
        "importance/mean": float(importance_T.double().mean()),
        f"importance/{settings.importance}_share": float(changed_T.double().mean()),
    }


def effective_share(log_ratio_N: torch.Tensor) -> float:
    """Kish's effective sample size over the number of samples: (sum r)^2 / (N sum r^2).

    >>> effective_share(torch.tensor([0.0, 0.0, -math.inf, -math.inf]))
    0.5
    """
    ratio_N = (log_ratio_N.double() - log_ratio_N.max()).exp()
    return float(ratio_N.sum() ** 2 / (len(ratio_N) * (ratio_N**2).sum()))


def nearest_rank(values_T: torch.Tensor, q: float) -> float:
    """A quantile, of more values than `torch.quantile` takes."""
    return float(values_T.kthvalue(max(1, math.ceil(q * len(values_T)))).values)
