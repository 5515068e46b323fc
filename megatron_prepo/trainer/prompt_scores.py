"""The candidates' perplexities: by the actor, with entropies, or by the engine, without."""

from collections.abc import Sequence
from itertools import takewhile

import torch

from megatron_prepo.actor.actor import Actor, Scores
from megatron_prepo.prepo.perplexity import perplexity, scored_span
from megatron_prepo.records import Prompt, ScoredSequence
from megatron_prepo.rollout.engine import Engine
from megatron_prepo.trainer.step_metrics import spearman


def prompt_scores(
    actor: Actor, prompts: Sequence[Prompt], tokens: str = "all", *, share_prefix: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `ppl_P` and `entropy_P`, the mean entropy; float64, identical on every rank.

    `actor.score` is one forward pass without gradient (see `megatron_prepo.actor.actor`).
    Non-finite values are kept: selection sorts them last.

    `share_prefix`: scores what all prompts begin with (the chat template, few-shot examples) once,
    for an actor with `train.share_prefixes`, which then also computes it once per row.
    """
    scores = whole_scores(actor, [prompt.tokens for prompt in prompts], share_prefix)
    spans = [prompt_span(prompt, tokens) for prompt in prompts]
    ppl = [perplexity(score.logprobs_T, s) for score, s in zip(scores, spans, strict=True)]
    entropy = [score.entropy_T[s].double().mean() for score, s in zip(scores, spans, strict=True)]
    return torch.stack(ppl), torch.stack(entropy)


def whole_scores(
    actor: Actor, prompts: Sequence[tuple[int, ...]], share_prefix: bool
) -> list[Scores]:
    """Return the scores of all tokens of the prompts except the first."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    common = min(len(list(same)), *(len(tokens) - 1 for tokens in prompts))
    if not share_prefix or common < 2:
        return actor.score([ScoredSequence(tokens, 1) for tokens in prompts], temperature=1.0)
    sequences = [ScoredSequence(tokens, common) for tokens in prompts]
    prefix = ScoredSequence(prompts[0][:common], 1)
    first, *others = actor.score([prefix, *sequences], temperature=1.0)
    return [
        Scores(
            torch.cat([first.logprobs_T, other.logprobs_T]),
            torch.cat([first.entropy_T, other.entropy_T]),
        )
        for other in others
    ]


def engine_perplexities(
    engine: Engine, prompts: Sequence[Prompt], tokens: str = "all"
) -> torch.Tensor:
    """Return `ppl_P` by the engine's log-probabilities; float64, identical on every rank."""
    scored = zip(engine.score_prompts(prompts), prompts, strict=True)
    return torch.stack(
        [perplexity(torch.tensor(logprobs), prompt_span(p, tokens)) for logprobs, p in scored]
    )


def check_agreement(engine_ppl_P: torch.Tensor, actor_ppl_P: torch.Tensor, least: float) -> None:
    """Raise ValueError if the engine's perplexities cannot replace the actor's.

    Their rank correlation must be at least `least`; it counts as 0 if either side is constant.
    """
    agreement = spearman(engine_ppl_P, actor_ppl_P) or 0.0
    if agreement < least:
        raise ValueError(
            "selection.ppl_from=engine: the rank correlation of its perplexities with the actor's "
            f"is {agreement:.3f} over {len(actor_ppl_P)} prompts, below selection.ppl_agreement="
            f"{least:g}; set selection.ppl_from=actor, and look for the cause with "
            "tools/inspect/compare_logprobs.py"
        )


def prompt_span(prompt: Prompt, tokens: str) -> slice:
    """Return the slice of a prompt's log-probabilities that `selection.ppl_tokens` selects."""
    return scored_span(len(prompt.tokens), prompt.content if tokens == "content" else None)
