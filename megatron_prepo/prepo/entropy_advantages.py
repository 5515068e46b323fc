"""Advantages of groups without variance, by token entropy (RL-ZVP, arXiv 2509.21880, equation 5).

    all pass   A_t = alpha H_t
    all fail   A_t = -alpha (max_k H_k - H_t)

H_t is the entropy of token t under the policy before the update, the maximum is over the tokens of
the same completion, and both are constants in the loss.  A group with variance keeps its advantage.
"""

from collections.abc import Sequence

import torch

from megatron_prepo.prepo.advantages import zero_variance


def directions(
    rewards_KG: torch.Tensor, shaped_rewards_KG: torch.Tensor, pass_reward: float
) -> torch.Tensor:
    """Return `sign_KG`, float64: 1 or -1 where a group without variance passes or fails, else 0.

    A group has variance by its shaped rewards, and passes or fails by its own.  One of passes and
    failures that penalties make equal does neither.
    """
    passed_KG = rewards_KG >= pass_reward
    sign_K = passed_KG.all(dim=1).double() - (~passed_KG).all(dim=1).double()
    return (sign_K * zero_variance(shaped_rewards_KG))[:, None].expand(rewards_KG.shape)


def entropy_advantages(
    advantages_KG: torch.Tensor,
    sign_KG: torch.Tensor,
    entropies: Sequence[torch.Tensor],
    *,
    scale: float,
) -> list[torch.Tensor]:
    """Return the advantages of each rollout's tokens, float64.

    `advantages_KG`: group-relative; `sign_KG`: `directions`; `entropies`: of each rollout's tokens;
    `scale`: alpha.

    >>> entropy_T = torch.tensor([0.5, 2.0])
    >>> zero_KG, sign_KG = torch.zeros(1, 1), -torch.ones(1, 1)
    >>> entropy_advantages(zero_KG, sign_KG, [entropy_T], scale=2.0)[0].tolist()
    [-3.0, 0.0]
    """
    advantages = []
    for advantage, sign, entropy_T in zip(
        advantages_KG.flatten(), sign_KG.flatten(), entropies, strict=True
    ):
        entropy_T = entropy_T.detach().double()
        if sign == 0:
            advantages.append(advantage.double().expand_as(entropy_T))
        elif sign > 0:
            advantages.append(scale * entropy_T)
        else:
            advantages.append(scale * (entropy_T - entropy_T.amax()))
    return advantages
