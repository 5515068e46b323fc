"""Advantages of rollouts from their rewards, float64.

| `advantage.method` | A of rollout i in a group of G | source |
|---|---|---|
| `group` | (r_i - mean of group) / (std of group + eps) | GRPO, arXiv 2402.03300 |
| `rloo` | r_i - mean of the other G - 1 rewards | RLOO, arXiv 2402.14740 |
| `reinforce++` | (r_i - mean) / (std + eps), over all tokens of the batch | arXiv 2501.03262 |
| `reinforce++-baseline` | the same of r_i - mean of group | arXiv 2501.03262 |

With a penalty in the reward, r_i is the reward less the penalties of all tokens; `reinforce++` has
advantages per token, by the penalties from the token on.
"""

from collections.abc import Sequence

import torch

from megatron_prepo.prepo.group_rows import Rows


def group_advantages(
    rewards_KG: torch.Tensor, *, std: str = "unbiased", eps: float = 1e-6
) -> torch.Tensor:
    """Return `advantages_KG` for the rewards of K groups of G rollouts, float64.

    `std`: `unbiased` (n-1), `population` (n), or `none` (no division, as in Dr. GRPO).
    A group with equal rewards, or of one rollout, gets exactly 0, whatever the rounding error of
    its mean.

    Raises ValueError for a reward that is not finite.
    """
    rewards_KG = _finite(rewards_KG)
    if rewards_KG.shape[1] == 1:
        return torch.zeros_like(rewards_KG)
    advantages_KG = rewards_KG - rewards_KG.mean(dim=1, keepdim=True)
    if std != "none":
        std_K1 = rewards_KG.std(dim=1, keepdim=True, correction=1 if std == "unbiased" else 0)
        advantages_KG = advantages_KG / (std_K1 + eps)
    return advantages_KG.masked_fill(zero_variance(rewards_KG)[:, None], 0.0)


def leave_one_out_advantages(rewards_KG: torch.Tensor) -> torch.Tensor:
    """Return each reward less the mean of the remaining ones of its group (RLOO); equal ones: 0.

    >>> leave_one_out_advantages(torch.tensor([[3.0, 0.0, 0.0]])).tolist()
    [[3.0, -1.5, -1.5]]
    """
    group_size = rewards_KG.shape[1]
    return group_advantages(rewards_KG, std="none") * (group_size / max(1, group_size - 1))


def batch_advantages(
    rewards_KG: torch.Tensor, lengths_N: torch.Tensor, *, std: str = "unbiased", eps: float = 1e-6
) -> torch.Tensor:
    """Return the rewards, normalised over the batch instead of their group (REINFORCE++).

    Mean and standard deviation are over all tokens: a reward counts once per token of its rollout.
    `std` and `eps` are those of `group_advantages`.  Equal rewards give exactly 0.
    """
    rewards_KG = _finite(rewards_KG)
    reward_T = rewards_KG.flatten().repeat_interleave(lengths_N)
    return normalised(rewards_KG, reward_T, std=std, eps=eps)


def penalised_rewards(rewards_KG: torch.Tensor, penalties: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the rewards less the sum of `penalties`, a tensor of its tokens for each rollout."""
    total_N = torch.stack([penalty_T.double().sum() for penalty_T in penalties])
    return rewards_KG.double() - total_N.view_as(rewards_KG)


def token_advantages(
    rewards_KG: torch.Tensor,
    penalties: Sequence[torch.Tensor],
    *,
    std: str = "unbiased",
    eps: float = 1e-6,
) -> list[torch.Tensor]:
    """Return REINFORCE++'s advantages of each rollout's tokens, for a reward with penalties.

    The return of token t is the reward less the penalties of t and all later tokens; the advantages
    are the returns, normalised over all tokens.

    >>> [advantage_T] = token_advantages(torch.ones(1, 1), [torch.tensor([2.0, 4.0])], std="none")
    >>> advantage_T.tolist()  # returns -5 and -3
    [-1.0, 1.0]
    """
    rewards = _finite(rewards_KG).flatten()
    returns = [
        reward - penalty_T.double().flip(0).cumsum(0).flip(0)
        for reward, penalty_T in zip(rewards, penalties, strict=True)
    ]
    return_T = torch.cat(returns)
    advantage_T = normalised(return_T, return_T, std=std, eps=eps)
    return list(advantage_T.split([len(penalty_T) for penalty_T in penalties]))


def normalised(values: torch.Tensor, over_T: torch.Tensor, *, std: str, eps: float) -> torch.Tensor:
    """Return (values - mean) / (std + eps) of mean and std over `over_T`; 0 if all are equal."""
    if over_T.amax() == over_T.amin():
        return torch.zeros_like(values)
    values = values - over_T.mean()
    if std == "none":
        return values
    return values / (over_T.std(correction=1 if std == "unbiased" else 0) + eps)


def _finite(rewards: torch.Tensor) -> torch.Tensor:
    rewards = rewards.double()
    if not rewards.isfinite().all():
        raise ValueError("a reward is not finite")
    return rewards


def zero_variance(rewards_KG: Rows) -> torch.Tensor:
    """Return a mask of the K groups with equal rewards, whose advantages are 0.

    Groups may differ in size; one of a single rollout is among them.
    """
    return torch.stack([row.amax() == row.amin() for row in rewards_KG])
