"""Prompt perplexity under the current policy (arXiv 2511.00794, section 3.1).

P_i = exp(-(1/T) sum_t log pi(x_t | x_<t)), natural log, over the prompt's tokens that have a
predecessor, at temperature 1.  `selection.ppl_tokens=content` leaves the chat template out of the
sum (it stays in the condition).  The actor gives them, with entropies, or the engine, without.
"""

from collections.abc import Sequence

import torch

from megatron_prepo.records import Prompt, ScoredSequence
from megatron_prepo.trainer.step_metrics import spearman


def prompt_scores(
    actor, prompts: Sequence[Prompt], tokens: str = "all"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ppl_P` and `entropy_P`, the mean entropy; float64, identical on every rank.

    `actor.score` is one forward pass without gradient (see `megatron_prepo.actor.actor`).
    Not finite values are kept: selection sorts them last.
    """
    scores = actor.score([ScoredSequence(p.tokens, 1) for p in prompts], temperature=1.0)
    spans = [scored_span(prompt, tokens) for prompt in prompts]
    ppl = [perplexity(score.logprobs_T, s) for score, s in zip(scores, spans, strict=True)]
    entropy = [score.entropy_T[s].double().mean() for score, s in zip(scores, spans, strict=True)]
    return torch.stack(ppl), torch.stack(entropy)


def engine_perplexities(engine, prompts: Sequence[Prompt], tokens: str = "all") -> torch.Tensor:
    """`ppl_P` by the engine's log-probabilities; float64, identical on every rank."""
    scored = zip(engine.score_prompts(prompts), prompts, strict=True)
    return torch.stack(
        [perplexity(torch.tensor(logprobs), scored_span(p, tokens)) for logprobs, p in scored]
    )


def check_agreement(engine_ppl_P: torch.Tensor, actor_ppl_P: torch.Tensor, least: float) -> None:
    """ValueError if the engine's perplexities do not stand for the actor's.

    They do if the rank correlation is at least `least`; it counts as 0 where a side does not tell
    prompts apart.
    """
    agreement = spearman(engine_ppl_P, actor_ppl_P) or 0.0
    if agreement < least:
        raise ValueError(
            "selection.ppl_from=engine: the rank correlation of its perplexities with the actor's "
            f"is {agreement:.3f} over {len(actor_ppl_P)} prompts, below selection.ppl_agreement="
            f"{least:g}; set selection.ppl_from=actor, and look for the cause with "
            "tools/compare_logprobs.py"
        )


def perplexity(logprobs_T: torch.Tensor, span: slice = slice(None)) -> torch.Tensor:
    """exp of the mean negative log-probability, a float64 scalar.

    A uniform model over V tokens has perplexity V; the smallest possible value is 1.
    """
    return torch.exp(-logprobs_T[span].double().mean())


def scored_span(prompt: Prompt, tokens: str) -> slice:
    """Which of the prompt's log-probabilities count; entry 0 belongs to the prompt's second token.

    >>> p = Prompt("1", "hi there", "", tokens=(9, 5, 6, 7, 8), content=(2, 4))
    >>> scored_span(p, "all"), scored_span(p, "content")
    (slice(0, 4, None), slice(1, 3, None))
    """
    if tokens == "all":
        return slice(0, len(prompt.tokens) - 1)
    begin, end = prompt.content
    return slice(max(begin, 1) - 1, max(end, 2) - 1)
