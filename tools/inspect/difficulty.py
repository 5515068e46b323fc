"""Correlate perplexity and entropy of prompts with their pass rates, which PREPO assumes to fall.

    megatron-prepo evaluate --model MODEL --suite tasks=held_out.jsonl --out runs/evaluation
    python tools/inspect/difficulty.py --hf MODEL --prompts held_out.jsonl \\
        --completions runs/evaluation/completions/MODEL/tasks.jsonl --out difficulty.json

Spearman's rank correlations over all prompts, within each task, within all tasks together (ranks
less their task's mean), and with the prompt's length held fixed (partial correlation of the ranks),
each with a 95 % interval by bootstrap over prompts; and those of the length with each of them.
The task of a prompt is its id up to a slash, as `tools/data/prepare.py` writes them.  A plot,
`.png`, is written next to the numbers.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from numpy.typing import NDArray
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.errors import UserError
from megatron_prepo.files.atomic import read_lines, write_text
from megatron_prepo.files.existing import existing
from megatron_prepo.files.ownership import new_file
from megatron_prepo.process import machine
from megatron_prepo.process.command import in_one_line
from tools.data.prompt_perplexity import scores

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import LogLocator

Numbers: TypeAlias = NDArray[np.float64]
DRAWS = 2000
OUTSIDE = 0.025
"""Share of the draws beyond each end of an interval."""
QUANTITIES = ("perplexity", "mean entropy")
INK = "#1f2328"


def residuals(y_P: Numbers, *given: Numbers) -> Numbers:
    """Return what is left of `y_P` after its linear regression on `given`."""
    design = np.column_stack([np.ones_like(y_P), *given])
    return y_P - design @ np.linalg.lstsq(design, y_P, rcond=None)[0]


def correlation(x_P: Numbers, y_P: Numbers) -> float:
    """Return Pearson's correlation; NaN if one of the two is constant."""
    if np.ptp(x_P) < 1e-9 * max(1.0, np.abs(x_P).max()) or np.ptp(y_P) < 1e-9:
        return float("nan")
    return float(np.corrcoef(x_P, y_P)[0, 1])


def spearman(x_P: Numbers, y_P: Numbers, *given: Numbers) -> float:
    """Return the (partial) rank correlation of two quantities, with `given` held fixed.

    >>> x = np.arange(8.0)
    >>> round(spearman(x, x**3), 6), round(spearman(x, -x, np.ones(8)), 6)
    (1.0, -1.0)
    """
    ranks = [stats.rankdata(values_P) for values_P in given]
    x_P, y_P = (residuals(stats.rankdata(values_P), *ranks) for values_P in (x_P, y_P))
    return correlation(x_P, y_P)


def within_tasks(task_P: NDArray[np.str_], x_P: Numbers, y_P: Numbers, *given: Numbers) -> float:
    """Return the rank correlation over all prompts of ranks that are those within a task."""
    parts: list[list[Numbers]] = []
    for task in np.unique(task_P):
        of_task = task_P == task
        ranks = [stats.rankdata(values_P[of_task]) for values_P in (x_P, y_P, *given)]
        parts.append([rank - rank.mean() for rank in ranks])
    x, y, *others = (np.concatenate(column) for column in zip(*parts, strict=True))
    return correlation(residuals(x, *others), residuals(y, *others))


def with_ci95(num: int, statistic: Callable[[NDArray[np.intp]], float]) -> dict[str, Any]:
    """Return a statistic of `num` prompts and its 95 % interval; None where it is not defined.

    An interval is not where so few prompts passed that more draws than lie outside it have none.
    """
    value = statistic(np.arange(num))
    if np.isnan(value):
        return {"value": None, "ci95": None}
    generator = np.random.default_rng(0)
    draws = [statistic(generator.integers(0, num, num)) for _ in range(DRAWS)]
    if np.isnan(draws).mean() > OUTSIDE:
        return {"value": round(value, 4), "ci95": None}
    low, high = np.nanquantile(draws, (OUTSIDE, 1 - OUTSIDE))
    return {"value": round(value, 4), "ci95": [round(float(low), 4), round(float(high), 4)]}


def correlations(
    task_P: NDArray[np.str_], x_P: Numbers, pass_P: Numbers, length_P: Numbers
) -> dict[str, Any]:
    """Return all correlations of a quantity with the pass rate."""
    num = len(x_P)
    found = {
        "all prompts": with_ci95(num, lambda i: spearman(x_P[i], pass_P[i])),
        "length held fixed": with_ci95(num, lambda i: spearman(x_P[i], pass_P[i], length_P[i])),
        "within tasks": with_ci95(num, lambda i: within_tasks(task_P[i], x_P[i], pass_P[i])),
        "within tasks, length held fixed": with_ci95(
            num, lambda i: within_tasks(task_P[i], x_P[i], pass_P[i], length_P[i])
        ),
    }
    for task in map(str, np.unique(task_P)):
        (mine,) = np.nonzero(task_P == task)
        found[task] = with_ci95(
            len(mine), lambda i, mine=mine: spearman(x_P[mine[i]], pass_P[mine[i]])
        )
    return found


