"""Metrics of a step.

A mean is over existing values: a key is absent if there are none (no update was made, no token had
an advantage), and null if the value is not a finite number.  Neither is ever counted as 0.
`loss/` and `train/` are means over the step's optimizer updates; what they and `mismatch/` average
are tokens of all ranks, so that the layout changes no value but by rounding.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from statistics import fmean

import torch
from scipy import stats

from megatron_prepo.prepo.advantages import zero_variance
from megatron_prepo.prepo.group_rows import each_group, flat
from megatron_prepo.prepo.statistics import quantiles
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.run.metrics_table import OF_REWARD
from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer.groups import Groups

Metrics = dict[str, float | None]
"""Values by name; None if a value cannot be computed."""


def selection_metrics(candidates: Candidates, generated: Groups) -> Metrics:
    """Return rewards and perplexities of all generated groups, and their correlation."""
    chosen, useless_K = generated.chosen, zero_variance(generated.shaped_rewards)
    metrics: Metrics = {
        "reward/mean": float(generated.reward_N.mean()),
        "reward/zero_variance_ratio": float(useless_K.double().mean()),
        "selection/groups_paid": len(chosen),
    }
    if candidates.ppl_P is not None:
        ppl_P, ppl_K = candidates.ppl_P, candidates.ppl_P[list(chosen)]
        metrics |= quantiles("ppl/candidates", ppl_P) | quantiles("ppl/selected", ppl_K)
        metrics["ppl/selected/mean"] = float(ppl_K.mean())
        means_K1 = each_group(partial(torch.mean, dim=1, keepdim=True), generated.rewards)
        metrics["ppl/spearman_with_reward"] = spearman(ppl_K, flat(means_K1))
        if candidates.pass_rate_P is not None:
            metrics |= candidate_metrics(candidates)
        if candidates.actor_ppl_P is not None:
            relative_P = (ppl_P / candidates.actor_ppl_P - 1).abs()
            metrics["ppl/engine_actor_relative/max"] = float(relative_P.max())
            metrics["ppl/engine_actor_spearman"] = spearman(ppl_P, candidates.actor_ppl_P)
    return metrics


def grading_metrics(grades: Sequence[Grade]) -> dict[str, float]:
    """Return the share of answers that failed, and the means of what the function returned besides.

    A mean `reward/NAME` is over the answers for which the function returned NAME.
    """
    names = sorted({name for grade in grades for name in grade.metrics})
    return {
        "reward/failed_ratio": sum(grade.outcome != "ok" for grade in grades) / len(grades),
        "seconds/slowest_answer": max(grade.seconds for grade in grades),
        **{
            f"{OF_REWARD}{name}": fmean(g.metrics[name] for g in grades if name in g.metrics)
            for name in names
        },
    }


def candidate_metrics(candidates: Candidates) -> Metrics:
    """Return how perplexity relates to the candidates' pass rates, if these are known."""
    assert candidates.ppl_P is not None and candidates.pass_rate_P is not None
    by_perplexity = candidates.pass_rate_P[candidates.ppl_P.argsort(stable=True)]
    lengths_P = torch.tensor([float(len(prompt.tokens)) for prompt in candidates.prompts])
    return {
        "candidates/pass_rate": float(candidates.pass_rate_P.mean()),
        "candidates/spearman_ppl": spearman(candidates.ppl_P, candidates.pass_rate_P),
        "candidates/spearman_length": spearman(lengths_P, candidates.pass_rate_P),
        **{
            f"candidates/pass_rate_ppl_decile_{i}": float(decile.mean())
            for i, decile in enumerate(by_perplexity.tensor_split(10))
            if len(decile)
        },
    }


def rollout_metrics(
    entropy_N: torch.Tensor,
    weight_N: torch.Tensor,
    lengths_N: torch.Tensor,
    finished_N: Sequence[bool],
) -> dict[str, float]:
    """Return entropies, weights and lengths; `weight_N` is without masked rollouts."""
    weights, quartiles = {}, {}
    if len(weight_N):
        weights = {"weight/mean": float(weight_N.mean()), "weight/std": float(weight_N.std())}
        quartiles = quantiles("weight", weight_N)
    return {
        "entropy/mean": float((entropy_N * lengths_N).sum() / lengths_N.sum()),
        **weights,
        **quantiles("entropy/sequence", entropy_N),
        **quartiles,
        "rollout/length": float(lengths_N.double().mean()),
        "rollout/finished_ratio": sum(finished_N) / len(finished_N),
    }


def overlong_metrics(groups: Groups) -> dict[str, float]:
    """Return what `rollout.overlong` did to the rollouts trained on; nothing for `keep`."""
    match groups.overlong.method:
        case "mask":
            return {"rollout/masked": sum(groups.masked)}
        case "penalty":
            penalties = groups.penalties
            return {
                "rollout/penalised": sum(penalty < 0 for penalty in penalties),
                "reward/overlong_penalty": sum(penalties) / len(penalties),
            }
    return {}


def spearman(x_K: torch.Tensor, y_K: torch.Tensor) -> float | None:
    """Return the rank correlation; None if one side is constant, has a NaN or a single value."""
    if len(x_K) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        value = float(stats.spearmanr(x_K.numpy(), y_K.numpy()).statistic)
    return value if value == value else None
