"""A step's updates: old scores, advantages, relative-entropy weights, and the clipped loss's batch.

Letters: K selected prompts, G rollouts each, N = K*G rollouts.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_prepo.actor.actor import Actor, Scores, TrainingSequence
from megatron_prepo.config import Config, LossConfig
from megatron_prepo.debug.dump import StepRecord
from megatron_prepo.prepo.advantages import group_advantages, zero_variance
from megatron_prepo.prepo.entropy_weights import relative_entropy_weights
from megatron_prepo.prepo.importance import importance_weights
from megatron_prepo.prepo.loss import rollout_coefficients
from megatron_prepo.records import Rollout, scored_sequence
from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.guarded_update import StepUpdates
from megatron_prepo.trainer.mismatch_metrics import importance_metrics, mismatch_metrics
from megatron_prepo.trainer.step_metrics import rollout_metrics


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
    staleness_N: tuple[int, ...] = ()
    """Optimizer updates between the weights that generated each rollout and these: not the same for
    all of a step that was generated ahead when the engine failed, and finished by a later run."""
    routed_differently: float | None = None
    """Share of tokens and layers where the policy would have chosen other experts than the engine
    (`rollout.router_replay`)."""

    def metrics(
        self, settings: LossConfig, weight_N: torch.Tensor, rollouts: Sequence[Rollout]
    ) -> dict[str, float]:
        """Entropies, weights and the mismatch between engine and actor."""
        finished_N = [rollout.finished for rollout in rollouts]
        metrics = rollout_metrics(self.entropy_N, weight_N, self.lengths_N, finished_N)
        metrics["rollout/staleness"] = max(self.staleness_N, default=0)
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
    staleness_N = tuple(actor.updates - rollout.weight_version for rollout in rollouts)
    bound = config.train.mini_batches if config.train.overlap else 0
    for staleness in staleness_N:
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
        staleness_N=staleness_N,
        routed_differently=routed_differently,
    )


def step_record(
    config: Config, step: int, candidates: Candidates, groups: Groups, old: OldScores
) -> StepRecord:
    """What a dump of the step has."""
    return StepRecord(
        step,
        candidates,
        groups.rollouts,
        groups.rewards_KG.flatten(),
        old.scores,
        mini_batches(*groups.rewards_KG.shape, config.train.mini_batches),
    )


def importance_of(
    config: Config, scores: Sequence[Scores], rollouts: Sequence[Rollout]
) -> list[torch.Tensor] | None:
    """What each token of a rollout counts, as the engine was more or less likely to choose it."""
    if config.loss.importance == "off":
        return None
    return [
        importance_weights(
            score.logprobs_T,
            torch.tensor(rollout.engine_logprobs),
            method=config.loss.importance,
            level=config.loss.importance_level,
            low=config.loss.importance_low,
            high=config.loss.importance_high,
        )
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
    """Return the mean of each metric over the updates that have it, and the skipped updates.

    An update without a token to learn from has no ratio or divergence: it is not counted as 0.

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
