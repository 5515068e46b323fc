"""All metrics of a run: their keys, units and meanings, and the keys of earlier versions.

A key is a path by subject, `SUBJECT/QUANTITY`.  Statistics of many values are the last part of a
path: `ppl/selected/max`, `weight/mean`.  Here a key in braces stands for several: `a/{b,c}` for
`a/b` and `a/c`.  `Run.record` refuses a key that is not listed.
"""

import itertools
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from megatron_prepo.files.atomic import read_lines


class Metric(NamedTuple):
    """What a key, or several in braces, means."""

    unit: str
    meaning: str


Group: TypeAlias = dict[str, Metric]

INTRODUCTION = """\
# Metrics

Printed by `megatron-prepo reference metrics`.

Each line of `metrics.jsonl` is an object with one step's metrics.
[Dashboards](training.md#dashboards) show the same keys. A key is a path by subject; statistics of
many values (`mean`, `std`, `min`, `q25`, `q50`, `q75`, `max`: extremes and quartiles) are its last
part.

A key is absent if the step has no such value (no update was made, no token had an advantage), and
`null` if the value is not a finite number; neither is counted as 0. Tokens, rollouts and updates
are those of all ranks: no value depends on the layout but by rounding, except seconds, speeds and
the balance of ranks. Your own selector may add keys that begin with `selection/`
([selection.md](selection.md#your-own-method)). A reward function that returns a dict adds
`reward/NAME` for each of its further numbers: the mean over those answers of the step for which it
returned that name ([evaluation.md](evaluation.md#what-a-function-receives-and-returns))."""

SPREAD = "{min,q25,q50,q75,max}"

