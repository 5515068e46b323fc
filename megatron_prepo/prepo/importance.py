"""How far the engine's probabilities are from the actor's, and the loss's correction for it.

    r_t = p_actor(y_t) / p_engine(y_t)          before the update, at the sampling temperature

Rollouts come from the engine, so the actor's expectations are the engine's weighted by the ratio:
of the token (`token_ratios`, which overlooks that the text before it is the engine's, too) or of
the rollout (`sequence_ratios`: exact, with a variance that grows with the length).  What is then
used of the ratio is `truncated` (Ionides 2008) or `masked`.  Neither touches a normaliser.
"""

import torch


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
    """R where low <= r <= high, and 0 elsewhere: what the engine got wrong is not learnt from.

    >>> masked(torch.tensor([0.25, 1.0, 3.0]), 0.5, 2.0).tolist()
    [0.0, 1.0, 0.0]
    """
    inside_T = (low <= ratio_T) & (ratio_T <= high)
    return torch.where(inside_T, ratio_T, torch.zeros_like(ratio_T))


RATIOS = {"token": token_ratios, "sequence": sequence_ratios}
"""By `loss.importance_level`."""


def importance_weights(
    old_logprobs_T: torch.Tensor,
    engine_logprobs_T: torch.Tensor,
    *,
    method: str,
    level: str,
    low: float,
    high: float,
) -> torch.Tensor:
    """Return what each token of one rollout counts in the loss, float32.

    `method`: `truncated` or `masked`; `level`: a key of RATIOS; `low` is for `masked` only.
    """
    ratio_T = RATIOS[level](old_logprobs_T, engine_logprobs_T)
    if method == "truncated":
        return truncated(ratio_T, high).float()
    assert method == "masked", f"unknown method {method!r}"
    return masked(ratio_T, low, high).float()
