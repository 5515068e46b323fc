"""The candidates' perplexities: by the actor, with entropies, or by the engine, without."""

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch

from megatron_prepo.actor.actor import Actor, Scores
from megatron_prepo.prepo.perplexity import perplexity, scored_span
from megatron_prepo.records import Prompt, ScoredSequence
from megatron_prepo.rollout.engine import Engine
from megatron_prepo.trainer.step_metrics import spearman


class PromptScores(NamedTuple):
    """Perplexity, mean entropy and, if asked for, features of P prompts; float64."""

    ppl_P: torch.Tensor
    entropy_P: torch.Tensor
    hidden_PD: torch.Tensor | None = None


def prompt_scores(
    actor: Actor,
    prompts: Sequence[Prompt],
    tokens: str = "all",
    *,
    projection_HD: torch.Tensor | None = None,
    share_prefix: bool = False,
) -> PromptScores:
    """Return the scores of prompts, identical on every rank.

    `actor.score` is one forward pass without gradient (see `megatron_prepo.actor.actor`).
    Non-finite values are kept: selection sorts them last.

    `share_prefix`: scores what all prompts begin with (the chat template, few-shot examples) once,
    for an actor with `train.share_prefixes`, which then also computes it once per row.
    """
    tokens_P = [prompt.tokens for prompt in prompts]
    scores = whole_scores(actor, tokens_P, share_prefix, projection_HD)
    spans = [prompt_span(prompt, tokens) for prompt in prompts]
    ppl = [perplexity(score.logprobs_T, s) for score, s in zip(scores, spans, strict=True)]
    entropy = [score.entropy_T[s].double().mean() for score, s in zip(scores, spans, strict=True)]
    hidden = [score.hidden_D.double() for score in scores if score.hidden_D is not None]
    hidden_PD = torch.stack(hidden) if hidden else None
    return PromptScores(torch.stack(ppl), torch.stack(entropy), hidden_PD)


def projection(hidden_size: int, features: int, seed: int) -> torch.Tensor:
    """Return `projection_HD`, random directions of the hidden states."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(hidden_size, features, generator=draw)


def whole_scores(
    actor: Actor,
    prompts: Sequence[tuple[int, ...]],
    share_prefix: bool,
    projection_HD: torch.Tensor | None = None,
) -> list[Scores]:
    """Return the scores of all tokens of the prompts except the first."""
    score = partial(actor.score, temperature=1.0)
    if projection_HD is not None:
        score = partial(score, projection_HD=projection_HD)
    same = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    common = min(len(list(same)), *(len(tokens) - 1 for tokens in prompts))
    if not share_prefix or common < 2:
        return score([ScoredSequence(tokens, 1) for tokens in prompts])
    sequences = [ScoredSequence(tokens, common) for tokens in prompts]
    prefix = ScoredSequence(prompts[0][:common], 1)
    first, *others = score([prefix, *sequences])
    return [joined(first, other) for other in others]


def joined(first: Scores, second: Scores) -> Scores:
    """Return the scores of two parts of a sequence as those of the whole."""
    hidden_D = None
    if first.hidden_D is not None and second.hidden_D is not None:
        in_first, in_second = len(first.logprobs_T), len(second.logprobs_T)
        sum_D = in_first * first.hidden_D + in_second * second.hidden_D
        hidden_D = sum_D / (in_first + in_second)
    return Scores(
        torch.cat([first.logprobs_T, second.logprobs_T]),
        torch.cat([first.entropy_T, second.entropy_T]),
        hidden_D,
    )


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