STEP: dict[str, Group] = {
    "Step": {
        "step": Metric("steps", "number of the step, from 0; the axis of the dashboards"),
    },
    "Rewards": {
        "reward/mean": Metric("reward", "mean reward of all rollouts that the step generated"),
        "reward/zero_variance_ratio": Metric(
            "share", "groups whose rewards are all equal: their advantages are 0"
        ),
        "reward/failed_ratio": Metric(
            "share", "answers that broke a limit or made the reward function raise"
        ),
        "reward/overlong_penalty": Metric(
            "reward",
            "mean of what `rollout.overlong=penalty` adds to the rewards trained on; "
            "`reward/mean` is without it",
        ),
    },
    "Selection": {
        "selection/groups_paid": Metric(
            "groups", "groups generated, also those that the method drops"
        ),
        "selection/{window_first,window_last}": Metric(
            "rank", "bounds of the window among the candidates sorted by perplexity, from 0 (prepo)"
        ),
        "selection/rounds": Metric(
            "rounds", "rounds of generation until K groups had a signal (dapo)"
        ),
        "selection/{p_easy,p_hard}": Metric(
            "probability",
            "of rolling out a prompt whose last group was all right, all wrong (greso, hive)",
        ),
        "selection/skipped": Metric("prompts", "candidates skipped in the step (greso, hive)"),
        "selection/posterior_mean": Metric(
            "probability", "mean predicted pass rate of the chosen prompts (mopps)"
        ),
        "selection/informative": Metric(
            "probability", "mean predicted probability that a chosen group has a signal (mapp, dps)"
        ),
        "selection/outside_band": Metric(
            "prompts", "candidates not skipped whose entropy is outside the band (hive)"
        ),
        "selection/utility": Metric(
            "reward^2", "mean expected variance p (1 - p) of the chosen prompts (kgps)"
        ),
        "selection/drift": Metric(
            "nats^2", "variance that the updates so far add to the logit of a pass rate (kgps)"
        ),
        "selection/predicted_pass_rate": Metric(
            "probability", "mean predicted pass rate of the chosen prompts (vip)"
        ),
        "selection/largest_group": Metric(
            "rollouts", "rollouts of the largest group (vip, pilot_commit)"
        ),
        "selection/{pilots,committed}": Metric(
            "prompts", "prompts with a pilot, and those that got more rollouts (pilot_commit)"
        ),
        "selection/evicted": Metric(
            "prompts", "prompts that passed too often in their last pilot so far (pilot_commit)"
        ),
        "selection/trust": Metric(
            "rollouts", "weight of the regression's prediction in pseudo-counts (foresight)"
        ),
        "selection/foreseen_pass_rate": Metric(
            "probability", "mean predicted pass rate of the chosen prompts (foresight)"
        ),
    },
    "Prompt perplexity": {
        f"ppl/candidates/{SPREAD}": Metric(
            "perplexity", "of the candidate prompts, under the policy before the update"
        ),
        f"ppl/selected/{SPREAD}": Metric("perplexity", "of the prompts rolled out: the window"),
        "ppl/selected/mean": Metric("perplexity", "mean of the prompts rolled out"),
        "ppl/spearman_with_reward": Metric(
            "-1 to 1", "rank correlation of a group's perplexity and mean reward"
        ),
        "ppl/engine_actor_relative/max": Metric(
            "relative",
            "largest difference of the engine's perplexity from the actor's, at checks of "
            "`selection.ppl_from=engine`",
        ),
        "ppl/engine_actor_spearman": Metric(
            "-1 to 1",
            "rank correlation of the engine's and the actor's perplexities, at these checks",
        ),
    },
    "All candidates (oracle)": {
        "candidates/pass_rate": Metric("share", "mean pass rate of the probes of all candidates"),
        "candidates/{spearman_ppl,spearman_length}": Metric(
            "-1 to 1", "rank correlation of pass rate with perplexity, with the prompt's length"
        ),
        "candidates/pass_rate_ppl_decile_{0,1,2,3,4,5,6,7,8,9}": Metric(
            "share", "mean pass rate by decile of perplexity, the lowest first"
        ),
    },
    "Rollouts": {
        "rollout/length": Metric("tokens", "mean length of the completions trained on"),
        "rollout/finished_ratio": Metric(
            "share", "completions that ended with a stop token, not by `rollout.max_new_tokens`"
        ),
        "rollout/masked": Metric(
            "rollouts",
            "excluded from the updates since they were cut off (`rollout.overlong=mask`)",
        ),
        "rollout/penalised": Metric(
            "rollouts", "whose reward was lowered (`rollout.overlong=penalty`)"
        ),
        "rollout/staleness": Metric(
            "updates", "most optimizer updates between generating and training (`train.overlap`)"
        ),
        "rollout/paid": Metric("rollouts", "generated so far, probes of the oracle included"),
        "rollout/tokens_paid": Metric("tokens", "generated so far, in completions"),
    },
    "Entropy and weights": {
        "entropy/mean": Metric("nats", "mean entropy of a token, over the full vocabulary"),
        f"entropy/sequence/{SPREAD}": Metric("nats", "of the rollouts' mean entropies"),
        f"weight/{{mean,std,{SPREAD[1:-1]}}}": Metric(
            "factor",
            "relative-entropy weight of a rollout in the loss; 1 for `weighting.method=none`",
        ),
    },
    "Engine compared with actor": {
        "mismatch/kl": Metric("nats", "divergence of the engine's token probabilities (k3)"),
        "mismatch/logprob_abs/{mean,q50,q90,q99,max}": Metric(
            "nats", "size of the difference of a token's log-probabilities"
        ),
        "mismatch/share_off_by_{0.01,0.1,1}": Metric(
            "share", "tokens whose difference is larger than this, in nats"
        ),
        "mismatch/{token_ess,sequence_ess}": Metric(
            "share", "effective sample size of weighting by the ratio: of tokens, of rollouts"
        ),
        f"mismatch/sequence_log_ratio/{SPREAD}": Metric(
            "nats", "log of a rollout's ratio, the product over its tokens"
        ),
        "mismatch/routed_differently": Metric(
            "share",
            "tokens and layers for which the actor would have chosen other experts "
            "(`rollout.router_replay`)",
        ),
        "importance/mean": Metric(
            "factor", "mean importance weight of a token (`loss.importance`)"
        ),
        "importance/{truncated_share,masked_share}": Metric(
            "share", "tokens whose importance weight was capped, or set to 0"
        ),
    },
    "Loss, mean over the step's updates": {
        "loss/policy": Metric("loss", "the clipped objective that is minimised"),
        "loss/grad_norm": Metric("norm", "of the gradient, before clipping"),
        "loss/learning_rate": Metric("rate", "of the updates"),
        "loss/ratio": Metric("factor", "mean ratio of a token's new to its old probability"),
        "loss/clip_fraction": Metric("share", "tokens whose ratio is clipped"),
        "loss/kl_to_old": Metric("nats", "divergence from the policy before the update (k3)"),
        "loss/kl_to_reference": Metric(
            "nats", "divergence from the initial policy (k3; `loss.kl_coef` > 0)"
        ),
        "loss/skipped_updates": Metric("updates", "skipped since they were not finite; a count"),
        "train/tokens": Metric(
            "tokens", "per update, that the forward and backward pass processed"
        ),
        "train/padding_fraction": Metric("share", "of the micro-batches that is padding"),
        "train/balance_ratio": Metric(
            "factor", "work of the busiest data-parallel rank over the mean; 1 is balanced"
        ),
    },
    "Seconds and speed": {
        "seconds/{perplexity,probes,rollouts,rewards,old_logprobs,update,weight_sync}": Metric(
            "seconds", "by stage of the step"
        ),
        "seconds/{setup,evaluate,checkpoint,export}": Metric(
            "seconds", "spent since the step before, on what is not a part of a step"
        ),
        "seconds/generation": Metric(
            "seconds",
            "of the step's generation; `seconds/rollouts` is the time waited for it "
            "(`train.overlap`)",
        ),
        "seconds/slowest_answer": Metric("seconds", "longest time that grading an answer took"),
        "speed/{perplexity,old_logprobs,update}_tokens": Metric(
            "tokens per second and rank", "by stage"
        ),
        "speed/{perplexity,old_logprobs,update}_tflops": Metric(
            "10^12 operations per second and rank", "by stage"
        ),
        "speed/{perplexity,old_logprobs,update}_mfu": Metric(
            "share", "of the GPU's published peak, if it is known"
        ),
        "memory/peak_gib": Metric(
            "GiB", "most memory that torch held on a rank during the step (CUDA)"
        ),
    },
}
"""Metrics of a step, in `metrics.jsonl`."""

