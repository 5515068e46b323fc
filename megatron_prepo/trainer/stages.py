"""The stages of a step, in the order of the loop; each measures its own seconds.

    score the candidate prompts -> select those in the perplexity window -> roll them out -> grade
    -> old log-probabilities and entropies -> advantages -> relative-entropy weights
    -> clipped policy updates -> give the engine the new weights

All are collective, and their results the same on every rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from megatron_prepo.actor import parallel
from megatron_prepo.config import RolloutConfig
from megatron_prepo.prepo.advantages import group_advantages
from megatron_prepo.prepo.entropy_advantages import directions, entropy_advantages
from megatron_prepo.prepo.group_rows import as_rows, each_group, flat
from megatron_prepo.prepo.posterior_advantages import posterior_advantages
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.rollout.engine import Request
from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.mopps import PosteriorSampling
from megatron_prepo.selection.rounds import Choice, rounds
from megatron_prepo.trainer.groups import Groups, reward_tensor
from megatron_prepo.trainer.policy_update import (
    RolloutScores,
    TrainingBatch,
    score_rollouts,
    step_advantages,
    step_record,
    update_policy,
)
from megatron_prepo.trainer.prompt_scores import check_agreement, engine_perplexities, prompt_scores
from megatron_prepo.trainer.setup import Trainer, due
from megatron_prepo.trainer.step_ledger import ledger_entries
from megatron_prepo.trainer.step_metrics import grading_metrics, selection_metrics
from megatron_prepo.trainer.step_texts import rollout_texts


def score_candidates(trainer: Trainer, step: int) -> Candidates:
    """Return the next candidate prompts, scored by the current policy if the selector needs it."""
    with trainer.run.seconds("perplexity"):
        candidates = score(trainer, trainer.batches.next(), step)
    trainer.throughput.scored.append(candidates)
    return candidates


def score(trainer: Trainer, prompts: Sequence[Prompt], step: int) -> Candidates:
    """Return the prompts with the scores that the selector needs.

    `selection.ppl_from=engine`: by the engine's copy of the policy, which is compared with the
    actor in the first step and whenever an evaluation is due.
    """
    settings = trainer.config.selection
    scores_by_actor = partial(
        prompt_scores,
        trainer.actor,
        prompts,
        settings.ppl_tokens,
        projection_HD=trainer.projection_HD,
        share_prefix=trainer.config.train.share_prefixes,
    )
    if not trainer.selector.needs_scores:
        return Candidates(prompts)
    if settings.ppl_from == "actor":
        return Candidates(prompts, **scores_by_actor()._asdict())
    ppl_P, actor_ppl_P = engine_perplexities(trainer.engine, prompts, settings.ppl_tokens), None
    if step == 0 or due(step, trainer.config.eval.every):
        actor_ppl_P = scores_by_actor().ppl_P
        check_agreement(ppl_P, actor_ppl_P, settings.ppl_agreement)
    return Candidates(prompts, ppl_P, actor_ppl_P=actor_ppl_P)


def probe(trainer: Trainer, candidates: Candidates, step: int) -> tuple[Candidates, Groups]:
    """Return the candidates with their pass rates, and the rollouts that these took.

    For the oracle, which is no method: any other selector gets the candidates as they are.
    """
    with trainer.run.seconds("probes"):
        if not trainer.selector.needs_pass_rates:
            return candidates, Groups()
        samples = [range(trainer.config.rollout.samples_per_prompt)] * len(candidates.prompts)
        rollouts = generate(trainer, candidates.prompts, samples, f"probes/{step}")
        grades = trainer.grader.grade(rollouts)
    probes = Groups().extend(range(len(candidates.prompts)), rollouts, grades)
    rewards_PG = probes.reward_N.view(len(candidates.prompts), -1)
    pass_rate_P = (rewards_PG >= trainer.config.reward.high).double().mean(dim=1)
    return replace(candidates, pass_rate_P=pass_rate_P), probes


def select(trainer: Trainer, candidates: Candidates, step: int) -> Iterator[Choice]:
    """Yield the candidates to roll out: once, or until a method that refills has done.

    Between two rounds the caller lets the selector observe what came of the first (`grade`).
    """
    settings = trainer.config.selection
    what = f"selection.method={settings.method}: the choice of step {step}"
    for choice in rounds(
        trainer.selector,
        candidates,
        step,
        num_selected=settings.num_selected,
        group_size=trainer.config.rollout.samples_per_prompt,
        method=settings.method,
    ):
        parallel.assert_equal_on_all_ranks(
            f"{what}, which must follow from seed, step and observations,",
            (choice.positions, choice.sizes),
        )
        yield choice


def roll_out(trainer: Trainer, choice: Choice, purpose: str) -> list[Rollout]:
    """Return G completions of each prompt, or the choice's, by the weights of the last update."""
    with trainer.run.seconds("rollouts"):
        return generate(trainer, choice.prompts, choice.samples, purpose)


def grade(trainer: Trainer, choice: Choice, rollouts: Sequence[Rollout]) -> list[Grade]:
    """Return the grade of each rollout; the selector observes the rewards of their groups."""
    with trainer.run.seconds("rewards"):
        grades = trainer.grader.grade(rollouts)
    trainer.selector.observe(choice.prompts, choice.rewards(reward_tensor(grades)))
    return grades


def score_old_policy(trainer: Trainer, groups: Groups) -> RolloutScores:
    """Return log-probabilities and entropies of the rollouts by the policy before the update.

    Always a separate pass: the relative-entropy weights need it.
    """
    config = trainer.config
    with trainer.run.seconds("old_logprobs"):
        return score_rollouts(
            trainer.actor,
            groups.rollouts,
            temperature=config.rollout.temperature,
            loss=config.loss,
            max_staleness=config.train.mini_batches if config.train.overlap else 0,
        )


