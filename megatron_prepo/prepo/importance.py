"""Importance weights that correct the loss for differences between engine and actor.

    r_t = p_actor(y_t) / p_engine(y_t)          before the update, at the sampling temperature

The engine samples the rollouts, so an expectation under the actor is one under the engine, weighted
by a ratio: that of the token (`token_ratios`, which ignores that the engine also sampled the text
before it) or that of the rollout (`sequence_ratios`: exact, with a variance that grows with the
length).  The ratio is then `truncated` (Ionides 2008) or `masked`.  Neither changes a normaliser.
"""

import torch


def token_ratios(old_logprobs_T: torch.Tensor, engine_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Return r_t of each token, float64."""
    return (old_logprobs_T.double() - engine_logprobs_T.double()).exp()


def sequence_ratios(old_logprobs_T: torch.Tensor, engine_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Return the product of r_t over a rollout, repeated for each of its tokens, float64."""
    log_ratio = (old_logprobs_T.double() - engine_logprobs_T.double()).sum()
    return log_ratio.exp().expand(len(old_logprobs_T))


def truncated(ratio_T: torch.Tensor, high: float) -> torch.Tensor:
    """Return min(r, high): biased, but with bounded weights.

    >>> truncated(torch.tensor([0.25, 1.0, 3.0]), 2.0).tolist()
    [0.25, 1.0, 2.0]
    """
    return ratio_T.clamp(max=high)


def masked(ratio_T: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return r where low <= r <= high, and 0 elsewhere, so that outliers have no gradient.

    >>> masked(torch.tensor([0.25, 1.0, 3.0]), 0.5, 2.0).tolist()
    [0.0, 1.0, 0.0]
    """
    inside_T = (low <= ratio_T) & (ratio_T <= high)
    return torch.where(inside_T, ratio_T, torch.zeros_like(ratio_T))


RATIOS = {"token": token_ratios, "sequence": sequence_ratios}
"""Functions by the value of `loss.importance_level`."""


def importance_weights(
    old_logprobs_T: torch.Tensor,
    engine_logprobs_T: torch.Tensor,
    *,
    method: str,
    level: str,
    low: float,
    high: float,
) -> torch.Tensor:
    """Return the weight in the loss of each token of one rollout, float32.

    `method`: `truncated` or `masked`; `level`: a key of RATIOS; `low` is
    used by `masked` only.
    """
    ratio_T = RATIOS[level](old_logprobs_T, engine_logprobs_T)
    if method == "truncated":
        return truncated(ratio_T, high).float()
    assert method == "masked", f"unknown method {method!r}"
    return masked(ratio_T, low, high).float()