EVALUATION: Group = {
    "step": Metric("steps", "completed before the evaluation"),
    "rollouts": Metric("rollouts", "generated before it"),
    "tokens": Metric("tokens", "generated before it"),
    "seconds": Metric("seconds", "of the stages of training before it, without evaluations"),
    "pass_rate": Metric("share", "avg@k: mean share of a prompt's samples that pass"),
    "pass_rate_ci95": Metric("share", "its 95 % interval, a list of two"),
    "samples_per_prompt": Metric("samples", "k"),
    "prompts": Metric("prompts", "held-out prompts evaluated"),
    "temperature": Metric("temperature", "at which they were sampled; 0: greedily"),
}
"""Values of an evaluation, in `evaluations.jsonl`."""

IF_SET: Group = {
    "top_p": Metric("probability", "`eval.top_p`, if it is below 1"),
    "top_k": Metric("tokens", "`eval.top_k`, if it is set"),
    "pass_at": Metric(
        "share",
        "unbiased pass@k by k, each with `mean` and `ci95` (`eval.pass_at`, up to the number of "
        "samples)",
    ),
    "sets": Metric(
        "by name",
        "`pass_rate`, `pass_rate_ci95`, `pass_at` and `prompts` of each named set of `data.eval`",
    ),
}
"""Further values of an evaluation, which depend on settings."""

ON_DASHBOARDS: Group = {
    "eval/pass_rate": EVALUATION["pass_rate"],
    "eval/{ci95_low,ci95_high}": Metric("share", "bounds of its 95 % interval"),
    "eval/samples_per_prompt": EVALUATION["samples_per_prompt"],
    "eval/rollouts": EVALUATION["rollouts"],
    "eval/pass_at_K": Metric("share", "pass@k for each k of `eval.pass_at`"),
    "eval/NAME/{pass_rate,ci95_low,ci95_high,pass_at_K}": Metric(
        "share", "the same of each named set of `data.eval`"
    ),
}
"""What dashboards show of an evaluation."""

RENAMED = {
    f"weight_{SPREAD}": f"weight/{SPREAD}",
    f"entropy/sequence_{SPREAD}": f"entropy/sequence/{SPREAD}",
    f"ppl/candidates_{SPREAD}": f"ppl/candidates/{SPREAD}",
    f"ppl/selected_{SPREAD}": f"ppl/selected/{SPREAD}",
    "ppl/selected_mean": "ppl/selected/mean",
    "ppl/engine_actor_relative_max": "ppl/engine_actor_relative/max",
    "mismatch/logprob_abs_{mean,q50,q90,q99,max}": "mismatch/logprob_abs/{mean,q50,q90,q99,max}",
    f"mismatch/sequence_log_ratio_{SPREAD}": f"mismatch/sequence_log_ratio/{SPREAD}",
}
"""Keys of earlier versions, and the present ones; files of old runs are read by both."""

