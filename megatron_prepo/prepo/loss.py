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
import torch.distributed as dist


@dataclass(frozen=True)
class LossTerms:
    """Inputs of the loss for the T tokens of some rollouts, concatenated."""

    old_logprobs_T: torch.Tensor
    """Log-probabilities under the actor before the update."""
    advantage_T: torch.Tensor
    """Advantage of the token's rollout, or of the token."""
    coefficient_T: torch.Tensor
    """Coefficient of the token's rollout."""
    importance_T: torch.Tensor | None = None
    """Importance weights, which correct for differences of engine and actor (`importance.py`)."""
    reference_logprobs_T: torch.Tensor | None = None
    """Log-probabilities under the initial policy, for a KL penalty."""

    def __getitem__(self, tokens: slice) -> "LossTerms":
        """Return the terms of a range of the tokens."""
        fields = vars(self).items()
        return LossTerms(**{name: None if v is None else v[tokens] for name, v in fields})


def rollout_coefficients(
    weight_N: torch.Tensor,
    lengths_N: torch.Tensor,
    aggregation: str,
    *,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """Return `coefficient_N`: weights divided by the normaliser, for an optimizer batch of M = N.

    - `seq-mean-token-sum`: w_i / M (as first published)
    - `seq-mean-token-mean`: w_i / (M |o_i|) (later versions)
    - `token-mean`: w_i / sum_j |o_j| (DAPO)
    - `seq-mean-token-sum-norm`: w_i / (M L), with L = `max_tokens` (Dr. GRPO)

    >>> w, n = torch.tensor([1.0, 1.0]), torch.tensor([1, 3])
    >>> rollout_coefficients(w, n, "token-mean").tolist()
    [0.25, 0.25]
    """
    num_rollouts = weight_N.numel()
    if aggregation == "seq-mean-token-sum":
        return weight_N / num_rollouts
    if aggregation == "seq-mean-token-mean":
        return weight_N / (num_rollouts * lengths_N)
    if aggregation == "seq-mean-token-sum-norm":
        assert max_tokens, f"{aggregation} needs the maximum number of tokens"
        return weight_N / (num_rollouts * max_tokens)
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


def gspo(
    logprobs_T: torch.Tensor,
    terms: LossTerms,
    clip_low: float,
    clip_high: float,
    *,
    here_M: torch.Tensor,
    lengths_M: torch.Tensor,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `clipped` with the ratio of the rollout in place of the token's.

        s_i = (prod_t s_it)^(1 / |o_i|),   used as s_it = sg(s_i) pi_it / sg(pi_it)

    sg marks a constant.  This is GSPO-token (arXiv 2507.18071, equations 13 and 14), which has the
    value of s_i for all tokens, and GSPO's gradient if their advantages are equal.  The other
    arguments are those of `rollout_means`; all tokens of a rollout must be given at a time.
    """
    log_ratio_T = logprobs_T - terms.old_logprobs_T
    mean_T = rollout_means(log_ratio_T.detach(), here_M, lengths_M, group)
    ratio_T = (log_ratio_T - log_ratio_T.detach() + mean_T).exp()
    return _smaller(ratio_T, terms.advantage_T, clip_low, clip_high)


def rollout_means(
    value_T: torch.Tensor,
    here_M: torch.Tensor,
    lengths_M: torch.Tensor,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the mean over each token's rollout, for values of the tokens of M rollouts, in order.

    `here_M`: how many values each rollout has here; `lengths_M`: on all ranks of `group` together,
    which share the rollouts' tokens.  Collective if there is a group.

    >>> two_and_one = torch.tensor([2, 1])
    >>> rollout_means(torch.tensor([1.0, 2.0, 5.0]), two_and_one, two_and_one).tolist()
    [1.5, 1.5, 5.0]
    """
    if not len(here_M):  # a row without rollouts, on all ranks of the group
        return value_T
    sum_M = torch.segment_reduce(value_T.double(), "sum", lengths=here_M, initial=0.0)
    if group is not None:
        dist.all_reduce(sum_M, group=group)
    mean_M = (sum_M / lengths_M).to(value_T.dtype)
    return mean_M.repeat_interleave(here_M, output_size=len(value_T))


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
    KL(old || new): the tokens are the old policy's), and `reference_kl` if there is a reference.
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
    if terms.reference_logprobs_T is not None:
        kl_T = k3(logprobs_T - terms.reference_logprobs_T)
        sums["reference_kl"] = kl_T.detach().sum()
        if kl_coef:
            objective_T = objective_T - kl_coef * kl_T
    return -(terms.coefficient_T * objective_T).sum(), sums


def k3(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """Return an estimate (never negative) of KL(p || q) from log p - log q at tokens from p."""
    return torch.expm1(-log_ratio_T) + log_ratio_T
