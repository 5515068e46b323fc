"""A step's entries in the ledger, from what its stages found."""

from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.run.ledger import LedgerEntry
from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.policy_update import TrainingBatch


def ledger_entries(
    method: str,
    step: int,
    candidates: Candidates,
    generated: Groups,
    probes: Groups,
    batch: TrainingBatch,
) -> list[LedgerEntry]:
    """Return one entry for each rollout of the step: trained on, dropped, masked, or a probe.

    `method` is the selector's name.
    """
    position_of = {prompt.id: p for p, prompt in enumerate(candidates.prompts)}
    trained = {id(rollout): i for i, rollout in enumerate(batch.groups.rollouts)}
    rollouts = [*generated.rollouts, *probes.rollouts]
    grades = [*generated.grades, *probes.grades]
    masked = batch.groups.masked
    in_group = [
        (sample, equal)
        for groups in (generated, probes)
        if groups.rollouts
        for size, equal in zip(
            groups.sizes, zero_variance(groups.shaped_rewards).tolist(), strict=True
        )
        for sample in range(size)
    ]
    entries = []
    for n, (rollout, (sample, equal)) in enumerate(zip(rollouts, in_group, strict=True)):
        i = trained.get(id(rollout))
        learnt = i is not None and not masked[i]
        ppl_P, p = candidates.ppl_P, position_of[rollout.prompt.id]
        entries.append(
            LedgerEntry(
                step=step,
                prompt_id=rollout.prompt.id,
                sample=sample,
                selector=method,
                purpose="probe" if n >= len(generated.rollouts) else "train",
                trained=learnt,
                ppl=None if ppl_P is None else float(ppl_P[p]),
                reward=grades[n].reward,
                graded=grades[n].outcome,
                length=len(rollout.tokens),
                finished=rollout.finished,
                mean_entropy=None if i is None else float(batch.old_scores.entropy_N[i]),
                weight=float(batch.weight_N[i]) if learnt else None,
                zero_variance=equal,
                weight_version=rollout.weight_version,
                aborted=rollout.aborted,
                staleness=0 if i is None else batch.old_scores.staleness_N[i],
            )
        )
    return entries