OWN = "selection/"
"""Beginning of the keys that a custom selector may add."""
OF_REWARD = "reward/"
"""Beginning of the keys of numbers that a reward function returns besides its reward."""


def expand(key: str) -> list[str]:
    """Return the keys that a key in braces stands for.

    >>> expand("a/{b,c}_{1,2}"), expand("a/b")
    (['a/b_1', 'a/b_2', 'a/c_1', 'a/c_2'], ['a/b'])
    """
    parts = re.split(r"\{(.*?)\}", key)
    choices = [part.split(",") if n % 2 else [part] for n, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


KEYS = frozenset(key for group in STEP.values() for name in group for key in expand(name))
"""Keys of a step's metrics."""
KEYS_ON_DASHBOARDS = frozenset(key for name in ON_DASHBOARDS for key in expand(name))
"""Keys of an evaluation on dashboards."""

NEW_KEY = {
    old: new
    for olds, news in RENAMED.items()
    for old, new in zip(expand(olds), expand(news), strict=True)
}
"""The present key of each key of an earlier version."""


def is_of_a_step(key: str, *, custom_selector: bool) -> bool:
    """Return whether a step may have this key.

    Reward functions may add keys that begin with `reward/`, and a custom selector those that begin
    with `selection/`.
    """
    return key in KEYS or key.startswith((OF_REWARD, OWN) if custom_selector else (OF_REWARD,))


def check_step(keys: Collection[str], *, custom_selector: bool) -> None:
    """Raise AssertionError for a step's key without a line in the table (`is_of_a_step`)."""
    missing = sorted(key for key in keys if not is_of_a_step(key, custom_selector=custom_selector))
    assert not missing, f"metrics that megatron_prepo/run/metrics_table.py does not list: {missing}"


def check_evaluation(keys: Collection[str]) -> None:
    """Raise AssertionError unless an evaluation has all values of the table, and no other."""
    known, found = EVALUATION.keys(), set(keys)
    assert known <= found <= known | IF_SET.keys(), f"docs/metrics.md does not list {sorted(found)}"


def check_on_dashboards(keys: Collection[str]) -> None:
    """Raise AssertionError for what dashboards would show without a line in the table."""

    def general(key: str) -> str:
        subject, *name, quantity = re.sub(r"pass_at_\d+$", "pass_at_K", key).split("/")
        return "/".join([subject, "NAME", quantity] if name else [subject, quantity])

    unlisted = set(map(general, keys)) - KEYS_ON_DASHBOARDS
    assert not unlisted, f"docs/metrics.md does not list {sorted(unlisted)}"


def renamed(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics of any version under the present keys.

    >>> renamed({"step": 1, "weight_max": 2.0, "reward/mean": 0.5})
    {'step': 1, 'weight/max': 2.0, 'reward/mean': 0.5}
    """
    return {NEW_KEY.get(key, key): value for key, value in metrics.items()}


def read_steps(directory: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the metrics of a run's steps under the present keys; of a run of any version.

    Raises UserError for a damaged line.
    """
    return map(renamed, read_lines(Path(directory) / "metrics.jsonl"))


def markdown() -> str:
    """Return the page of all metrics in Markdown."""
    lines = [INTRODUCTION]
    for title, group in STEP.items():
        lines += [f"\n## {title}\n", *_table(group)]
    lines += ["\n## Evaluations\n", IN_EVALUATIONS, "", *_table(EVALUATION | IF_SET)]
    lines += ["\nDashboards show:\n", *_table(ON_DASHBOARDS)]
    lines += ["\n## Keys of earlier versions\n", OF_EARLIER_VERSIONS, ""]
    lines += ["| earlier | now |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in NEW_KEY.items()]
    return "\n".join(lines) + "\n"


IN_EVALUATIONS = "Each line of `evaluations.jsonl` is an object with these values:"
OF_EARLIER_VERSIONS = """\
Files of earlier runs are not rewritten: `report`, `compare` and `plan --rates` read both keys. A
run that is resumed by a later version has the earlier keys in its first lines, and two curves of
such a metric on a dashboard."""


def _table(group: Group) -> list[str]:
    """Return the lines of a table, with every key in full."""
    lines = ["| key | unit | meaning |", "|---|---|---|"]
    for name, metric in group.items():
        keys = ", ".join(f"`{key}`" for key in expand(name))
        lines.append(f"| {keys} | {metric.unit} | {metric.meaning} |")
    return lines
