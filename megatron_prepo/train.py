"""PREPO's training loop (arXiv 2511.00794), the same on every rank.

    score the candidate prompts -> choose those in the perplexity window -> roll them out -> grade
    -> group-relative advantages -> old log-probabilities and entropies -> relative-entropy weights
    -> clipped policy updates -> give the engine the new weights

Letters: P candidates, K selected prompts, G rollouts each, N = K*G rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_prepo import preflight
from megatron_prepo.actor import parallel
from megatron_prepo.actor.model import DTYPES, describe
from megatron_prepo.actor.policy import Actor, Scores, TrainingSequence
from megatron_prepo.advantages import group_advantages, zero_variance
from megatron_prepo.config import Config
from megatron_prepo.data import CandidateBatches
from megatron_prepo.entropy_weights import relative_entropy_weights
from megatron_prepo.evaluate import Evaluation, evaluate
from megatron_prepo.ledger import LedgerEntry
from megatron_prepo.loss import rollout_coefficients, truncated_importance
from megatron_prepo.metrics import rollout_metrics, selection_metrics
from megatron_prepo.perplexity import prompt_scores
from megatron_prepo.records import Prompt, Rollout, ScoredSequence
from megatron_prepo.rewards import FUNCTIONS, grade
from megatron_prepo.rollout.embedded import EmbeddedEngine
from megatron_prepo.rollout.sglang.engine import SGLangEngine
from megatron_prepo.run import Run
from megatron_prepo.selection import METHODS
from megatron_prepo.selection.candidates import Candidates
from megatron_prepo.throughput import Throughput
from megatron_prepo.weight_sync import sync_weights


def train(config: Config) -> dict:
    """Run the configuration to its end; returns the summary, which is also in the run's directory.

    Collective: every rank of the job calls it.  Raises UserError for a wrong input before any
    weight is loaded.
    """
    inputs = preflight.check(config)
    parallel.initialize(config.parallel, config.train.seed)
    run = Run(config, rank=dist.get_rank())
    run.say(describe(config))
    if config.sglang and (config.rollout.engine == "embedded" or config.servers.urls):
        run.say("the section sglang: is for servers that the run starts, and is ignored here")
    text = inputs.train_prompts[0].tokens
    with run.seconds("setup"):
        engine = build_engine(config, inputs.tokenizer, run.say)
        preflight.check_engine(config, engine)
        actor = Actor(config)
        sync_weights(actor, engine, config, text)
    throughput = Throughput(config, actor.hf)
    seed, total_steps = config.train.seed, config.train.total_steps
    batches = CandidateBatches(inputs.train_prompts, config.selection.num_candidates, seed)
    selector = METHODS[config.selection.method](
        config.selection, total_steps=total_steps, seed=seed, pass_reward=config.reward.high
    )

    def held_out(**options) -> Evaluation:
        return evaluate_held_out(config, engine, inputs.eval_prompts, **options)

    before = run.evaluate(held_out, "before", 0, config.eval.samples_per_prompt)
    for step in run.steps():
        with run.seconds("perplexity"):
            candidates = look_at(config, actor, selector, batches.next())
        with run.seconds("probes"):
            candidates, probes = probe(config, engine, selector, candidates, step)
        paid = Groups()
        while chosen := selector.choose(candidates, step):
            parallel.assert_equal_on_all_ranks("the selection", chosen)
            selected = [candidates.prompts[i] for i in chosen]
            with run.seconds("rollouts"):
                rollouts = roll_out(config, engine, selected, f"rollouts/{step}")
            with run.seconds("rewards"):
                rewards_KG = rewards_of(config, rollouts).view(len(selected), -1)
            selector.observe(selected, rewards_KG)
            paid = paid.and_also(chosen, rollouts, rewards_KG)
            if not selector.refills:
                break
        groups = paid.trained_on(config.selection.num_selected)

        with run.seconds("old_logprobs"):
            old = score_rollouts(config, actor, groups.rollouts)
        with run.seconds("update"):
            weight_N, losses = update_policy(config, actor, groups.rollouts, groups.rewards_KG, old)
        with run.seconds("weight_sync"):
            sync_weights(actor, engine, config, text)

        run.record(
            step,
            ledger_entries(config, step, candidates, paid, probes, groups, old, weight_N),
            selection_metrics(candidates, paid.chosen, paid.rewards_KG)
            | selector.metrics()
            | old.metrics(weight_N, groups.rollouts)
            | losses
            | throughput.of_step(
                run.seconds,
                candidates,
                [scored_sequence(rollout) for rollout in groups.rollouts],
                groups.rewards_KG,
            ),
        )
        if due(step, config.eval.every) and not run.is_last(step):
            run.evaluate(held_out, "during", step + 1, config.eval.samples_during)
        if due(step, config.checkpoint.every) or run.is_last(step):
            with run.seconds("checkpoint"):
                actor.save(run.directory / "checkpoints", step=step + 1)

    after = run.evaluate(held_out, "after", step + 1, config.eval.samples_per_prompt)
    with run.seconds("export"):
        actor.export(run.directory / "hf", write=run.writes)
    engine.close()
    return run.finish(before, after, ranks=dist.get_world_size())


def build_engine(config: Config, tokenizer, say) -> EmbeddedEngine | SGLangEngine:
    """The engine that `rollout.engine` names, still without weights."""
    if config.rollout.engine == "sglang":
        return SGLangEngine(
            config,
            tokenizer,
            device=parallel.device(),
            rank=dist.get_rank(),
            share=parallel.from_rank_zero_when_done,
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


def look_at(config: Config, actor: Actor, selector, prompts: Sequence[Prompt]) -> Candidates:
    """The candidate prompts, scored by the current policy if the selector needs it."""
    if not selector.needs_scores:
        return Candidates(prompts)
    return Candidates(prompts, *prompt_scores(actor, prompts, config.selection.ppl_tokens))


def probe(
    config: Config, engine, selector, candidates: Candidates, step: int
) -> tuple[Candidates, list[Rollout]]:
    """For the oracle, which is no method: the pass rate of every candidate, and what it cost."""
    if not selector.needs_pass_rates:
        return candidates, []
    probes = roll_out(config, engine, candidates.prompts, f"probes/{step}")
    passed_N = rewards_of(config, probes) >= config.reward.high
    pass_rate_P = passed_N.double().view(len(candidates.prompts), -1).mean(dim=1)
    return replace(candidates, pass_rate_P=pass_rate_P), probes


def roll_out(config: Config, engine, prompts: Sequence[Prompt], purpose: str) -> list[Rollout]:
    """G completions of each prompt, by the weights of the last update."""
    return engine.generate(
        prompts,
        samples_per_prompt=config.rollout.samples_per_prompt,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=f"{config.train.seed}/{purpose}",
    )


def rewards_of(config: Config, rollouts: Sequence[Rollout]) -> torch.Tensor:
    """`rewards_N`; every rank grades, and comes to the same, since the functions are pure."""
    reward = config.reward
    return torch.tensor(
        grade(rollouts, FUNCTIONS[reward.function], low=reward.low, high=reward.high)
    )


@dataclass(frozen=True)
class Groups:
    """K groups of G rollouts, in the order in which they were paid for."""

    chosen: tuple[int, ...] = ()
    """Each group's prompt, as a position among the candidates."""
    rollouts: tuple[Rollout, ...] = ()
    rewards_KG: torch.Tensor | None = None

    def and_also(self, chosen, rollouts, rewards_KG: torch.Tensor) -> "Groups":
        """With further groups behind."""
        if self.rewards_KG is not None:
            rewards_KG = torch.cat([self.rewards_KG, rewards_KG])
        return Groups((*self.chosen, *chosen), (*self.rollouts, *rollouts), rewards_KG)

    def trained_on(self, num_groups: int) -> "Groups":
        """The first `num_groups` with an advantage; others fill up where there are too few.

        Those add nothing to the gradient, but the batch and so the loss's normaliser stay as large.
        """
        useless_K, group_size = zero_variance(self.rewards_KG), self.rewards_KG.shape[1]
        kept = sorted(useless_K.int().argsort(stable=True)[:num_groups].tolist())
        return Groups(
            tuple(self.chosen[k] for k in kept),
            tuple(r for k in kept for r in self.rollouts[k * group_size : (k + 1) * group_size]),
            self.rewards_KG[kept],
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

    def metrics(self, weight_N: torch.Tensor, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Entropies, weights and the mismatch between engine and actor."""
        return rollout_metrics(
            self.entropy_N,
            weight_N,
            self.lengths_N,
            [rollout.finished for rollout in rollouts],
            torch.cat([score.logprobs_T for score in self.scores]),
            torch.cat([torch.tensor(rollout.engine_logprobs) for rollout in rollouts]),
        )


def score_rollouts(config: Config, actor: Actor, rollouts: Sequence[Rollout]) -> OldScores:
    """Old log-probabilities and entropies: always a pass of its own, PREPO's weights need it."""
    stale = [r.prompt.id for r in rollouts if r.weight_version != actor.updates]
    assert not stale, f"rollouts of {stale[:3]} come from weights other than the actor's"
    sequences = [scored_sequence(rollout) for rollout in rollouts]
    temperature = config.rollout.temperature
    scores = actor.score(sequences, temperature=temperature)
    references = None
    if config.loss.kl_coef:
        references = actor.reference_score(sequences, temperature=temperature)
    return OldScores(
        scores,
        references,
        entropy_N=torch.stack([score.entropy_T.double().mean() for score in scores]),
        lengths_N=torch.tensor([len(rollout.tokens) for rollout in rollouts]),
    )


def update_policy(
    config: Config,
    actor: Actor,
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
    return weight_N, {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}


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
    return ScoredSequence(prompt + rollout.tokens, start=len(prompt))


def training_sequence(
    config: Config, rollout: Rollout, old: OldScores, i: int, advantage, coefficient
) -> TrainingSequence:
    """Rollout i as the actor's update takes it."""
    importance_T, old_logprobs_T = None, old.scores[i].logprobs_T
    if config.loss.importance_cap is not None:
        engine_logprobs_T = torch.tensor(rollout.engine_logprobs)
        importance_T = truncated_importance(
            old_logprobs_T, engine_logprobs_T, config.loss.importance_cap
        )
    return TrainingSequence(
        sequence=scored_sequence(rollout),
        old_logprobs_T=old_logprobs_T,
        advantage=float(advantage),
        coefficient=float(coefficient),
        importance_T=importance_T,
        reference_logprobs_T=old.references[i].logprobs_T if old.references else None,
    )


def evaluate_held_out(config: Config, engine, prompts: Sequence[Prompt], **options) -> Evaluation:
    """avg@k on held-out prompts, with the same random numbers each time."""
    return evaluate(
        engine.generate,
        prompts,
        lambda rollouts: rewards_of(config, rollouts),
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
    probes: Sequence[Rollout],
    groups: Groups,
    old: OldScores,
    weight_N: torch.Tensor,
) -> list[LedgerEntry]:
    """One entry for every rollout of this step: trained on, dropped, or a probe."""
    group_size = config.rollout.samples_per_prompt
    position_of = {prompt.id: i for i, prompt in enumerate(candidates.prompts)}
    trained = {(id(rollout)): i for i, rollout in enumerate(groups.rollouts)}
    rollouts = [*paid.rollouts, *probes]
    rewards_N = torch.cat([paid.rewards_KG.flatten(), rewards_of(config, probes)])
    zero_variance_K = zero_variance(rewards_N.view(-1, group_size)).tolist()
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
                reward=float(rewards_N[n]),
                length=len(rollout.tokens),
                finished=rollout.finished,
                mean_entropy=None if i is None else float(old.entropy_N[i]),
                weight=None if i is None else float(weight_N[i]),
                zero_variance=zero_variance_K[n // group_size],
                weight_version=rollout.weight_version,
                aborted=rollout.aborted,
            )
        )
    return entries


def due(step: int, every: int) -> bool:
    """Whether something periodic follows this step, counted from 0."""
    return every > 0 and (step + 1) % every == 0
