"""PREPO's training loop (arXiv 2511.00794), the same on every rank.

    score the candidate prompts -> choose those in the perplexity window -> roll them out -> grade
    -> group-relative advantages -> old log-probabilities and entropies -> relative-entropy weights
    -> clipped policy updates -> give the engine the new weights

Letters: P candidates, K selected prompts, G rollouts each, N = K*G rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from megatron_prepo import preflight
from megatron_prepo.actor import parallel
from megatron_prepo.actor.model import DTYPES, describe
from megatron_prepo.actor.policy import Actor, Scores, TrainingSequence
from megatron_prepo.advantages import group_advantages, zero_variance
from megatron_prepo.config import Config, LossConfig
from megatron_prepo.data import CandidateBatches
from megatron_prepo.dump import StepRecord
from megatron_prepo.entropy_weights import relative_entropy_weights
from megatron_prepo.evaluate import Evaluation, evaluate
from megatron_prepo.journal import Journal
from megatron_prepo.ledger import LedgerEntry
from megatron_prepo.loss import rollout_coefficients
from megatron_prepo.metrics import grading_metrics, rollout_metrics, selection_metrics
from megatron_prepo.mismatch import importance, importance_metrics, mismatch_metrics
from megatron_prepo.perplexity import check_agreement, engine_perplexities, prompt_scores
from megatron_prepo.records import Prompt, Rollout, ScoredSequence
from megatron_prepo.resume import Checkpoints
from megatron_prepo.rewards.pool import Grade, Grader
from megatron_prepo.rollout.embedded import EmbeddedEngine
from megatron_prepo.rollout.sglang.engine import SGLangEngine
from megatron_prepo.run import Run
from megatron_prepo.selection import METHODS
from megatron_prepo.selection.candidates import Candidates
from megatron_prepo.stop import StopRequests
from megatron_prepo.throughput import Throughput
from megatron_prepo.updates import NoUpdates, StepUpdates, Updates
from megatron_prepo.weight_sync import sync_weights


def train(config: Config) -> dict:
    """Run the configuration to its end; returns the summary, which is also in the run's directory.

    Collective: every rank of the job calls it.  Raises UserError for a wrong input before any
    weight is loaded.
    """
    job = set_up(config)
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
                learner = job.updates.of_step(groups.record(config, step, candidates, old))
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
                    | job.speed(candidates, groups),
                )
                checkpoints.mark()
            job.save_if_due(checkpoints, step)
        after = job.evaluate("after", config.eval.samples_per_prompt)
        with run.seconds("checkpoint"):
            checkpoints.finish()

    return job.finish(after)


@dataclass(frozen=True)
class Job:
    """What a loop works with, on each rank."""

    config: Config
    inputs: preflight.Inputs
    run: Run
    stop: StopRequests
    journal: Journal
    engine: EmbeddedEngine | SGLangEngine
    actor: Actor
    updates: Updates | NoUpdates
    grader: Grader
    batches: CandidateBatches
    selector: object
    throughput: Throughput

    def go_on(self, parts: dict[str, object]) -> Checkpoints:
        """Set actor and parts to the last checkpoint, if there is one, and the engine to them."""
        with self.run.seconds("setup"):
            checkpoints = Checkpoints(self.config, self.actor, parts, self.journal, self.run.say)
            checkpoints.restore()
            self.sync()
        return checkpoints

    def sync(self) -> None:
        """Give the engine the actor's weights."""
        probe = self.inputs.train_prompts[0].tokens
        sync_weights(self.actor, self.engine, self.config, probe)

    def evaluate(self, when: str, samples: int) -> Evaluation:
        """avg@k on held-out prompts; written, and shown."""

        def held_out(**options) -> Evaluation:
            return evaluate_held_out(
                self.config, self.engine, self.grader, self.inputs.eval_prompts, **options
            )

        return self.run.evaluate(held_out, when, self.run.num_steps, samples)

    def save_if_due(self, checkpoints: Checkpoints, step: int) -> None:
        """Between two steps: finish what is written, and save if settings or a signal ask for it.

        Raises Stopped on all ranks, behind the checkpoint, if one was asked to stop.
        """
        stopping = self.stop.anywhere()
        with self.run.seconds("checkpoint"):
            checkpoints.finish_if_done()
            if due(step, self.config.checkpoint.every) or self.run.is_last(step) or stopping:
                checkpoints.save()
            if stopping:
                checkpoints.finish()
                raise self.stop.stopped(self.run.num_steps)

    def speed(self, candidates: Candidates, groups: "Groups") -> dict[str, float]:
        """Rates of the actor's passes in the step that is about to be recorded."""
        sequences = [scored_sequence(rollout) for rollout in groups.rollouts]
        return self.throughput.of_step(self.run.seconds, candidates, sequences, groups.rewards_KG)

    def finish(self, after: Evaluation) -> dict:
        """Export the weights and end everything; returns the summary."""
        with self.run.seconds("export"):
            self.actor.export(self.run.directory / "hf", write=self.run.writes)
        self.engine.close()
        self.grader.close()
        self.journal.close()
        return self.run.finish(after, ranks=dist.get_world_size())


