"""A step's updates: old scores, relative-entropy weights, and the clipped loss's mini-batches.

Letters: K selected prompts, G rollouts each, N = K*G rollouts; K groups may differ in size.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_prepo.actor.actor import Actor, Scores, TrainingSequence
from megatron_prepo.config import AdvantageConfig, LossConfig, WeightingConfig
from megatron_prepo.debug.dump import StepRecord
from megatron_prepo.prepo.advantages import (
    batch_advantages,
    group_advantages,
    leave_one_out_advantages,
    penalised_rewards,
    token_advantages,
    zero_variance,
)
from megatron_prepo.prepo.entropy_weights import relative_entropy_weights
from megatron_prepo.prepo.group_rows import Rows, as_rows, each_group, flat
from megatron_prepo.prepo.importance import importance_weights
from megatron_prepo.prepo.loss import rollout_coefficients
from megatron_prepo.records import Rollout, scored_sequence
from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.guarded_update import Learner
from megatron_prepo.trainer.mismatch_metrics import importance_metrics, mismatch_metrics
from megatron_prepo.trainer.step_metrics import overlong_metrics, rollout_metrics


@dataclass(frozen=True)
class RolloutScores:
    """The policy's view of the rollouts before the update."""

    scores: list[Scores]
    references: list[Scores] | None
    """Scores by the initial policy, if there is a KL penalty."""
    entropy_N: torch.Tensor
    """Mean token entropy of each rollout."""
    lengths_N: torch.Tensor
    importance_weights_N: list[torch.Tensor] | None = None
    """Weight of each token of a rollout, if `loss.importance` is on."""
    staleness_N: tuple[int, ...] = ()
    """Optimizer updates since each rollout was generated.  The number varies within a step that was
    generated ahead when the engine failed, and completed after a resume."""
    routed_differently: float | None = None
    """Share of tokens and layers where the policy would have chosen other experts than the engine
    (`rollout.router_replay`)."""


@dataclass(frozen=True)
class TrainingBatch:
    """The N rollouts on which a step trains, with the inputs of the loss."""

    groups: Groups
    advantage_N: torch.Tensor
    old_scores: RolloutScores
    weight_N: torch.Tensor
    """Relative-entropy weights."""
    advantages_T: list[torch.Tensor] | None = None
    """Advantages of each rollout's tokens, if they differ; `advantage_N` are then their means."""

    def metrics(self, settings: LossConfig) -> dict[str, float]:
        """Return entropies, weights and the mismatch between engine and actor."""
        old_scores, rollouts = self.old_scores, self.groups.rollouts
        finished_N = [rollout.finished for rollout in rollouts]
        trained_N = ~torch.tensor(self.groups.masked)
        metrics = rollout_metrics(
            old_scores.entropy_N, self.weight_N[trained_N], old_scores.lengths_N, finished_N
        )
        metrics |= overlong_metrics(self.groups)
        metrics["rollout/staleness"] = max(old_scores.staleness_N, default=0)
        metrics |= mismatch_metrics(
            [score.logprobs_T for score in old_scores.scores],
            [torch.tensor(rollout.engine_logprobs) for rollout in rollouts],
        )
        if old_scores.routed_differently is not None:
            metrics["mismatch/routed_differently"] = old_scores.routed_differently
        if old_scores.importance_weights_N:
            metrics |= importance_metrics(settings, torch.cat(old_scores.importance_weights_N))
        return metrics


def score_rollouts(
    actor: Actor,
    rollouts: Sequence[Rollout],
    *,
    temperature: float,
    loss: LossConfig,
    max_staleness: int = 0,
) -> RolloutScores:
    """Return the actor's scores of the rollouts, a forward pass without gradient; collective.

    `max_staleness`: maximum number of optimizer updates since a rollout was generated.
    """
    staleness_N = tuple(actor.updates - rollout.weight_version for rollout in rollouts)
    for staleness in staleness_N:
        assert 0 <= staleness <= max_staleness, (
            f"rollouts are {staleness} updates old, and at most {max_staleness} are allowed"
        )
    sequences = [scored_sequence(rollout) for rollout in rollouts]
    scores = actor.score(sequences, temperature=temperature)
    routed_differently = actor.routed_differently()
    references = None
    if loss.kl_coef:
        references = actor.reference_score(sequences, temperature=temperature)
    return RolloutScores(
        scores,
        references,
        entropy_N=torch.stack([score.entropy_T.double().mean() for score in scores]),
        lengths_N=torch.tensor([len(rollout.tokens) for rollout in rollouts]),
        importance_weights_N=weigh_by_importance(loss, scores, rollouts),
        staleness_N=staleness_N,
        routed_differently=routed_differently,
    )


def step_record(
    step: int, candidates: Candidates, batch: TrainingBatch, num_mini_batches: int
) -> StepRecord:
    """Return the record of the step for a dump."""
    return StepRecord(
        step,
        candidates,
        batch.groups.rollouts,
        batch.groups.reward_N,
        batch.old_scores.scores,
        batch.groups.mini_batches(num_mini_batches),
    )


def weigh_by_importance(
    settings: LossConfig, scores: Sequence[Scores], rollouts: Sequence[Rollout]
) -> list[torch.Tensor] | None:
    """Return the importance weight of each token, by its probabilities under actor and engine."""
    if settings.importance == "off":
        return None
    return [
        importance_weights(
            score.logprobs_T,
            torch.tensor(rollout.engine_logprobs),
            method=settings.importance,
            level=settings.importance_level,
            low=settings.importance_low,
            high=settings.importance_high,
        )
        for score, rollout in zip(scores, rollouts, strict=True)
    ]


