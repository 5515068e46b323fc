"""What a selector may look at: the candidate prompts and what the policy thinks of them now."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_prepo.records import Prompt


@dataclass(frozen=True)
class Candidates:
    """P candidate prompts of a step; what a selector does not need is None."""

    prompts: Sequence[Prompt]
    ppl_P: torch.Tensor | None = None
    """Prompt perplexity under the current policy, float64 (`selection.ppl_from` says whose)."""
    entropy_P: torch.Tensor | None = None
    """Mean full-vocabulary entropy over the prompt's tokens in nats, float64."""
    pass_rate_P: torch.Tensor | None = None
    """Share of probe rollouts that pass, float64 (the oracle's only)."""
    actor_ppl_P: torch.Tensor | None = None
    """The actor's perplexity, where `ppl_P` is the engine's and both are compared."""