def set_up(config: Config) -> Job:
    """Read the inputs, join the other ranks, build engine and actor; collective."""
    inputs = preflight.check(config)
    parallel.initialize(config.parallel, config.train.seed)
    stop = StopRequests(config.checkpoint.grace_seconds, gather=parallel.gather_to_all)
    run = Run(config, rank=dist.get_rank())
    run.say(describe(config))
    if config.sglang and (config.rollout.engine == "embedded" or config.servers.urls):
        run.say("the section sglang: is for servers that the run starts, and is ignored here")
    seed, total_steps = config.train.seed, config.train.total_steps
    batches = CandidateBatches(inputs.train_prompts, config.selection.num_candidates, seed)
    selector = METHODS[config.selection.method](
        config.selection, total_steps=total_steps, seed=seed, pass_reward=config.reward.high
    )
    journal = Journal(run.directory / "journal", dist.get_rank(), share=parallel.from_rank_zero)
    with run.seconds("setup"):
        grader = build_grader(config, run.say)
        engine = build_engine(config, inputs.tokenizer, run.say)
        preflight.check_engine(config, engine)
        actor = Actor(config)
    updates = (NoUpdates if config.debug.mode == "rollout" else Updates)(config, actor, run)
    return Job(
        config=config,
        inputs=inputs,
        run=run,
        stop=stop,
        journal=journal,
        engine=engine,
        actor=actor,
        updates=updates,
        grader=grader,
        batches=batches,
        selector=selector,
        throughput=Throughput(config, actor.hf),
    )


def build_engine(config: Config, tokenizer, say) -> EmbeddedEngine | SGLangEngine:
    """The engine that `rollout.engine` names, still without weights."""
    if config.rollout.engine == "sglang":
        return SGLangEngine(
            config,
            tokenizer,
            device=parallel.device(),
            rank=dist.get_rank(),
            share=parallel.from_rank_zero_when_done,
            gather=parallel.gather_to_all,
            say=say,
        )
    return EmbeddedEngine(
        config.model.hf,
        tokenizer,
        dtype=DTYPES[config.model.dtype],
        fp32_lm_head=config.model.fp32_lm_head,
        device=parallel.device(),
        batch_size=config.rollout.batch_size,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        gather=parallel.gather_to_all,
    )


def build_grader(config: Config, say) -> Grader:
    """Grading processes beside rank 0, which share what they find."""
    return Grader(
        config.reward, rank=dist.get_rank(), share=parallel.from_rank_zero_when_done, say=say
    )


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


def rewards_of(grades: Sequence[Grade]) -> torch.Tensor:
    """`rewards_N`."""
    return torch.tensor([grade.reward for grade in grades])


