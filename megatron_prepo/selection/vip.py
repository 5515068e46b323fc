"""VIP (arXiv 2602.01601): share the rollouts of K random prompts so that the gradient varies least.

    variance of prompt i's gradient with n rollouts, up to a constant, for pass rate p_i:
        a_i / (n - 1)      with leave-one-out advantages (`selection.vip_variance=rloo`)
        a_i (n - 1) / n^2  with group-relative ones, not divided by their std (`group`)
        a_i = p_i (1 - p_i)
    choose      K candidates at random, as `random` does
    sizes       n_i that minimise the sum, with sum_i n_i = K G and least <= n_i <= most
    predict     p_i = sigmoid(m_i), m a Gaussian process over the prompts' texts, at first 0
    observe     z = log((s + 1/2) / (n - s + 1/2)) for s passes of n, with variance
                r = 1 / (s + 1/2) + 1 / (n - s + 1/2):
                alpha = (K_BB + diag(r))^-1 (z - m_B),  m_x <- m_x + sum_b k(x, b) alpha_b,
                and m_b = z_b for the prompts b of this step
    kernel      k(x, y) = exp(-|e_x - e_y|^2 / (2 h^2)), h `selection.vip_bandwidth`

The variances are those of a mean of prompts' mean gradients.  The loss is a mean over rollouts,
here and in the published code (`loss_agg_mode=token-mean`), in which a prompt weighs n_i / (K G):
the sizes do not minimise the variance of that.

Both variances are convex in n >= 3, so giving one rollout at a time to the prompt that gains most
is optimal: the paper relaxes n to real numbers, bisects for the multiplier and rounds.  Its
embeddings are those of a sentence encoder; here e_x counts the tokens of the text, hashed into
`WIDTH` numbers and scaled to length 1, which needs no further model.  Its observations have no
noise, are clipped at 1e-6, and have 1e-4 on the kernel's diagonal.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from megatron_prepo.config import SelectionConfig
from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates, Selector

WIDTH = 64
"""Numbers of an embedding."""
MAX_GROUPS = 2000
"""Observations that predictions use; older ones count only for their own prompts."""

VARIANCE: dict[str, Callable[[int], float]] = {
    "rloo": lambda n: 1 / (n - 1),
    "group": lambda n: (n - 1) / n**2,
}
"""Variance of a gradient with n rollouts, by `selection.vip_variance`, over p (1 - p)."""


class VarianceInformed(Selector):
    """A uniform choice of prompts, whose rollouts are shared by predicted variance."""

    shares_budget = True

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        self.num_selected, self.seed, self.pass_reward = config.num_selected, seed, pass_reward
        self.bounds, self.variance = (config.vip_least, config.vip_most), config.vip_variance
        self.bandwidth = config.vip_bandwidth
        self.counts: list[list[int]] = []
        """Token counts of each observed prompt, oldest first."""
        self.alpha: list[float] = []
        """Coefficient of each in the process."""
        self.num_dropped = 0
        """Observations before `counts`."""
        self.visits: dict[str, tuple[float, int]] = {}
        """Last observed logit of each prompt id, and the number of observations then."""
        self.predicted, self.largest = 0.0, 0

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of K candidates, drawn as `random` does."""
        if self.bandwidth is None:
            self.bandwidth = median_distance(embeddings(candidates.prompts))
        draw = random.Random(f"{self.seed}/selection/{step}")
        return draw.sample(range(len(candidates.prompts)), self.num_selected)

    def group_sizes(self, prompts: Sequence[Prompt], group_size: int) -> list[int]:
        """Return the sizes of least variance, K*G in all."""
        rate_K = expit(self.logits(prompts))
        self.predicted = float(rate_K.mean())
        scale_K = (rate_K * (1 - rate_K)).tolist()
        of = VARIANCE[self.variance]
        sizes = shared(scale_K, len(prompts) * group_size, self.bounds, of)
        self.largest = max(sizes)
        return sizes

    def logits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the predicted logit of each prompt's pass rate, `m_K`."""
        known = [self.visits.get(prompt.id, (0.0, 0)) for prompt in prompts]
        m_K: np.ndarray = np.array([logit for logit, _ in known])
        if not self.alpha:
            return m_K
        kernel_KR = self.kernel(embeddings(prompts), scaled(self.counts))
        since_K = np.array([number for _, number in known])[:, None]
        later_KR = np.arange(len(self.alpha)) + self.num_dropped >= since_K
        m_K = m_K + (kernel_KR * later_KR) @ np.array(self.alpha)
        return m_K

    def kernel(self, x_KE: np.ndarray, y_RE: np.ndarray) -> np.ndarray:
        """Return `kernel_KR`, the similarities of the prompts."""
        assert self.bandwidth is not None, "choose has set it"
        kernel_KR: np.ndarray = np.exp(-squared_distances(x_KE, y_RE) / (2 * self.bandwidth**2))
        return kernel_KR

    def observe(self, prompts: Sequence[Prompt], rewards_KG: Sequence[torch.Tensor]) -> None:
        """Move the process towards the passes of each group."""
        passes_K = np.array([float((row >= self.pass_reward).sum()) for row in rewards_KG])
        failures_K = np.array([float(len(row)) for row in rewards_KG]) - passes_K
        logit_K = np.log((passes_K + 0.5) / (failures_K + 0.5))
        noise_K = 1 / (passes_K + 0.5) + 1 / (failures_K + 0.5)
        x_KE = embeddings(prompts)
        prior_KK = self.kernel(x_KE, x_KE) + np.diag(noise_K)
        alpha_K = np.linalg.solve(prior_KK, logit_K - self.logits(prompts))
        self.counts += [token_counts(prompt) for prompt in prompts]
        self.alpha += alpha_K.tolist()
        number = self.num_dropped + len(self.alpha)
        for prompt, logit in zip(prompts, logit_K.tolist(), strict=True):
            self.visits[prompt.id] = (logit, number)
        self.counts, self.alpha = self.counts[-MAX_GROUPS:], self.alpha[-MAX_GROUPS:]
        self.num_dropped = number - len(self.alpha)

    def metrics(self) -> dict[str, float]:
        """Return the mean predicted pass rate of the chosen prompts, and the largest group."""
        return {
            "selection/predicted_pass_rate": self.predicted,
            "selection/largest_group": self.largest,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the process, and the prompts' last observations."""
        return {
            "bandwidth": self.bandwidth,
            "counts": [list(counts) for counts in self.counts],
            "alpha": list(self.alpha),
            "num_dropped": self.num_dropped,
            "visits": {name: list(visit) for name, visit in self.visits.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved process."""
        self.bandwidth, self.num_dropped = state["bandwidth"], state["num_dropped"]
        self.counts = [list(counts) for counts in state["counts"]]
        self.alpha = list(state["alpha"])
        self.visits = {name: (logit, number) for name, (logit, number) in state["visits"].items()}


def shared(
    scale_K: Sequence[float], total: int, bounds: tuple[int, int], variance: Callable[[int], float]
) -> list[int]:
    """Return `size_K` within the bounds and of this sum that minimise sum scale * variance(size).

    Ties go to the smaller group, then to the first.

    >>> shared([1.0, 0.0, 1.0], 12, (3, 8), VARIANCE["rloo"])
    [5, 3, 4]
    """
    least, most = bounds
    sizes = [least] * len(scale_K)

    def gain(k: int) -> tuple[float, int, int]:
        lowered = scale_K[k] * (variance(sizes[k]) - variance(sizes[k] + 1))
        return -lowered, sizes[k], k

    waiting = [gain(k) for k in range(len(sizes)) if least < most]
    heapq.heapify(waiting)
    for _ in range(total - sum(sizes)):
        _, _, k = heapq.heappop(waiting)
        sizes[k] += 1
        if sizes[k] < most:
            heapq.heappush(waiting, gain(k))
    assert sum(sizes) == total, f"{total} rollouts do not fit the bounds {bounds}"
    return sizes


def token_counts(prompt: Prompt) -> list[int]:
    """Return the counts of the tokens of the user's text, hashed into `WIDTH` places."""
    counts = [0] * WIDTH
    begin, end = prompt.content
    for token in prompt.tokens[begin:end]:
        counts[token * 2654435761 % 2**32 * WIDTH >> 32] += 1
    return counts


def scaled(counts_KE: Sequence[Sequence[int]]) -> np.ndarray:
    """Return embeddings `x_KE` of length 1; of a prompt without a text, of length 0."""
    x_KE = np.array(counts_KE, dtype=np.float64)
    scaled_KE: np.ndarray = x_KE / np.maximum(np.linalg.norm(x_KE, axis=1, keepdims=True), 1.0)
    return scaled_KE


def embeddings(prompts: Sequence[Prompt]) -> np.ndarray:
    """Return the embedding of each prompt, `x_KE`."""
    return scaled([token_counts(prompt) for prompt in prompts])


def squared_distances(x_KE: np.ndarray, y_RE: np.ndarray) -> np.ndarray:
    """Return |x - y|^2, `distance_KR`."""
    lengths_K1, lengths_R = (x_KE**2).sum(axis=1)[:, None], (y_RE**2).sum(axis=1)
    distance_KR: np.ndarray = np.maximum(lengths_K1 + lengths_R - 2 * x_KE @ y_RE.T, 0.0)
    return distance_KR


def median_distance(x_PE: np.ndarray) -> float:
    """Return the median distance of two different prompts; 1 if all are at one place."""
    first, second = np.triu_indices(len(x_PE), k=1)
    distances = np.sqrt(squared_distances(x_PE, x_PE)[first, second])
    apart = distances[distances > 1e-6]  # the rest is rounding
    return float(np.median(apart)) if len(apart) else 1.0
