"""Advantages of rollouts from their rewards, float64.

| `advantage.method` | A of rollout i in a group of G | source |
|---|---|---|
| `group` | (r_i - mean of group) / (std of group + eps) | GRPO, arXiv 2402.03300 |
| `rloo` | r_i - mean of the other G - 1 rewards | RLOO, arXiv 2402.14740 |
| `reinforce++` | (r_i - mean) / (std + eps), over all tokens of the batch | arXiv 2501.03262 |
| `reinforce++-baseline` | the same of r_i - mean of group | arXiv 2501.03262 |
"""

import torch


def group_advantages(
    rewards_KG: torch.Tensor, *, std: str = "unbiased", eps: float = 1e-6
) -> torch.Tensor:
    """Return `advantages_KG` for the rewards of K groups of G rollouts, float64.

    `std`: `unbiased` (n-1), `population` (n), or `none` (no division, as in Dr. GRPO).
    A group with equal rewards gets exactly 0, whatever the rounding error of its mean.

    Raises ValueError for a reward that is not finite.
    """
    rewards_KG = _finite(rewards_KG)
    advantages_KG = rewards_KG - rewards_KG.mean(dim=1, keepdim=True)
    if std != "none":
        std_K1 = rewards_KG.std(dim=1, keepdim=True, correction=1 if std == "unbiased" else 0)
        advantages_KG = advantages_KG / (std_K1 + eps)
    return advantages_KG.masked_fill(zero_variance(rewards_KG)[:, None], 0.0)


def leave_one_out_advantages(rewards_KG: torch.Tensor) -> torch.Tensor:
    """Return the rewards less the mean of the others in their group (RLOO); 0 for equal rewards.

    >>> leave_one_out_advantages(torch.tensor([[3.0, 0.0, 0.0]])).tolist()
    [[3.0, -1.5, -1.5]]
    """
    group_size = rewards_KG.shape[1]
    return group_advantages(rewards_KG, std="none") * (group_size / (group_size - 1))


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


def zero_variance(rewards_KG: torch.Tensor) -> torch.Tensor:
    """Return a mask of the K groups with equal rewards, whose advantages are 0."""
    return rewards_KG.amax(dim=1) == rewards_KG.amin(dim=1)