def compute_advantages(
    trainer: Trainer, groups: Groups, old_scores: RolloutScores
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Return `advantage_N`, and those of each rollout's tokens if they differ."""
    config = trainer.config
    if config.advantage.method == "posterior":
        return advantages_by_posterior(trainer, groups), None
    if config.advantage.method == "rl_zvp":
        return advantages_by_entropy(trainer, groups, old_scores)
    return step_advantages(config.advantage, config.loss, groups, old_scores)


def advantages_by_posterior(trainer: Trainer, groups: Groups) -> torch.Tensor:
    """Return `advantage_N` by the pass rates that the selector believes after this step."""
    settings, selector = trainer.config.advantage, trainer.selector
    assert isinstance(selector, PosteriorSampling), "the configuration allows no other"
    posterior_K2 = [selector.beta(prompt.id) for prompt in groups.prompts]
    alpha_K, beta_K = torch.tensor(posterior_K2, dtype=torch.float64).T
    passed = as_rows(groups.reward_N >= trainer.config.reward.high, groups.sizes)
    estimate = partial(posterior_advantages, std=settings.std, eps=settings.eps)
    return flat(each_group(estimate, passed, alpha_K, beta_K))


def advantages_by_entropy(
    trainer: Trainer, groups: Groups, old_scores: RolloutScores
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return group-relative advantages, and by token entropy where a group has no variance."""
    settings, shaped = trainer.config.advantage, groups.shaped_rewards
    by_group = partial(group_advantages, std=settings.std, eps=settings.eps)
    sign = partial(directions, pass_reward=trainer.config.reward.high)
    advantages = entropy_advantages(
        flat(each_group(by_group, shaped)),
        flat(each_group(sign, groups.rewards, shaped)),
        [scores.entropy_T for scores in old_scores.scores],
        scale=settings.zvp_scale,
    )
    return torch.stack([advantage_T.mean() for advantage_T in advantages]), advantages


def update(
    trainer: Trainer, step: int, candidates: Candidates, batch: TrainingBatch
) -> dict[str, float]:
    """Make the optimizer updates of the step; returns the mean of their metrics.

    One that is not finite is skipped; `debug.dump_steps` names those to dump.
    """
    num_mini_batches = trainer.config.train.mini_batches
    with trainer.run.seconds("update"):
        record = step_record(step, candidates, batch, num_mini_batches)
        metrics = update_policy(
            trainer.updates.of_step(record),
            batch,
            aggregation=trainer.config.loss.aggregation,
            num_mini_batches=num_mini_batches,
            max_tokens=trainer.config.rollout.max_new_tokens,
        )
    if trainer.selector.needs_updates:
        trainer.selector.observe_update(update_size(metrics, trainer.config.optimizer.clip_grad))
    return metrics


def update_size(metrics: Mapping[str, float], clip_grad: float) -> float:
    """Return learning rate times norm of the clipped gradient, each the mean of the step's updates.

    0 if all updates were skipped.

    >>> update_size({"loss/learning_rate": 0.5, "loss/grad_norm": 3.0}, clip_grad=1.0)
    0.5
    >>> update_size({"loss/skipped_updates": 1}, clip_grad=1.0)
    0.0
    """
    if "loss/grad_norm" not in metrics:
        return 0.0
    return metrics["loss/learning_rate"] * min(metrics["loss/grad_norm"], clip_grad)


@contextmanager
def recorded(
    trainer: Trainer,
    step: int,
    candidates: Candidates,
    generated: Groups,
    probes: Groups,
    batch: TrainingBatch,
    metrics: dict[str, float],
) -> Iterator[None]:
    """Record the step in ledger and metrics after a block that gives the engine its weights.

    Even if the engine fails in that block: the step itself is done.
    """
    method = trainer.config.selection.name
    try:
        yield
    finally:
        entries = ledger_entries(method, step, candidates, generated, probes, batch)
        trainer.run.record(
            step,
            entries,
            selection_metrics(candidates, generated)
            | grading_metrics(generated.grades)
            | batch.metrics(trainer.config.loss)
            | metrics
            | trainer.speed(batch),
        )
        if (count := trainer.config.texts.rollouts) != 0:
            texts = partial(rollout_texts, trainer.inputs.tokenizer, step, candidates)
            trainer.run.keep("rollouts", lambda: texts(generated, batch, count))
        trainer.checkpoints.mark()


def sync_weights(trainer: Trainer) -> None:
    """Give the engine the weights of the last update."""
    with trainer.run.seconds("weight_sync"):
        trainer.sync()


def generate(
    trainer: Trainer, prompts: Sequence[Prompt], samples: Sequence[range], purpose: str
) -> list[Rollout]:
    """Return these samples of each prompt; those in the journal are not generated again."""
    config, engine, journal = trainer.config, trainer.engine, trainer.journal
    rollouts = engine.generate(
        rollout_request(
            prompts,
            purpose,
            config.rollout,
            config.train.seed,
            samples=samples,
            cached=journal.find(purpose, engine.weight_version, prompts, samples),
            on_rollouts=partial(journal.add, purpose),
        )
    )
    journal.force()
    return rollouts


def rollout_request(
    prompts: Sequence[Prompt],
    purpose: str,
    settings: RolloutConfig,
    seed: int,
    *,
    samples: Sequence[range] | None = None,
    **options: Any,
) -> Request:
    """Return the request for these samples of each prompt; by default G of each.

    `purpose` and seed of the run name its random numbers; `options` are further fields of Request.
    """
    return Request(
        prompts=prompts,
        samples_per_prompt=samples or settings.samples_per_prompt,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        seed=f"{seed}/{purpose}",
        routing=settings.router_replay,
        **options,
    )
