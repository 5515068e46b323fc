"""Advantages that a posterior of the pass rate predicts (MaPP, 2026, section 4.2).

A completion's group-relative advantage depends on how many of the other G - 1 happen to pass.  Its
expectation does not: with p ~ Beta(alpha, beta),

    A(passed) = sum_m P(m of G - 1 pass) A(m + 1 of G passed),
    P(m) = C(G - 1, m) B(alpha' + m, beta' + G - 1 - m) / B(alpha', beta'),

and likewise for a failure.  alpha' and beta' leave the completion itself out: alpha - 1, beta for a
pass, alpha, beta - 1 for a failure.  A group of equal rewards thereby has an advantage, too.
"""

import torch

from megatron_prepo.prepo.advantages import group_advantages


def posterior_advantages(
    passed_KG: torch.Tensor,
    alpha_K: torch.Tensor,
    beta_K: torch.Tensor,
    *,
    std: str = "unbiased",
    eps: float = 1e-6,
) -> torch.Tensor:
    """Return `advantages_KG`, float64, for the passes of K groups of G rollouts.

    `alpha_K`, `beta_K`: posterior of each prompt's pass rate, with this group in it.
    `std`, `eps`: of the group-relative advantage that is averaged, as in `group_advantages`.
    """
    group_size = passed_KG.shape[1]
    counts_S1 = torch.arange(group_size + 1)[:, None]
    rewards_SG = (torch.arange(group_size) < counts_S1).double()
    realised_SG = group_advantages(rewards_SG, std=std, eps=eps)
    # with m of the other G - 1 passing, m + 1 of G pass, or m
    of_a_pass_K = predictive(alpha_K - 1, beta_K, group_size - 1) @ realised_SG[1:, 0]
    of_a_failure_K = predictive(alpha_K, beta_K - 1, group_size - 1) @ realised_SG[:-1, -1]
    return torch.where(passed_KG, of_a_pass_K[:, None], of_a_failure_K[:, None])


def predictive(alpha_K: torch.Tensor, beta_K: torch.Tensor, draws: int) -> torch.Tensor:
    """Return `probability_KM` of m passes in `draws` rollouts, m = 0 to `draws`: beta-binomial.

    With a^(m) = a (a + 1) ... (a + m - 1) and n draws, P(m) is C(n, m) alpha^(m) beta^(n - m) /
    (alpha + beta)^(n), which loses no digits where alpha and beta are large.
    """
    m_M = torch.arange(draws + 1, dtype=torch.float64)
    ways_M = torch.lgamma(m_M[-1] + 1) - torch.lgamma(m_M + 1) - torch.lgamma(draws - m_M + 1)
    passes_KM = _log_rising(alpha_K, draws)
    failures_KM = _log_rising(beta_K, draws).flip(1)
    return (ways_M + passes_KM + failures_KM - _log_rising(alpha_K + beta_K, draws)[:, -1:]).exp()


def _log_rising(a_K: torch.Tensor, largest: int) -> torch.Tensor:
    """Return log a^(m) for m = 0 to `largest`."""
    factors_KM = a_K[:, None].double() + torch.arange(largest)
    empty_K1 = torch.zeros_like(factors_KM.sum(dim=1, keepdim=True))
    return torch.cat([empty_K1, factors_KM.log().cumsum(dim=1)], dim=1)
