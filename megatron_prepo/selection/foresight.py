"""Foresight, our method: a prediction as prior, past rewards as evidence, one draw per choice.

    features    x_i = [1, z_i, z_i^2 - 1],  z_i = log perplexity, log length and mean entropy of the
                prompt under the current policy, standardised over the step's candidates; with
                `selection.foresight_hidden`, also that many of its mean last hidden state
    prediction  mu_i = sigmoid(w . x_i), logistic regression on all groups so far; a group that is
                `STEP_DECAY` steps old has weight 1/e, and a rollout has weight `ROLLOUT_WEIGHT`,
                since the rollouts of a group are correlated
    prior       pass rate p_i ~ Beta(m mu_i, m (1 - mu_i)); m, the strength of the prior, maximises
                the likelihood of the observations, given mu as fitted to them or, with features of
                hidden states, as predicted before them
    evidence    alpha_i = m mu_i + passes, beta_i = m (1 - mu_i) + failures of the prompt so far;
                each new visit multiplies the weight of earlier ones by `VISIT_DECAY`
    choice      one draw from each posterior; the K nearest to `selection.target_pass_rate`

This is MoPPS with an informed prior: at the first visit, where MoPPS draws from a uniform prior,
the prediction is used; if the features are uninformative, m becomes small and the method reduces to
MoPPS.  Its only cost is a scoring pass over the candidates, as in PREPO.  `docs/foresight.md` has
derivation and measurements.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import betaln, expit

from megatron_prepo.config import SelectionConfig
from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates, Selector

STEP_DECAY = 15.0
ROLLOUT_WEIGHT = 0.35
VISIT_DECAY = 0.7
MAX_GROUPS = 2000
"""Maximum number of groups in the regression; older ones have negligible weight."""
PRIOR_STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Candidate values of m: the number of rollouts to which the prediction is equivalent."""


