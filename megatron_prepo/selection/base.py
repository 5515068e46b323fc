"""Input of a selector: the candidate prompts and their scores under the current policy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_prepo.records import Prompt


@dataclass(frozen=True)
class Candidates:
    """P candidate prompts of a step; scores that the selector does not need are None."""

    prompts: Sequence[Prompt]
    ppl_P: torch.Tensor | None = None
    """Prompt perplexity under the current policy, float64, from `selection.ppl_from`."""
    entropy_P: torch.Tensor | None = None
    """Mean full-vocabulary entropy over the prompt's tokens in nats, float64."""
    pass_rate_P: torch.Tensor | None = None
    """Share of probe rollouts that pass, float64 (oracle only)."""
    actor_ppl_P: torch.Tensor | None = None
    """Perplexity under the actor, in steps where `ppl_P` is the engine's and both are compared."""