def of_length(
    task_P: NDArray[np.str_], length_P: Numbers, others: dict[str, Numbers]
) -> dict[str, Any]:
    """Return the correlations of the prompt's length with other quantities."""
    num = len(length_P)
    return {
        name: {
            "all prompts": with_ci95(num, lambda i, x_P=x_P: spearman(length_P[i], x_P[i])),
            "within tasks": with_ci95(
                num, lambda i, x_P=x_P: within_tasks(task_P[i], length_P[i], x_P[i])
            ),
        }
        for name, x_P in others.items()
    }


def pass_rates(completions: Path, ids: Sequence[str], pass_reward: float) -> Numbers:
    """Return the share of each prompt's completions that pass; see `passes`."""
    passes_P, rollouts_P = passes(completions, ids, pass_reward)
    return passes_P / rollouts_P


def passes(completions: Path, ids: Sequence[str], pass_reward: float) -> tuple[Numbers, Numbers]:
    """Return how many of each prompt's completions have at least `pass_reward`, and their number.

    Raises UserError if a prompt has none.
    """
    passed = defaultdict(list)
    for record in read_lines(completions):
        passed[record["prompt"]].append(record["reward"] >= pass_reward)
    if absent := [name for name in ids if name not in passed]:
        raise UserError(
            f"{completions} has no completion of {len(absent)} prompts, such as {absent[0]!r}; "
            "evaluate these prompts (`megatron-prepo evaluate`)"
        )
    of_P = [passed[name] for name in ids]
    return np.array([float(sum(p)) for p in of_P]), np.array([float(len(p)) for p in of_P])


def draw(
    task_P: NDArray[np.str_],
    x_of: dict[str, Numbers],
    pass_P: Numbers,
    result: dict[str, Any],
    path: Path,
) -> None:
    """Draw pass rates against each quantity, and the correlations with their intervals."""
    names = np.unique(task_P)
    colors = pyplot.get_cmap("tab20")(np.linspace(0, 1, len(names)))
    rows = [
        n for n in result[QUANTITIES[0]] if any(result[q][n]["value"] is not None for q in x_of)
    ]
    generator = np.random.default_rng(0)
    figure, axes = pyplot.subplots(
        2, len(x_of), figsize=(11, 9), squeeze=False, sharey="row", layout="constrained"
    )
    for column, (quantity, x_P) in enumerate(x_of.items()):
        above, below = axes[:, column]
        for task, color in zip(names, colors, strict=True):
            mine = task_P == task
            jitter = generator.uniform(-0.015, 0.015, mine.sum())
            above.scatter(x_P[mine], pass_P[mine] + jitter, s=9, color=color, label=task)
        above.set_xscale("log")
        above.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        above.xaxis.set_major_formatter("{x:g}")
        above.xaxis.set_minor_formatter("")
        above.set_xlabel(f"{quantity} of the prompt")
        for place, name in enumerate(rows):
            row = result[quantity][name]
            if row["ci95"] is not None:
                below.plot(row["ci95"], [place, place], color=INK, linewidth=1)
            if row["value"] is not None:
                below.plot(row["value"], place, "o", color=INK, markersize=4)
        below.axvline(0, color=INK, linewidth=0.5)
        below.set_yticks(range(len(rows)), rows, fontsize=8)
        below.set_xlim(-1, 1)
        below.set_xticks((-1, -0.5, 0, 0.5, 1))
        below.set_xlabel(f"rank correlation of {quantity} and pass rate, 95 % interval", fontsize=9)
    axes[0, 0].set_ylabel("pass rate")
    axes[1, 0].invert_yaxis()  # of all columns
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model, prompts and their graded completions."""
    parser.add_argument(
        "--hf", type=existing(), required=True, help="model that scores the prompts"
    )
    parser.add_argument("--prompts", type=existing(), required=True, help="JSON Lines")
    parser.add_argument(
        "--completions", type=existing(), required=True, help="of `megatron-prepo evaluate`"
    )
    parser.add_argument("--chat-template", action="store_true", help="as data.chat_template=true")
    parser.add_argument("--pass-reward", type=float, default=1.0, help="as reward.high")


@in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns exit code 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_inputs(parser)
    parser.add_argument("--out", type=new_file(".png"), required=True, help="JSON file")
    parser.add_argument("--tokens", choices=("all", "content"), default="all")
    options = parser.parse_args(arguments)
    scored = scores(
        str(options.hf),
        [options.prompts],
        chat_template=options.chat_template,
        tokens=options.tokens,
    )[str(options.prompts)]
    task_P = np.array([prompt.id.partition("/")[0] for prompt in scored.prompts])
    pass_P = pass_rates(
        options.completions, [prompt.id for prompt in scored.prompts], options.pass_reward
    )
    length_P = np.array([len(prompt.tokens) for prompt in scored.prompts], dtype=np.float64)
    x_of = dict(zip(QUANTITIES, (scored.ppl_P, scored.entropy_P), strict=True))
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "prompts": len(pass_P),
        "pass_rate": {
            "all": round(float(pass_P.mean()), 4),
            **{str(t): round(float(pass_P[task_P == t].mean()), 4) for t in np.unique(task_P)},
        },
        **{name: correlations(task_P, x_P, pass_P, length_P) for name, x_P in x_of.items()},
        "prompt length": of_length(task_P, length_P, {"pass rate": pass_P, **x_of}),
    }
    write_text(options.out, json.dumps(result, indent=2) + "\n")
    draw(task_P, x_of, pass_P, result, Path(options.out).with_suffix(".png"))
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
