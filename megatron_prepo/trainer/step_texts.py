"""The texts of a step and of an evaluation that a run keeps (`run/texts.py`)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from megatron_prepo.evaluation.completions import completion
from megatron_prepo.prepo.ppl_schedule import select_window
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.rollout.engine import Tokenizer
from megatron_prepo.rollout.pieces import pieces
from megatron_prepo.run.texts import ENTROPY_DIGITS, spread
from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.policy_update import TrainingBatch

Line: TypeAlias = dict[str, Any]


def rollout_texts(
    tokenizer: Tokenizer,
    step: int,
    candidates: Candidates,
    generated: Groups,
    batch: TrainingBatch,
    count: int | None,
) -> Line:
    """Return the line of a step: the window, and the rollouts of `count` prompts; None: all.

    The prompts are spread over those rolled out, in their order, which is by perplexity where
    perplexity selects.
    """
    order = _order(candidates)
    position = {p: place for place, p in enumerate(order)}
    members = generated.members
    trained = {id(rollout): i for i, rollout in enumerate(batch.groups.rollouts)}
    prompts = []
    for k in spread(len(generated.chosen), count):
        of_group = slice(members[k].start, members[k].stop)
        rollouts, grades = generated.rollouts[of_group], generated.grades[of_group]
        index = [trained.get(id(rollout)) for rollout in rollouts]
        line = _prompt(rollouts[0].prompt)
        if candidates.ppl_P is not None:
            line["position"] = position[generated.chosen[k]]
            line["ppl"] = _finite(candidates.ppl_P[generated.chosen[k]])
        line["rollouts"] = _rollouts(tokenizer, rollouts, grades, batch, index)
        prompts.append(line)
    return {
        "step": step,
        "ppl": None if candidates.ppl_P is None else [_finite(candidates.ppl_P[p]) for p in order],
        "chosen": sorted(position[p] for p in generated.chosen) if order else None,
        "prompts": prompts,
    }


def evaluation_texts(
    step: int, when: str, graded: Mapping[str, Sequence[tuple[Rollout, Grade]]], count: int | None
) -> Line:
    """Return the line of an evaluation: the completions of `count` of its prompts; None: all.

    `graded`: each held-out set's completions and their grades.  Of several sets, prompts are called
    SET/ID, since two of them may have a prompt of the same id.
    """
    samples: dict[str, list[Line]] = {}
    prompts: dict[str, Line] = {}
    for name, of_set in graded.items():
        for rollout, grade in of_set:
            prompt = _prompt(rollout.prompt)
            if len(graded) > 1:
                prompt["id"] = f"{name}/{prompt['id']}"
            prompts[prompt["id"]] = prompt
            samples.setdefault(prompt["id"], []).append(completion(rollout, grade))
    ids = list(prompts)
    kept = [ids[p] for p in spread(len(ids), count)]
    return {
        "step": step,
        "when": when,
        "prompts": [prompts[i] | {"completions": samples[i]} for i in kept],
    }


def _rollouts(
    tokenizer: Tokenizer,
    rollouts: Sequence[Rollout],
    grades: Sequence[Grade],
    batch: TrainingBatch,
    index: Sequence[int | None],
) -> list[Line]:
    """Return the rollouts of a prompt; `index`: of each in the batch, None if it was dropped."""
    advantage_N, masked = batch.advantage_N, batch.groups.masked
    lines = []
    texts = pieces(tokenizer, [rollout.tokens for rollout in rollouts])
    for rollout, grade, text, i in zip(rollouts, grades, texts, index, strict=True):
        learnt = i is not None and not masked[i]
        line = completion(rollout, grade) | {"aborted": rollout.aborted, "trained": learnt}
        line |= dict.fromkeys(("advantage", "weight", "mean_entropy", "entropy"))
        line["pieces"] = text
        if i is not None:
            entropies = batch.old_scores.scores[i].entropy_T.tolist()
            line["advantage"] = _finite(advantage_N[i])
            line["weight"] = _finite(batch.weight_N[i]) if learnt else None
            line["mean_entropy"] = _finite(batch.old_scores.entropy_N[i])
            line["entropy"] = [
                round(nats, ENTROPY_DIGITS) if math.isfinite(nats) else None for nats in entropies
            ]
        lines.append(line)
    return lines


def _prompt(prompt: Prompt) -> Line:
    return {"id": prompt.id, "text": prompt.text, "answer": prompt.answer}


def _order(candidates: Candidates) -> list[int]:
    """Return the candidates in the order that a window is taken from; empty without perplexity."""
    if candidates.ppl_P is None:
        return []
    return select_window(candidates.ppl_P, 0, len(candidates.prompts))


def _finite(value: Any) -> float | None:
    """Return a number, None for NaN and infinity, which JSON lacks."""
    number = float(value)
    return number if math.isfinite(number) else None