@dataclass(frozen=True)
class Groups:
    """K groups of G rollouts, in the order in which they were paid for."""

    chosen: tuple[int, ...] = ()
    """Each group's prompt, as a position among the candidates."""
    rollouts: tuple[Rollout, ...] = ()
    grades: tuple[Grade, ...] = ()
    """One a rollout."""

    @property
    def rewards_KG(self) -> torch.Tensor:
        """What the grades are worth."""
        return rewards_of(self.grades).view(len(self.chosen), -1)

    def and_also(self, chosen, rollouts, grades) -> "Groups":
        """With further groups behind."""
        return Groups((*self.chosen, *chosen), (*self.rollouts, *rollouts), (*self.grades, *grades))

    def trained_on(self, num_groups: int) -> "Groups":
        """The first `num_groups` with an advantage; others fill up where there are too few.

        Those add nothing to the gradient, but the batch and so the loss's normaliser stay as large.
        """
        useless_K, group_size = zero_variance(self.rewards_KG), self.rewards_KG.shape[1]
        kept = sorted(useless_K.int().argsort(stable=True)[:num_groups].tolist())
        members = [k * group_size + g for k in kept for g in range(group_size)]
        return Groups(
            tuple(self.chosen[k] for k in kept),
            tuple(self.rollouts[i] for i in members),
            tuple(self.grades[i] for i in members),
        )

    def record(
        self, config: Config, step: int, candidates: Candidates, old: "OldScores"
    ) -> StepRecord:
        """For a dump."""
        return StepRecord(
            step,
            candidates,
            self.rollouts,
            self.rewards_KG.flatten(),
            old.scores,
            mini_batches(*self.rewards_KG.shape, config.train.mini_batches),
        )


@dataclass(frozen=True)
class OldScores:
    """The policy's view of the rollouts before the update."""

    scores: list[Scores]
    references: list[Scores] | None
    """The initial policy's, if there is a KL penalty."""
    entropy_N: torch.Tensor
    """Mean token entropy of each rollout."""
    lengths_N: torch.Tensor
    importance_N: list[torch.Tensor] | None = None
    """What each token of a rollout counts, if `loss.importance` is on."""
    staleness: int = 0
    """Optimizer updates between the weights that generated the rollouts and these."""
    routed_differently: float | None = None
    """Share of tokens and layers where the policy would have chosen other experts than the engine
    (`rollout.router_replay`)."""

    def metrics(
        self, settings: LossConfig, weight_N: torch.Tensor, rollouts: Sequence[Rollout]
    ) -> dict[str, float]:
        """Entropies, weights and the mismatch between engine and actor."""
        finished_N = [rollout.finished for rollout in rollouts]
        metrics = rollout_metrics(self.entropy_N, weight_N, self.lengths_N, finished_N)
        metrics["rollout/staleness"] = self.staleness
        metrics |= mismatch_metrics(
            [score.logprobs_T for score in self.scores],
            [torch.tensor(rollout.engine_logprobs) for rollout in rollouts],
        )
        if self.routed_differently is not None:
            metrics["mismatch/routed_differently"] = self.routed_differently
        if self.importance_N:
            metrics |= importance_metrics(settings, torch.cat(self.importance_N))
        return metrics


def score_rollouts(config: Config, actor: Actor, rollouts: Sequence[Rollout]) -> OldScores:
    """Old log-probabilities and entropies: always a pass of its own, PREPO's weights need it."""
    staleness = max(actor.updates - rollout.weight_version for rollout in rollouts)
    bound = config.train.mini_batches if config.train.overlap else 0
    assert 0 <= staleness <= bound, f"rollouts of {staleness} updates ago, and {bound} may be"
    sequences = [scored_sequence(rollout) for rollout in rollouts]
    temperature = config.rollout.temperature
    scores = actor.score(sequences, temperature=temperature)
    routed_differently = actor.routed_differently()
    references = None
    if config.loss.kl_coef:
        references = actor.reference_score(sequences, temperature=temperature)
    return OldScores(
        scores,
        references,
        entropy_N=torch.stack([score.entropy_T.double().mean() for score in scores]),
        lengths_N=torch.tensor([len(rollout.tokens) for rollout in rollouts]),
        importance_N=importance_of(config, scores, rollouts),
        staleness=staleness,
        routed_differently=routed_differently,
    )


def importance_of(
    config: Config, scores: Sequence[Scores], rollouts: Sequence[Rollout]
) -> list[torch.Tensor] | None:
    """What each token of a rollout counts, as the engine was more or less likely to choose it."""
    if config.loss.importance == "off":
        return None
    return [
        importance(config.loss, score.logprobs_T, torch.tensor(rollout.engine_logprobs))
        for score, rollout in zip(scores, rollouts, strict=True)
    ]