def estimate_advantages(
    settings: AdvantageConfig, rewards: Rows, lengths_N: torch.Tensor
) -> torch.Tensor:
    """Return `advantage_N` by `advantage.method`.

    `rewards`: of each group; `lengths_N`: tokens of each rollout.
    """
    std: dict[str, Any] = {"std": settings.std, "eps": settings.eps}
    match settings.method:
        case "group":
            return flat(each_group(partial(group_advantages, **std), rewards))
        case "rloo":
            return flat(each_group(leave_one_out_advantages, rewards))
        case "reinforce++":
            return batch_advantages(flat(rewards), lengths_N, **std)
        case "reinforce++-baseline":
            centred = each_group(partial(group_advantages, std="none"), rewards)
            return batch_advantages(flat(centred), lengths_N, **std)


def step_advantages(
    settings: AdvantageConfig, loss: LossConfig, groups: Groups, old_scores: RolloutScores
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Return `advantage_N`, and those of each rollout's tokens if they differ.

    With `loss.kl_in_reward`, rewards are penalised by kl_coef (log pi_old - log pi_ref) per token:
    the k1 estimate of KL(old || reference).  Only REINFORCE++ then has advantages per token.
    """
    reward_N = groups.shaped_reward_N
    if loss.kl_in_reward:
        assert old_scores.references is not None, "there are references with loss.kl_coef > 0"
        penalties = [
            loss.kl_coef * (old.logprobs_T.double() - reference.logprobs_T.double())
            for old, reference in zip(old_scores.scores, old_scores.references, strict=True)
        ]
        if settings.method == "reinforce++":
            advantages = token_advantages(reward_N, penalties, std=settings.std, eps=settings.eps)
            return torch.stack([advantage_T.mean() for advantage_T in advantages]), advantages
        reward_N = penalised_rewards(reward_N, penalties)
    rewards = as_rows(reward_N, groups.sizes)
    return estimate_advantages(settings, rewards, old_scores.lengths_N), None


def update_policy(
    actor: Learner,
    batch: TrainingBatch,
    *,
    aggregation: str,
    num_mini_batches: int,
    max_tokens: int | None = None,
) -> dict[str, float]:
    """Make the step's optimizer updates; returns the mean of their metrics.

    `max_tokens`: maximum length of a completion, for an aggregation that divides by it.
    """
    groups, old_scores = batch.groups, batch.old_scores
    updates = []
    for index in groups.mini_batches(num_mini_batches):
        coefficient_N = rollout_coefficients(
            batch.weight_N[index],
            old_scores.lengths_N[index],
            aggregation,
            max_tokens=max_tokens,
        )
        mini_batch = [
            training_sequence(batch, i, batch.advantage_N[i], coefficient)
            for i, coefficient in zip(index, coefficient_N, strict=True)
        ]
        updates.append(actor.update(mini_batch))
    return mean_metrics(updates)


def mean_metrics(updates: Sequence[dict[str, float] | None]) -> dict[str, float]:
    """Return the mean of each metric over the updates that have it, and the skipped updates.

    An update without a token to train on has no ratio or divergence: it is not counted as 0.

    >>> mean_metrics([{"a": 1.0, "b": 3.0}, {"a": 2.0}, None])
    {'a': 1.5, 'b': 3.0, 'loss/skipped_updates': 1}
    """
    values = defaultdict(list)
    made = [update for update in updates if update is not None]
    for update in made:
        for name, value in update.items():
            values[name].append(value)
    means = {name: sum(of_name) / len(of_name) for name, of_name in values.items()}
    return means | {"loss/skipped_updates": len(updates) - len(made)}


def weigh_by_entropy(
    settings: WeightingConfig, groups: Groups, old_scores: RolloutScores, num_mini_batches: int
) -> torch.Tensor:
    """Return `weight_N`, each rollout's entropy relative to the mean of its optimizer batch.

    The mean is over the rollouts of all ranks.  Ones for `weighting.method=none`, and for masked
    rollouts, which are in no optimizer batch.
    """
    weight_N = torch.ones_like(old_scores.entropy_N)
    if settings.method == "none":
        return weight_N
    include_N = None
    if not settings.include_zero_variance:
        sizes_K = torch.tensor(groups.sizes)
        include_N = ~zero_variance(groups.shaped_rewards).repeat_interleave(sizes_K)
    for index in groups.mini_batches(num_mini_batches):
        weight_N[index] = relative_entropy_weights(
            old_scores.entropy_N[index],
            old_scores.lengths_N[index],
            mean=settings.mean,
            clamp=settings.clamp,
            include_N=None if include_N is None else include_N[index],
        )
    return weight_N


def training_sequence(
    batch: TrainingBatch, i: int, advantage: torch.Tensor, coefficient: torch.Tensor
) -> TrainingSequence:
    """Return rollout i as a sequence for the actor's update."""
    old_scores, advantages_T = batch.old_scores, batch.advantages_T
    importance_weights_N, references = old_scores.importance_weights_N, old_scores.references
    return TrainingSequence(
        sequence=scored_sequence(batch.groups.rollouts[i]),
        old_logprobs_T=old_scores.scores[i].logprobs_T,
        advantage=float(advantage),
        coefficient=float(coefficient),
        importance_T=importance_weights_N[i] if importance_weights_N else None,
        reference_logprobs_T=references[i].logprobs_T if references else None,
        advantage_T=advantages_T[i].float() if advantages_T else None,
    )
