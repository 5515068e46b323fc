"""PREPO's training loop (arXiv 2511.00794), the same on every rank.

    score the candidate prompts -> choose those in the perplexity window -> roll them out -> grade
    -> group-relative advantages -> old log-probabilities and entropies -> relative-entropy weights
    -> clipped policy updates -> give the engine the new weights

Letters: P candidates, K selected prompts, G rollouts each, N = K*G rollouts.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from megatron_prepo.actor import parallel
from megatron_prepo.actor.actor import Actor
from megatron_prepo.config import Config
from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grader
from megatron_prepo.run.ledger import LedgerEntry
from megatron_prepo.run.rollout_journal import Journal
from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer.groups import Groups, rewards_of
from megatron_prepo.trainer.policy_update import (
    OldScores,
    score_rollouts,
    step_record,
    update_policy,
)
from megatron_prepo.trainer.prompt_scores import check_agreement, engine_perplexities, prompt_scores
from megatron_prepo.trainer.setup import due, set_up
from megatron_prepo.trainer.step_metrics import grading_metrics, selection_metrics


def train(config: Config) -> dict:
    """Run the configuration to its end; returns the summary, which is also in the run's directory.

    Collective: every rank of the job calls it.  Raises UserError for a wrong input before any
    weight is loaded.
    """
    job = set_up(config)
    config = job.config
    run, engine, actor = job.run, job.engine, job.actor
    selector, journal, grader = job.selector, job.journal, job.grader
    checkpoints = job.go_on(
        {"run": run, "batches": job.batches, "selector": selector, "updates": job.updates}
    )
    with checkpoints.saved_if_the_engine_fails():
        if run.before is None:
            run.before = job.evaluate("before", config.eval.samples_per_prompt)
        for step in run.steps():
            if step > 0 and due(step - 1, config.eval.every):
                job.evaluate("during", config.eval.samples_during)
            with run.seconds("perplexity"):
                candidates = look_at(config, actor, engine, selector, job.batches.next(), step)
            with run.seconds("probes"):
                candidates, probes = probe(
                    config, engine, journal, grader, selector, candidates, step
                )
            paid = Groups()
            while chosen := selector.choose(candidates, step):
                parallel.assert_equal_on_all_ranks("the selection", chosen)
                selected = [candidates.prompts[i] for i in chosen]
                with run.seconds("rollouts"):
                    rollouts = roll_out(config, engine, journal, selected, f"rollouts/{step}")
                with run.seconds("rewards"):
                    grades = grader.grade(rollouts)
                selector.observe(selected, rewards_of(grades).view(len(selected), -1))
                paid = paid.and_also(chosen, rollouts, grades)
                if not selector.refills:
                    break
            groups = paid.trained_on(config.selection.num_selected)

            with run.seconds("old_logprobs"):
                old = score_rollouts(config, actor, groups.rollouts)
            with run.seconds("update"):
                learner = job.updates.of_step(step_record(config, step, candidates, groups, old))
                weight_N, losses = update_policy(
                    config, learner, groups.rollouts, groups.rewards_KG, old
                )
            try:
                with run.seconds("weight_sync"):
                    job.sync()
            finally:  # the step is done, whether or not the engine lives to see it
                run.record(
                    step,
                    ledger_entries(config, step, candidates, paid, probes, groups, old, weight_N),
                    selection_metrics(candidates, paid.chosen, paid.rewards_KG)
                    | grading_metrics(paid.grades)
                    | selector.metrics()
                    | old.metrics(config.loss, weight_N, groups.rollouts)
                    | losses
                    | job.speed([candidates], groups),
                )
                checkpoints.mark()
            job.save_if_due(checkpoints, step)
        after = job.evaluate("after", config.eval.samples_per_prompt)
        with run.seconds("checkpoint"):
            checkpoints.finish()

    return job.finish(after)


def look_at(
    config: Config, actor: Actor, engine, selector, prompts: Sequence[Prompt], step: int
) -> Candidates:
    """The candidate prompts, scored by the current policy if the selector needs it.

    By the engine's copy of it if the settings say so; then the actor is asked, too, now and then.
    """
    settings = config.selection
    if not selector.needs_scores:
        return Candidates(prompts)
    if settings.ppl_from == "actor":
        return Candidates(prompts, *prompt_scores(actor, prompts, settings.ppl_tokens))
    candidates = Candidates(prompts, engine_perplexities(engine, prompts, settings.ppl_tokens))
    if step == 0 or due(step, config.eval.every):
        actor_ppl_P, _ = prompt_scores(actor, prompts, settings.ppl_tokens)
        check_agreement(candidates.ppl_P, actor_ppl_P, settings.ppl_agreement)
        candidates = replace(candidates, actor_ppl_P=actor_ppl_P)
    return candidates


def probe(
    config: Config,
    engine,
    journal: Journal,
    grader: Grader,
    selector,
    candidates: Candidates,
    step: int,
) -> tuple[Candidates, "Groups"]:
    """For the oracle, which is no method: the pass rate of every candidate, and what it cost."""
    if not selector.needs_pass_rates:
        return candidates, Groups()
    rollouts = roll_out(config, engine, journal, candidates.prompts, f"probes/{step}")
    probes = Groups().and_also(range(len(candidates.prompts)), rollouts, grader.grade(rollouts))
    pass_rate_P = (probes.rewards_KG >= config.reward.high).double().mean(dim=1)
    return replace(candidates, pass_rate_P=pass_rate_P), probes


def roll_out(
    config: Config, engine, journal: Journal, prompts: Sequence[Prompt], purpose: str
) -> list[Rollout]:
    """G completions of each prompt, by the weights of the last update; paid for once."""
    rollouts = engine.generate(
        prompts,
        **sampling(config, purpose),
        paid=journal.find(purpose, engine.weight_version, prompts),
        keep=partial(journal.add, purpose),
    )
    journal.force()
    return rollouts


def sampling(config: Config, purpose: str) -> dict:
    """How rollouts are drawn; each purpose and step has random numbers of its own."""
    return {
        "samples_per_prompt": config.rollout.samples_per_prompt,
        "temperature": config.rollout.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": f"{config.train.seed}/{purpose}",
        "routing": config.rollout.router_replay,
    }


def ledger_entries(
    config: Config,
    step: int,
    candidates: Candidates,
    paid: Groups,
    probes: Groups,
    groups: Groups,
    old: OldScores,
    weight_N: torch.Tensor,
) -> list[LedgerEntry]:
    """One entry for every rollout of this step: trained on, dropped, or a probe."""
    group_size = config.rollout.samples_per_prompt
    position_of = {prompt.id: i for i, prompt in enumerate(candidates.prompts)}
    trained = {(id(rollout)): i for i, rollout in enumerate(groups.rollouts)}
    rollouts, grades = [*paid.rollouts, *probes.rollouts], [*paid.grades, *probes.grades]
    zero_variance_K = zero_variance(rewards_of(grades).view(-1, group_size)).tolist()
    entries = []
    for n, rollout in enumerate(rollouts):
        i = trained.get(id(rollout))
        ppl_P, p = candidates.ppl_P, position_of[rollout.prompt.id]
        entries.append(
            LedgerEntry(
                step=step,
                prompt_id=rollout.prompt.id,
                sample=n % group_size,
                selector=config.selection.method,
                purpose="probe" if n >= len(paid.rollouts) else "train",
                trained=i is not None,
                ppl=None if ppl_P is None else float(ppl_P[p]),
                reward=grades[n].reward,
                graded=grades[n].outcome,
                length=len(rollout.tokens),
                finished=rollout.finished,
                mean_entropy=None if i is None else float(old.entropy_N[i]),
                weight=None if i is None else float(weight_N[i]),
                zero_variance=zero_variance_K[n // group_size],
                weight_version=rollout.weight_version,
                aborted=rollout.aborted,
                staleness=0 if i is None else old.staleness_N[i],
            )
        )
    return entries
