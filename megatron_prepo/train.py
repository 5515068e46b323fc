"""PREPO's training loop (arXiv 2511.00794), the same on every rank; each stage is one verb.

Letters: P candidates, K selected prompts, G rollouts each, N = K*G rollouts; a method may share
the rollouts among prompts otherwise.
"""

from typing import Any

from megatron_prepo.config import Config
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.policy_update import TrainingBatch, weigh_by_entropy
from megatron_prepo.trainer.setup import set_up
from megatron_prepo.trainer.stages import (
    compute_advantages,
    grade,
    probe,
    recorded,
    roll_out,
    score_candidates,
    score_old_policy,
    select,
    sync_weights,
    update,
)


def train(config: Config) -> dict[str, Any]:
    """Make the run of a configuration; return the summary, which is also in the run's directory.

    Collective: every rank of the job calls it.  Raises UserError for an invalid input before any
    weight is loaded.
    """
    trainer = set_up(config)
    config = trainer.config  # a resumed run keeps some of its settings
    with trainer.resumed(batches=trainer.batches, selector=trainer.selector):
        for step in trainer.steps():
            candidates = score_candidates(trainer, step)
            candidates, probes = probe(trainer, candidates, step)  # for the oracle only
            generated = Groups(overlong=trainer.overlong)
            for choice in select(trainer, candidates, step):  # once, unless the method refills
                rollouts = roll_out(trainer, choice, f"rollouts/{step}")
                grades = grade(trainer, choice, rollouts)
                generated = generated.extend(choice.positions, rollouts, grades, choice.sizes)
            groups = generated.select_for_training(config.selection.num_selected)
            old_scores = score_old_policy(trainer, groups)
            advantage_N, advantages_T = compute_advantages(trainer, groups, old_scores)
            weight_N = weigh_by_entropy(
                config.weighting, groups, old_scores, config.train.mini_batches
            )
            batch = TrainingBatch(groups, advantage_N, old_scores, weight_N, advantages_T)
            metrics = update(trainer, step, candidates, batch) | trainer.selector.metrics()
            with recorded(trainer, step, candidates, generated, probes, batch, metrics):
                sync_weights(trainer)
            trainer.save_if_due(step)
    return trainer.finish()
