"""The PREPO policy loss (arXiv 2511.00794, equation of section 3.2; clip-higher from DAPO).

    L = - sum_i c_i sum_t min(s_it A_i, clip(s_it, 1 - eps_low, 1 + eps_high) A_i)

s_it is the ratio of the token's current probability to that before the update, A_i the
group-relative advantage, and c_i the coefficient from `rollout_coefficients`: the relative-entropy
weight w_i divided by the normaliser of the aggregation.  The coefficients contain all normalisers,
over the complete optimizer batch, so that the losses of micro-batches and data-parallel ranks are
added without further division.

`loss.policy` replaces the term after c_i by another objective.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossTerms:
    """Inputs of the loss for the T tokens of some rollouts, concatenated."""

    old_logprobs_T: torch.Tensor
    """Log-probabilities under the actor before the update."""
    advantage_T: torch.Tensor
    """Advantage of the token's rollout."""
    coefficient_T: torch.Tensor
    """Coefficient of the token's rollout."""
    importance_T: torch.Tensor | None = None
    """Importance weights, which correct for differences of engine and actor (`importance.py`)."""
    reference_logprobs_T: torch.Tensor | None = None
    """Log-probabilities under the initial policy, for the KL penalty."""

    def __getitem__(self, tokens: slice) -> "LossTerms":
        """Return the terms of a range of the tokens."""
        fields = vars(self).items()
        return LossTerms(**{name: None if v is None else v[tokens] for name, v in fields})


def rollout_coefficients(
    weight_N: torch.Tensor, lengths_N: torch.Tensor, aggregation: str
) -> torch.Tensor:
    """Return `coefficient_N`: weights divided by the normaliser, for an optimizer batch of M = N.

    - `seq-mean-token-sum`: w_i / M (as first published)
    - `seq-mean-token-mean`: w_i / (M |o_i|) (later versions)
    - `token-mean`: w_i / sum_j |o_j| (DAPO)

    >>> w, n = torch.tensor([1.0, 1.0]), torch.tensor([1, 3])
    >>> rollout_coefficients(w, n, "token-mean").tolist()
    [0.25, 0.25]
    """
    num_rollouts = weight_N.numel()
    if aggregation == "seq-mean-token-sum":
        return weight_N / num_rollouts
    if aggregation == "seq-mean-token-mean":
        return weight_N / (num_rollouts * lengths_N)
    assert aggregation == "token-mean", f"unknown aggregation {aggregation!r}"
    return weight_N / lengths_N.sum()


Objective = Callable[[torch.Tensor, LossTerms, float, float], tuple[torch.Tensor, torch.Tensor]]
"""Type of `objective(logprobs_T, terms, clip_low, clip_high)`.

It returns `objective_T`, which is maximised, and a mask of the tokens whose ratio is clipped.
"""


def clipped(
    logprobs_T: torch.Tensor, terms: LossTerms, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PPO's objective min(s A, clip(s) A), and where the clip is the smaller one."""
    ratio_T = (logprobs_T - terms.old_logprobs_T).exp()
    return _smaller(ratio_T, terms.advantage_T, clip_low, clip_high)


def dual_clipped(
    logprobs_T: torch.Tensor,
    terms: LossTerms,
    clip_low: float,
    clip_high: float,
    *,
    dual_clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return max(`clipped`, c A) where A < 0, with c = `dual_clip`, and `clipped` elsewhere.

    A token that has become much likelier although its advantage is negative would otherwise have a
    gradient without bound (Ye et al., arXiv 1912.09729, equation 5).
    """
    objective_T, clipped_T = clipped(logprobs_T, terms, clip_low, clip_high)
    least_T = dual_clip * terms.advantage_T
    bounded_T = (terms.advantage_T < 0) & (objective_T < least_T)
    return torch.where(bounded_T, least_T, objective_T), clipped_T | bounded_T


def cispo(
    logprobs_T: torch.Tensor, terms: LossTerms, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sg(clip(s)) A log p, with sg for a constant, and where the clip changes s.

    The ratio is a weight, so that a clipped token keeps a gradient (MiniMax-M1, arXiv 2506.13585,
    equations 4 and 5).
    """
    ratio_T = (logprobs_T.detach() - terms.old_logprobs_T).exp()
    weight_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    return weight_T * terms.advantage_T * logprobs_T, weight_T != ratio_T


def _smaller(
    ratio_T: torch.Tensor, advantage_T: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    plain_T = ratio_T * advantage_T
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantage_T
    return torch.minimum(plain_T, clipped_T), clipped_T < plain_T


def policy_loss(
    logprobs_T: torch.Tensor,
    entropy_T: torch.Tensor,
    terms: LossTerms,
    *,
    objective: Objective = clipped,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of these tokens and sums for metrics; both add up over disjoint tokens.

    Gradients flow only through `logprobs_T` (and `entropy_T` with an entropy bonus).  The loss is a
    scalar; the metrics are sums over tokens: `tokens`, `clipped`, `ratio`, `kl` (k3 estimate of
    KL(old || new): the tokens are the old policy's), and `reference_kl` if there is a KL penalty.
    """
    objective_T, clipped_T = objective(logprobs_T, terms, clip_low, clip_high)
    if terms.importance_T is not None:
        objective_T = objective_T * terms.importance_T
    if entropy_coef:
        objective_T = objective_T + entropy_coef * entropy_T
    log_ratio_T = logprobs_T.detach() - terms.old_logprobs_T
    sums = {
        "tokens": torch.tensor(float(logprobs_T.numel()), device=logprobs_T.device),
        "clipped": clipped_T.float().sum(),
        "ratio": log_ratio_T.exp().sum(),
        "kl": k3(-log_ratio_T).sum(),
    }
    if kl_coef:
        kl_T = k3(logprobs_T - terms.reference_logprobs_T)
        objective_T = objective_T - kl_coef * kl_T
        sums["reference_kl"] = kl_T.detach().sum()
    return -(terms.coefficient_T * objective_T).sum(), sums


def k3(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """Return an estimate (never negative) of KL(p || q) from log p - log q at tokens from p."""
    return torch.expm1(-log_ratio_T) + log_ratio_T
