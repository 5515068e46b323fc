"""The laptop experiment from end to end: convert, train, export, and evaluate the export.

The base model is converted from Hugging Face format to a Megatron checkpoint, PREPO trains it at
tensor parallel 2, the result is exported to Hugging Face format, and plain `transformers`, which
shares no code with this project, measures the pass rate again.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_prepo import config as configuration
from megatron_prepo.config import literal
from megatron_prepo.data import read_prompts
from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import write_text
from megatron_prepo.launch import start
from megatron_prepo.launch.recipes import EXAMPLES
from megatron_prepo.process import activity, progress
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grader
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run.metrics_table import read_steps

IMPORTED = "imported base model"
"""The kind of `base_megatron/` in its marker (`ownership.py`)."""


def demo(directory: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the demo in `directory`, replacing an earlier one; return the summary.

    Raises UserError, before anything is written, if the directory has other contents.
    """
    laptop = EXAMPLES / "laptop"
    settings = [
        f"model.hf={literal(laptop / 'base')}",
        f"data.train={literal(laptop / 'train.jsonl')}",
        f"data.eval={literal(laptop / 'eval.jsonl')}",
    ]
    summary = run_line(directory, laptop / "prepo.yaml", laptop / "base", settings, overrides)
    print(
        f"\nheld-out pass rate: {summary['pass_rate_before']:.3f} before, "
        f"{summary['pass_rate_after']:.3f} after, "
        f"{summary['pass_rate_transformers']:.3f} by transformers alone\n"
        f"{reward_words(list(read_steps(directory)))}"
        f"results are in {directory}; the picture is {directory / 'pass_rate.png'}"
    )
    return summary


def run_line(
    directory: Path,
    recipe: Path,
    model: Path,
    settings: Sequence[str],
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Import `model`, train it by a recipe, export it, evaluate the export; return the summary.

    All of it is in `directory`, and replaces an earlier line there.  `model`: what the converter
    imports, to `base_megatron`.  Raises UserError, before anything is written, if the directory has
    other contents, and for `overrides` of what the line decides.
    """
    decided = ("run.dir=", "run.overwrite=", "model.megatron=")
    if given := [override for override in overrides if override.startswith(decided)]:
        raise UserError(f"{given[0]}: this is set already; choose the directory by --dir")
    imported = directory / "base_megatron"
    settings = [
        f"run.dir={literal(directory)}",
        "run.overwrite=true",
        f"model.megatron={literal(imported)}",
        "checkpoint.every=0",  # the line starts from the beginning each time
        *settings,
        *overrides,
    ]
    config = configuration.load(recipe, settings)
    if not config.eval.before:
        raise UserError("eval.before=false: the result names the pass rate before; remove it")
    run_directory.check(config)

    _headline(f"1/3  {model} -> Megatron checkpoint")
    ownership.make_room(imported, IMPORTED)
    converter = [sys.executable, "-m", "checkpoints_convert", "import"]
    with activity.handed_over():
        subprocess.run([*converter, "--hf", str(model), "--out", str(imported)], check=True)
    ownership.seal(imported, IMPORTED)

    steps, tensor = config.train.total_steps, config.parallel.tensor
    _headline(f"2/3  {steps} steps of PREPO at tensor parallel {tensor}")
    start.train(recipe, settings)

    _headline("3/3  the exported model in plain transformers")
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    summary["pass_rate_transformers"] = plain_transformers_pass_rate(
        directory / "hf", config, samples_per_prompt=config.eval.samples_per_prompt
    )
    write_text(directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def reward_words(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return lines that explain a training reward that fell, by the window that moved; or none.

    Compared are the means over the first and over the last tenth of the steps.
    """
    tenth = max(1, len(steps) // 10)

    def means(name: str) -> tuple[float, float]:
        first, last = ([step[name] for step in part] for part in (steps[:tenth], steps[-tenth:]))
        return sum(first) / tenth, sum(last) / tenth

    if "selection/window_first" not in steps[0]:
        return ""
    before, after = means("reward/mean")
    easy, hard = means("ppl/selected/mean")
    if after >= before or hard <= easy:
        return ""
    return (
        f"training reward:    {before:.3f} in the first steps, {after:.3f} in the last\n"
        f"  The window moved to harder prompts, from mean perplexity {easy:.2f} to {hard:.2f}, so "
        "the reward on them\n  falls. The held-out prompts stay the same: their pass rate measures "
        "progress.\n"
    )


def plain_transformers_pass_rate(
    hf_directory: Path, config: configuration.Config, samples_per_prompt: int
) -> float:
    """Return avg@k of a Hugging Face directory, generated and sampled by `transformers` alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_prepo.rollout.stopping import Stops

    tokenizer = AutoTokenizer.from_pretrained(
        hf_directory, padding_side="left", trust_remote_code=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # what pads is masked
    model = AutoModelForCausalLM.from_pretrained(
        hf_directory, dtype=getattr(torch, config.model.dtype), trust_remote_code=False
    ).eval()
    [file] = config.data.eval_files.values()
    prompts = read_prompts(
        file,
        tokenizer,
        max_tokens=config.data.max_prompt_tokens,
        chat_template=config.data.chat_template,
        fields=config.data.fields,
    )[: config.eval.max_prompts]
    stop = Stops.of(config.rollout, hf_directory, tokenizer).tokens
    torch.manual_seed(config.train.seed)
    rollouts: list[Rollout] = []
    for first in progress.bar(range(0, len(prompts), 64), "transformers"):
        batch = prompts[first : first + 64]
        inputs = _inputs(batch, tokenizer, chat_template=config.data.chat_template)
        with torch.no_grad():
            outputs = model.generate(
                inputs.input_ids,
                attention_mask=inputs.attention_mask,
                do_sample=True,
                temperature=config.eval.temperature,
                top_k=0,
                max_new_tokens=config.rollout.max_new_tokens,
                num_return_sequences=samples_per_prompt,
            )
        completions = outputs[:, inputs.input_ids.shape[1] :]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        asked = [prompt for prompt in batch for _ in range(samples_per_prompt)]
        rows = zip(asked, completions.tolist(), texts, strict=True)
        rollouts += [_rollout(*row, stop) for row in rows]
    with closing(Grader(config.reward)) as grader:
        rewards = [grade.reward for grade in grader.grade(rollouts)]
    return sum(reward >= config.reward.high for reward in rewards) / len(rewards)


def _inputs(prompts: Sequence[Prompt], tokenizer: Any, *, chat_template: bool) -> Any:
    """Return the padded tokens of prompts, as `transformers` makes them from their texts."""
    texts = [prompt.text for prompt in prompts]
    if chat_template:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=not chat_template)


def _rollout(prompt: Prompt, tokens: list[int], text: str, stop: frozenset[int]) -> Rollout:
    """Return the rollout of a row, without what follows its first stop token."""
    ends = (count for count, token in enumerate(tokens, 1) if token in stop)
    tokens = tokens[: next(ends, len(tokens))]
    unknown = (math.nan,) * len(tokens)
    return Rollout(prompt, tuple(tokens), unknown, text, tokens[-1] in stop, weight_version=0)


def _headline(text: str) -> None:
    print(f"\n== {text}", flush=True)
