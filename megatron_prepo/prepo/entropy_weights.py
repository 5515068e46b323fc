"""Relative-entropy weights of rollouts (arXiv 2511.00794, section 3.2 and appendix E).

w_i = Hbar_i / Hbar, where Hbar_i is the mean full-vocabulary entropy of rollout i's tokens under
the policy before the update, and Hbar the mean over the optimizer batch.  The weights are constants
in the loss.
"""

import torch


def relative_entropy_weights(
    entropy_N: torch.Tensor,
    lengths_N: torch.Tensor,
    *,
    mean: str = "sequence",
    clamp: float | None = None,
    include_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `weight_N`, float64 and detached, from mean token entropy and length of each rollout.

    `mean`: `sequence` averages Hbar over the rollouts' means, so that the mean of the weights is
    exactly 1; `token` averages it over all tokens, so that the sum of lengths times weights is the
    sum of lengths.
    `clamp`: limits the weights to [1/c, c].
    `include_N`: mask of the rollouts over which Hbar is averaged (None: all); every rollout gets a
    weight.

    If Hbar is zero (a deterministic policy), all weights are 1, since entropies cannot be compared.
    """
    entropy_N = entropy_N.detach().double()
    share_N = lengths_N.double() if mean == "token" else torch.ones_like(entropy_N)
    if include_N is not None:
        share_N = share_N * include_N
    total = share_N.sum()
    batch_entropy = (share_N * entropy_N).sum() / total if total > 0 else total
    if batch_entropy <= torch.finfo(torch.float32).tiny:
        return torch.ones_like(entropy_N)
    weight_N = entropy_N / batch_entropy
    return weight_N if clamp is None else weight_N.clamp(1 / clamp, clamp)
