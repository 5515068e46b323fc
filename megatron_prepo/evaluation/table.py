"""The numbers of a suite, and the table of models and suites in the paper's form."""

from collections.abc import Sequence
from typing import Any

from megatron_prepo.evaluation.completions import Completions
from megatron_prepo.evaluation.pass_at_k import mean_with_ci95, pass_at_k, powers_of_two


def suite_numbers(completions: Completions, pass_reward: float) -> dict[str, Any]:
    """Return avg@k and pass@k of a suite with their intervals, and counts of its completions."""
    samples, passed_P = completions.samples, completions.passed_P(pass_reward)
    records = [record for of_prompt in completions.records() for record in of_prompt]
    return {
        "prompts": len(passed_P),
        "samples": samples,
        "avg": mean_with_ci95([completions.avg_P(pass_reward)], samples),
        "pass_at": {
            # n samples are n / k independent draws of k
            str(k): mean_with_ci95(
                [[pass_at_k(samples, passed, k) for passed in passed_P]], samples // k
            )
            for k in powers_of_two(samples)
        },
        "tokens": sum(record["tokens"] for record in records) / len(records),
        "finished": sum(record["finished"] for record in records) / len(records),
        "failed": sum(record["graded"] != "ok" for record in records),
    }


def markdown(results: dict[str, Any]) -> str:
    """Return a row per model and a column per suite: avg@k in per cent with its interval."""
    models = results["models"]
    names = list(dict.fromkeys(s for model in models.values() for s in model["suites"]))
    has_rollouts = any(model["rollouts"] is not None for model in models.values())
    samples = next(iter(next(iter(models.values()))["suites"].values()))["samples"]
    head = ["model", *names, "mean", *(["rollouts"] if has_rollouts else [])]
    lines = [f"avg@{samples} in per cent (95 % interval)\n", _row(head)]
    lines.append(_row(["---"] + ["--:"] * (len(head) - 1)))
    for name, model in models.items():
        cells = [_cell(model["suites"][suite]["avg"]) for suite in names] + [_cell(model["mean"])]
        rollouts = "" if model["rollouts"] is None else f"{model['rollouts']:,}"
        lines.append(_row([name, *cells, *([rollouts] if has_rollouts else [])]))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: dict[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{100 * value['mean']:.2f} ({100 * low:.1f} to {100 * high:.1f})"
