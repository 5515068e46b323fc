"""Log-probabilities and entropies by `transformers`, the reference for ours, and our allowed error.

[(scores, allowed)] = judged(directory, sequences, [0.8])
assert largest_of_all(ours, scores) <= allowed
"""

from collections.abc import Sequence

import torch
from rounding import allowance, largest_difference
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_prepo.records import ScoredSequence

ATTENTIONS = ("sdpa", "eager")
"""Implementations of attention: the error of one of them may be small by chance."""


def model_of(directory: str, dtype=torch.float64, attention: str = "sdpa") -> PreTrainedModel:
    # experts one after the other: transformers' grouped product is for 32 bits and less
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, experts_implementation="eager", attn_implementation=attention
    )


@torch.no_grad()
def scores(
    model: PreTrainedModel, sequences: Sequence[ScoredSequence], temperature: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each sequence's `logprobs_T` and `entropy_T`, computed alone and without padding."""
    found = []
    for sequence in sequences:
        tokens = torch.tensor(sequence.tokens)
        logits_TV = model(tokens[None]).logits[0, sequence.start - 1 : -1] / temperature
        logp_TV = logits_TV.log_softmax(-1)
        logprobs_T = logp_TV.gather(1, tokens[sequence.start :, None])[:, 0]
        found.append((logprobs_T, -(logp_TV.exp() * logp_TV).sum(-1)))
    return found


def judged(
    directory: str, sequences: Sequence[ScoredSequence], temperatures: Sequence[float]
) -> list[tuple[list, float]]:
    """Return, for each temperature, the scores in float64 and what float32 ones may be off by."""
    exact, *others = (
        [scores(model, sequences, temperature) for temperature in temperatures]
        for model in (
            model_of(directory),
            *(model_of(directory, torch.float32, attention) for attention in ATTENTIONS),
        )
    )
    found = []
    for theirs, *imprecise in zip(exact, *others, strict=True):
        error = max(largest_of_all(one, theirs) for one in imprecise)
        size = torch.cat([entropy_T for _, entropy_T in theirs]).mean().item()
        found.append((theirs, allowance(error, size)))
    return found


def largest_of_all(ours, theirs) -> float:
    """Return the largest difference of two lists of scores, in nats."""
    pairs = zip(ours, theirs, strict=True)
    return max(largest_difference(a, b) for both in pairs for a, b in zip(*both, strict=True))
