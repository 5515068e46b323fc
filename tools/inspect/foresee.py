"""Measure how well `foresight` predicts pass rates, with and without features of hidden states.

    megatron-prepo evaluate --model MODEL --suite tasks=held_out.jsonl --out runs/evaluation
    python tools/inspect/foresee.py --hf MODEL --prompts held_out.jsonl \\
        --completions runs/evaluation/completions/MODEL/tasks.jsonl --out foresee.json

The prompts are split at random, 20 times.  The regression of `selection.method=foresight` sees the
groups of 64, 128, 256 or 512 prompts, as far as half of all is more, and predicts the other half:
the rank correlation with their pass rates, and how many groups are mixed (passes and failures) of
the fifth for which that is likeliest.  With as many as of all, a choice gains nothing.  A run has
less to go by: a step's candidates to standardise by, groups that were chosen, older weights.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.files.atomic import write_text
from megatron_prepo.files.ownership import new_file
from megatron_prepo.process import machine
from megatron_prepo.process.command import in_one_line
from megatron_prepo.selection import foresight
from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer.prompt_scores import projection
from tools.data.prompt_perplexity import Scores, scores
from tools.inspect.difficulty import add_inputs, passes

Numbers: TypeAlias = NDArray[np.float64]
FEATURES = (0, 8, 16, 32, 64)
"""Values of `selection.foresight_hidden`."""
GROUPS = (64, 128, 256, 512)
SPLITS = 20


def features(scored: Scores, number: int, seed: int) -> Numbers:
    """Return `x_PF` as Foresight computes it, with `number` features of the hidden states."""
    directions_HD = projection(scored.hidden_PH.shape[1], number, seed).double().numpy()
    return foresight.features(
        Candidates(
            scored.prompts,
            torch.from_numpy(scored.ppl_P),
            torch.from_numpy(scored.entropy_P),
            hidden_PD=torch.from_numpy(scored.hidden_PH @ directions_HD) if number else None,
        )
    )


def prediction(
    x_PF: Numbers, passes_P: Numbers, rollouts_P: Numbers, order_P: NDArray[np.intp], groups: int
) -> tuple[float, float]:
    """Return correlation and share of mixed groups; see the module.

    The first `groups` prompts of an order are seen, its second half is predicted.
    """
    seen, asked = order_P[:groups], order_P[len(order_P) // 2 :]
    weight_F = foresight.logistic_regression(
        x_PF[seen],
        passes_P[seen],
        rollouts_P[seen],
        np.full(len(seen), foresight.ROLLOUT_WEIGHT),
    )
    mu_R = foresight.predict(x_PF[asked], weight_F)
    passes_R, rollouts_R = passes_P[asked], rollouts_P[asked]
    without_R = mu_R**rollouts_R + (1 - mu_R) ** rollouts_R
    best = without_R.argsort(kind="stable")[: max(1, len(asked) // 5)]
    mixed_R = (passes_R > 0) & (passes_R < rollouts_R)
    correlation = stats.spearmanr(mu_R, passes_R / rollouts_R).statistic
    return float(np.nan_to_num(correlation)), float(mixed_R[best].mean())


def predictions(scored: Scores, passes_P: Numbers, rollouts_P: Numbers) -> list[dict[str, Any]]:
    """Return a row per number of features and of groups, means over the splits."""
    rows = []
    for number in FEATURES:
        for groups in (n for n in GROUPS if n <= len(passes_P) // 2):
            found = []
            for split in range(SPLITS):
                order_P = np.random.default_rng(split).permutation(len(passes_P))
                x_PF = features(scored, number, split)
                found.append(prediction(x_PF, passes_P, rollouts_P, order_P, groups))
            correlation, mixed = np.mean(found, axis=0)
            rows.append(
                {
                    "foresight_hidden": number,
                    "groups": groups,
                    "correlation": round(float(correlation), 3),
                    "mixed": round(float(mixed), 3),
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(str(value) for value in row.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


@in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns exit code 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_inputs(parser)
    parser.add_argument("--out", type=new_file(), required=True, help="JSON file")
    options = parser.parse_args(arguments)
    given = sum(1 for line in Path(options.prompts).read_text().splitlines() if line.strip())
    if given < 2 * GROUPS[0]:
        parser.error(f"--prompts has {given} prompts; give at least {2 * GROUPS[0]}")
    scored = scores(str(options.hf), [options.prompts], chat_template=options.chat_template)[
        str(options.prompts)
    ]
    ids = [prompt.id for prompt in scored.prompts]
    passes_P, rollouts_P = passes(options.completions, ids, options.pass_reward)
    mixed_P = (passes_P > 0) & (passes_P < rollouts_P)
    rows = predictions(scored, passes_P, rollouts_P)
    result = {
        "machine": machine.describe(),
        "prompts": len(ids),
        "mixed": round(float(mixed_P.mean()), 3),
        "rows": rows,
    }
    write_text(options.out, json.dumps(result, indent=2) + "\n")
    print(f"of all {len(ids)} groups, {result['mixed']} have passes and failures\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
