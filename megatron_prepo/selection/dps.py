"""DPS (arXiv 2603.10887): a hidden Markov model of each prompt's progress, with three states.

    state        0: all of a group fail, 1: some pass, 2: all pass; seen exactly when rolled out
    transition   from j to i with probability Phi_ij = alpha_ij / sum_i alpha_ij
    observe i    mu <- e_i, and alpha <- lambda alpha + (1 - lambda) alpha_0 + xi,
                 xi_ij = P(from j to i) = Phi_ij mu_j / sum_j Phi_ij mu_j in row i, 0 elsewhere
    otherwise    mu <- Phi mu, then alpha <- lambda alpha + (1 - lambda) alpha_0
    choose       the K with the largest predicted (Phi mu)_1

lambda is `selection.dps_decay`, alpha_0 `selection.dps_prior` in each element, and mu of an unseen
prompt is uniform.  This is the published code (maoyixiu/DPS, recipe/dps/task_sampler.py), which
updates every prompt in every step; here, a prompt's unobserved steps are made up for when it is
offered again.  There, states are read from the mean accuracy of a group; here, state 1 is a group
whose rewards are not all equal, and `reward.high` decides between states 0 and 2.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates, Selector

UNSOLVED, PARTIAL, SOLVED = STATES = range(3)


class MarkovChain(Selector):
    """Choice by the predicted probability that a prompt is partially solved."""

    def __init__(
        self, config: SelectionConfig, *, total_steps: int, seed: int, pass_reward: float
    ) -> None:
        self.num_selected, self.pass_reward = config.num_selected, pass_reward
        self.decay, self.prior = config.dps_decay, config.dps_prior
        self.visits: dict[str, tuple[list[list[float]], int, int]] = {}
        """Per prompt id: alpha, state and step of its last visit."""
        self.step = 0
        self.partial = 0.0

    def choose(self, candidates: Candidates, step: int) -> list[int]:
        """Return the positions of the K candidates, likeliest first; ties keep their order."""
        self.step = step
        alpha_PSS, belief_PS = self.beliefs(candidates.prompts)
        partial_P = predicted(alpha_PSS, belief_PS)[:, PARTIAL]
        chosen: list[int] = np.argsort(-partial_P, kind="stable")[: self.num_selected].tolist()
        self.partial = float(partial_P[chosen].mean())
        return chosen

    def beliefs(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """Return `alpha_PSS` and the distribution of states `belief_PS` after the last step."""
        alpha_PSS = np.full((len(prompts), len(STATES), len(STATES)), self.prior)
        belief_PS = np.full((len(prompts), len(STATES)), 1 / len(STATES))
        gap_P: np.ndarray = np.zeros(len(prompts), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            if prompt.id in self.visits:
                alpha_PSS[i], state, step = self.visits[prompt.id]
                belief_PS[i] = np.eye(len(STATES))[state]
                gap_P[i] = self.step - step - 1
        for k in range(int(gap_P.max(initial=0))):
            waits = gap_P > k
            belief_PS[waits] = predicted(alpha_PSS[waits], belief_PS[waits])
            alpha_PSS[waits] = self.decayed(alpha_PSS[waits])
        return alpha_PSS, belief_PS

    def decayed(self, alpha_PSS: np.ndarray) -> np.ndarray:
        """Return the parameters of the transitions one step later."""
        decayed_PSS: np.ndarray = self.decay * alpha_PSS + (1 - self.decay) * self.prior
        return decayed_PSS

    def observe(self, prompts: Sequence[Prompt], rewards_KG: torch.Tensor) -> None:
        """Update state and transitions of the prompts that were rolled out."""
        alpha_KSS, belief_KS = self.beliefs(prompts)
        state_K = states(rewards_KG, self.pass_reward)
        rows_K = np.arange(len(prompts))
        joint_KS = (transition(alpha_KSS) * belief_KS[:, None, :])[rows_K, state_K]
        alpha_KSS = self.decayed(alpha_KSS)
        alpha_KSS[rows_K, state_K] += joint_KS / joint_KS.sum(axis=1, keepdims=True)
        for prompt, alpha_SS, state in zip(
            prompts, alpha_KSS.tolist(), state_K.tolist(), strict=True
        ):
            self.visits[prompt.id] = (alpha_SS, state, self.step)

    def metrics(self) -> dict[str, float]:
        """Return the mean probability that a chosen prompt's group has an advantage."""
        return {"selection/informative": self.partial}

    def state_dict(self) -> dict[str, Any]:
        """Return the last visits, by prompt id."""
        return {"visits": {name: list(visit) for name, visit in self.visits.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from saved visits."""
        self.visits = {name: tuple(visit) for name, visit in state["visits"].items()}


def states(rewards_KG: torch.Tensor, pass_reward: float) -> np.ndarray:
    """Return the state of each group, `state_K`."""
    solved_K = torch.where(rewards_KG[:, 0] >= pass_reward, SOLVED, UNSOLVED)
    state_K: np.ndarray = torch.where(zero_variance(rewards_KG), solved_K, PARTIAL).numpy()
    return state_K


def transition(alpha_PSS: np.ndarray) -> np.ndarray:
    """Return Phi, the expected transitions; element ij is the probability from j to i."""
    phi_PSS: np.ndarray = alpha_PSS / alpha_PSS.sum(axis=1, keepdims=True)
    return phi_PSS


def predicted(alpha_PSS: np.ndarray, belief_PS: np.ndarray) -> np.ndarray:
    """Return the distribution of states one step later, `belief_PS`."""
    next_PS: np.ndarray = (transition(alpha_PSS) * belief_PS[:, None, :]).sum(axis=2)
    return next_PS
