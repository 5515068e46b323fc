"""Compute perplexities of prompt files under a model: a histogram, and quantiles.

    python tools/data/prompt_perplexity.py --hf MODEL --out perplexity.png train.jsonl math500.jsonl

The perplexity is the one by which PREPO's window is sorted (`prepo/perplexity.py`), computed by
`transformers`, one prompt at a time, on a GPU if available.  A `.json` with the quantiles is
written next to the figure.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_prepo.data import read_prompts
from megatron_prepo.files.existing import existing
from megatron_prepo.files.ownership import new_file
from megatron_prepo.inputs.preflight import read_tokenizer
from megatron_prepo.prepo.perplexity import perplexity
from megatron_prepo.process.command import in_one_line
from megatron_prepo.records import Prompt
from megatron_prepo.trainer.prompt_scores import prompt_span

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import LogLocator

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
INK, BARS = "#1f2328", "#0e7490"


class Scores(NamedTuple):
    """What the scoring pass of a step computes of each prompt of a file, and the prompts."""

    prompts: list[Prompt]
    ppl_P: NDArray[np.float64]
    entropy_P: NDArray[np.float64]
    """Mean entropy over the same tokens, in nats."""
    hidden_PH: NDArray[np.float64]
    """Mean of the last hidden states, from which the tokens after the first are predicted."""


@torch.inference_mode()
def scores(
    hf: str, files: Sequence[str | Path], *, chat_template: bool = False, tokens: str = "all"
) -> dict[str, Scores]:
    """Return the scores of each file's prompts; `tokens` is `selection.ppl_tokens`."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = read_tokenizer(hf)
    prompts_of = {
        str(file): read_prompts(
            file,
            tokenizer,
            max_tokens=sys.maxsize,
            chat_template=chat_template,
            needs_answer=False,
        )
        for file in files
    }
    model = AutoModelForCausalLM.from_pretrained(hf, dtype="auto", local_files_only=True)
    model = model.to(device).eval()
    result = {}
    for file, prompts in prompts_of.items():
        values, hidden = [], []
        for prompt in tqdm(prompts, file, leave=False):
            tokens_S = torch.tensor(prompt.tokens, device=device)
            output = model(tokens_S[None], output_hidden_states=True)
            logprobs_SV = torch.log_softmax(output.logits[0, :-1].float(), dim=-1)
            logprobs_T = logprobs_SV.gather(1, tokens_S[1:, None])[:, 0]
            entropy_T = torch.special.entr(logprobs_SV.exp()).sum(-1)
            span = prompt_span(prompt, tokens)
            mean_entropy = entropy_T[span].double().mean()
            values.append((float(perplexity(logprobs_T, span)), float(mean_entropy)))
            hidden.append(output.hidden_states[-1][0, :-1].double().mean(dim=0).numpy(force=True))
        ppl_P, entropy_P = np.array(values).T
        result[file] = Scores(prompts, ppl_P, entropy_P, np.array(hidden))
    return result


def quantiles(ppl_P: np.ndarray) -> dict[str, float]:
    """Return the number of prompts and the quantiles of their perplexities."""
    points = np.quantile(ppl_P, QUANTILES)
    named = {f"q{round(100 * q)}": round(float(v), 4) for q, v in zip(QUANTILES, points)}
    return {"prompts": len(ppl_P), **named}


def draw(ppl_of: dict[str, np.ndarray], path: str | Path, title: str) -> None:
    """Draw one histogram per file on a common logarithmic axis, with medians marked."""
    everything = np.concatenate(list(ppl_of.values()))
    low, high = everything.min(), everything.max()
    edges = np.geomspace(low, max(high, 1.01 * low), 41)
    figure, axes = pyplot.subplots(
        len(ppl_of), 1, sharex=True, squeeze=False, figsize=(7, 0.6 + 1.7 * len(ppl_of))
    )
    for ax, (name, ppl_P) in zip(axes[:, 0], ppl_of.items(), strict=True):
        ax.hist(ppl_P, bins=edges, color=BARS)
        median = float(np.median(ppl_P))
        ax.axvline(median, color=INK, linewidth=1)
        ax.set_xscale("log")
        ax.set_title(f"{name}: {len(ppl_P):,} prompts, median {median:.2f}", loc="left", fontsize=9)
        ax.set_ylabel("prompts", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes[-1, 0].xaxis.set_major_formatter("{x:g}")
    axes[-1, 0].xaxis.set_minor_formatter("")
    axes[-1, 0].set_xlabel("perplexity of the prompt", fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def describe(
    hf: str, files: dict[str, str | Path], out: str | Path, **options
) -> dict[str, dict[str, float]]:
    """Measure the named files, draw, write; returns the quantiles of each."""
    measured = scores(hf, list(files.values()), **options)
    ppl_of = {name: measured[str(file)].ppl_P for name, file in files.items()}
    draw(ppl_of, out, f"under {hf}")
    result = {name: quantiles(ppl_P) for name, ppl_P in ppl_of.items()}
    Path(out).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    return result


@in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns exit code 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "files", type=existing(), nargs="+", metavar="FILE", help="prompts, JSON Lines"
    )
    parser.add_argument(
        "--hf", type=existing(), required=True, help="Hugging Face directory of the model"
    )
    parser.add_argument(
        "--out", type=new_file(".json"), required=True, help="PNG file; its numbers go beside it"
    )
    parser.add_argument("--chat-template", action="store_true", help="as data.chat_template=true")
    parser.add_argument("--tokens", choices=("all", "content"), default="all")
    options = parser.parse_args(arguments)
    files = {file.name.removesuffix(".jsonl"): str(file) for file in options.files}
    result = describe(
        str(options.hf),
        files,
        options.out,
        chat_template=options.chat_template,
        tokens=options.tokens,
    )
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