class Foresight(Selector):
    """Thompson sampling for a target pass rate, with a learned prior."""

    needs_scores = True

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        self.num_selected, self.target = config.num_selected, config.target_pass_rate
        self.hidden_features = config.foresight_hidden
        self.seed, self.pass_reward = seed, pass_reward
        self.features: list[list[float]] = []
        self.counts: list[tuple[int, int, int]] = []
        """Step, passes and rollouts of each group; `features` are those of its prompt."""
        self.foreseen: list[float] = []
        """Predicted pass rate of each group when it was chosen, with features of hidden states."""
        self.evidence: dict[str, tuple[float, float]] = {}
        """Discounted passes and failures per prompt id."""
        self.prior_strength = 4.0
        self.predicted_pass_rate = 0.0

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of the K candidates, nearest draw first; ties keep their order."""
        self.step, x_PF = step, features(candidates)
        self.position = {prompt.id: i for i, prompt in enumerate(candidates.prompts)}
        self.x_PF = x_PF
        alpha_P, beta_P = self.posterior(candidates, x_PF, step)
        draw_P = np.random.default_rng([self.seed, step]).beta(alpha_P, beta_P)
        chosen = np.argsort(np.abs(draw_P - self.target), kind="stable")[: self.num_selected]
        self.predicted_pass_rate = float((alpha_P / (alpha_P + beta_P))[chosen].mean())
        positions: list[int] = chosen.tolist()
        return positions

    def posterior(
        self, candidates: Candidates, x_PF: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `alpha_P` and `beta_P` of the candidates' pass rates."""
        weight_F = np.zeros(x_PF.shape[1])
        if self.counts:
            x_RF = np.array(self.features)
            step_R, passes_R, rollouts_R = np.array(self.counts, dtype=float).T
            age_R = np.exp((step_R - step) / STEP_DECAY)
            weight_F = logistic_regression(x_RF, passes_R, rollouts_R, ROLLOUT_WEIGHT * age_R)
            # of many features the regression fits its own groups too well to be trusted by them
            hidden = self.hidden_features > 0
            mu_R = np.array(self.foreseen) if hidden else predict(x_RF, weight_F)
            self.prior_strength = max(
                PRIOR_STRENGTHS, key=lambda m: likelihood(m, mu_R, passes_R, rollouts_R, age_R)
            )
        mu_P = self.mu_P = predict(x_PF, weight_F)
        seen = [self.evidence.get(prompt.id, (0.0, 0.0)) for prompt in candidates.prompts]
        passes_P, failures_P = np.array(seen).T
        return self.prior_strength * mu_P + passes_P, self.prior_strength * (1 - mu_P) + failures_P

    def observe(self, prompts: Sequence[Prompt], rewards_KG: torch.Tensor) -> None:
        """Add groups as rows of the regression and as evidence on their prompts."""
        rollouts = rewards_KG.shape[1]
        passes_K = (rewards_KG >= self.pass_reward).sum(dim=1).tolist()
        for prompt, passes in zip(prompts, passes_K, strict=True):
            self.features.append(self.x_PF[self.position[prompt.id]].tolist())
            self.counts.append((self.step, passes, rollouts))
            self.foreseen.append(float(self.mu_P[self.position[prompt.id]]))
            before = self.evidence.get(prompt.id, (0.0, 0.0))
            self.evidence[prompt.id] = (
                VISIT_DECAY * before[0] + passes,
                VISIT_DECAY * before[1] + rollouts - passes,
            )
        self.features, self.counts = self.features[-MAX_GROUPS:], self.counts[-MAX_GROUPS:]
        self.foreseen = self.foreseen[-MAX_GROUPS:]

    def metrics(self) -> dict[str, float]:
        """Return the prior strength and the predicted pass rate of the selected prompts."""
        return {
            "selection/trust": self.prior_strength,
            "selection/foreseen_pass_rate": self.predicted_pass_rate,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all observations."""
        return {
            "features": [list(row) for row in self.features],
            "counts": [list(row) for row in self.counts],
            "evidence": {name: list(counts) for name, counts in self.evidence.items()},
            "trust": self.prior_strength,
        } | ({"foreseen": list(self.foreseen)} if self.hidden_features else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state at the start of a step."""
        self.features = [list(row) for row in state["features"]]
        self.counts = [tuple(row) for row in state["counts"]]
        self.evidence = {name: tuple(counts) for name, counts in state["evidence"].items()}
        self.prior_strength = state["trust"]
        self.foreseen = list(state["foreseen"]) if self.hidden_features else []


def features(candidates: Candidates) -> np.ndarray:
    """Return `x_PF`: a constant, the standardised features and their centred squares.

    Features of the hidden states have no squares.  A feature that does not vary is zero for all
    candidates; a non-finite value is replaced by zero.
    """
    assert candidates.ppl_P is not None and candidates.entropy_P is not None, "needs_scores"
    lengths_P = [len(prompt.tokens) for prompt in candidates.prompts]
    raw_PF = np.stack(
        [np.log(candidates.ppl_P.numpy()), np.log(lengths_P), candidates.entropy_P.numpy()], axis=1
    )
    z_PF = standardised(raw_PF)
    columns = [np.ones((len(z_PF), 1)), z_PF, z_PF**2 - 1]
    if candidates.hidden_PD is not None:
        columns.append(standardised(candidates.hidden_PD.numpy()))
    x_PF: np.ndarray = np.concatenate(columns, axis=1)
    return x_PF


def standardised(raw_PF: np.ndarray) -> np.ndarray:
    """Return each column with mean 0 and standard deviation 1, or zeros if it does not vary."""
    raw_PF = np.where(np.isfinite(raw_PF), raw_PF, np.nan)
    spread_F = np.nanstd(raw_PF, axis=0)
    spread_F = np.where(spread_F > 0, spread_F, 1.0)
    z_PF: np.ndarray = np.nan_to_num((raw_PF - np.nanmean(raw_PF, axis=0)) / spread_F)
    return z_PF


def predict(x_RF: np.ndarray, weight_F: np.ndarray) -> np.ndarray:
    """Return predicted pass rates, clipped to [1/1000, 999/1000]."""
    mu_R: np.ndarray = np.clip(expit(x_RF @ weight_F), 1e-3, 1 - 1e-3)
    return mu_R


def logistic_regression(
    x_RF: np.ndarray, passes_R: np.ndarray, rollouts_R: np.ndarray, count_R: np.ndarray
) -> np.ndarray:
    """Return `weight_F`, the posterior mode under a standard normal prior, by Newton's method.

    `count_R` is the weight per rollout of each row.
    """
    weight_F: np.ndarray = np.zeros(x_RF.shape[1])
    for _ in range(25):
        mu_R = expit(x_RF @ weight_F)
        gradient_F = x_RF.T @ (count_R * (passes_R - rollouts_R * mu_R)) - weight_F
        curvature_R = count_R * rollouts_R * mu_R * (1 - mu_R)
        hessian_FF = (x_RF * curvature_R[:, None]).T @ x_RF + np.eye(len(weight_F))
        step_F = np.linalg.solve(hessian_FF, gradient_F)
        weight_F = weight_F + step_F
        if np.abs(step_F).max() < 1e-8:
            break
    return weight_F


def likelihood(
    prior_strength: float,
    mu_R: np.ndarray,
    passes_R: np.ndarray,
    rollouts_R: np.ndarray,
    count_R: np.ndarray,
) -> float:
    """Return the log-likelihood of the groups, whose pass rates are ~ Beta(m mu, m (1 - mu)).

    m is `prior_strength`.
    """
    alpha_R, beta_R = prior_strength * mu_R, prior_strength * (1 - mu_R)
    evidence_R = betaln(alpha_R + passes_R, beta_R + rollouts_R - passes_R)
    return float((count_R * (evidence_R - betaln(alpha_R, beta_R))).sum())