def update_policy(
    config: Config,
    actor: Actor | StepUpdates,
    rollouts: Sequence[Rollout],
    rewards_KG: torch.Tensor,
    old: OldScores,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The step's optimizer updates; returns `weight_N` and the updates' mean metrics."""
    advantage_N = group_advantages(
        rewards_KG, std=config.advantage.std, eps=config.advantage.eps
    ).flatten()
    weight_N = torch.ones_like(old.entropy_N)
    updates = []
    for batch in mini_batches(*rewards_KG.shape, config.train.mini_batches):
        weight_N[batch] = rollout_weights(config, old, rewards_KG, batch)
        coefficient_N = rollout_coefficients(
            weight_N[batch], old.lengths_N[batch], config.loss.aggregation
        )
        updates.append(
            actor.update(
                [
                    training_sequence(config, rollouts[i], old, i, advantage_N[i], coefficient)
                    for i, coefficient in zip(batch, coefficient_N, strict=True)
                ]
            )
        )
    return weight_N, mean_metrics(updates)


def mean_metrics(updates: Sequence[dict[str, float] | None]) -> dict[str, float]:
    """Means over the updates that were made, nothing if none was, and how many were skipped."""
    made = [update for update in updates if update is not None]
    means = {name: sum(u[name] for u in made) / len(made) for name in (made[0] if made else ())}
    return means | {"loss/skipped_updates": len(updates) - len(made)}


def mini_batches(num_groups: int, group_size: int, count: int) -> list[list[int]]:
    """Rollouts of each optimizer update; groups stay whole and are dealt out in turn.

    In turn, because selected prompts come sorted by perplexity: every update sees the whole window.

    >>> mini_batches(3, 2, 2)
    [[0, 1, 4, 5], [2, 3]]
    """
    return [
        [k * group_size + g for k in range(first, num_groups, count) for g in range(group_size)]
        for first in range(count)
    ]


def rollout_weights(
    config: Config, old: OldScores, rewards_KG: torch.Tensor, batch: Sequence[int]
) -> torch.Tensor:
    """The weights of one optimizer batch; its mean entropy is over that batch, of all ranks."""
    weighting = config.weighting
    if weighting.method == "none":
        return torch.ones(len(batch), dtype=old.entropy_N.dtype)
    counts_N = None
    if not weighting.include_zero_variance:
        counts_N = ~zero_variance(rewards_KG).repeat_interleave(rewards_KG.shape[1])[batch]
    return relative_entropy_weights(
        old.entropy_N[batch],
        old.lengths_N[batch],
        mean=weighting.mean,
        clamp=weighting.clamp,
        counts_N=counts_N,
    )


def scored_sequence(rollout: Rollout) -> ScoredSequence:
    """Prompt and completion; the completion is scored."""
    prompt = rollout.prompt.tokens
    return ScoredSequence(prompt + rollout.tokens, len(prompt), rollout.routing)


def training_sequence(
    config: Config, rollout: Rollout, old: OldScores, i: int, advantage, coefficient
) -> TrainingSequence:
    """Rollout i as the actor's update takes it."""
    return TrainingSequence(
        sequence=scored_sequence(rollout),
        old_logprobs_T=old.scores[i].logprobs_T,
        advantage=float(advantage),
        coefficient=float(coefficient),
        importance_T=old.importance_N[i] if old.importance_N else None,
        reference_logprobs_T=old.references[i].logprobs_T if old.references else None,
    )


def evaluate_held_out(
    config: Config, engine, grader: Grader, prompts: Sequence[Prompt], **options
) -> Evaluation:
    """avg@k on held-out prompts, with the same random numbers each time."""
    return evaluate(
        engine.generate,
        prompts,
        lambda rollouts: rewards_of(grader.grade(rollouts)),
        pass_reward=config.reward.high,
        temperature=config.eval.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=f"{config.train.seed}/evaluation",
        **options,
    )


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
                staleness=0 if i is None else old.staleness,
            )
        )
    return entries


def due(step: int, every: int) -> bool:
    """Whether something periodic follows this step, counted from 0."""
    return every > 0 and (step + 1) % every == 0
