"""The laptop experiment from end to end: convert, train, export, and evaluate the export.

The base model is converted from Hugging Face format to a Megatron checkpoint, PREPO trains it at
tensor parallel 2, the result is exported to Hugging Face format, and plain `transformers`, which
shares no code with this project, measures the pass rate again.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
from megatron_prepo.rewards import load
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run.metrics_table import read_steps

IMPORTED = "imported base model"
"""The kind of `base_megatron/` in its marker (`ownership.py`)."""


def demo(directory: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the demo in `directory`, replacing an earlier one; return the summary.

    Raises UserError, before anything is written, if the directory has other contents.
    """
    laptop = EXAMPLES / "laptop"
    decided = ("run.dir=", "run.overwrite=", "model.megatron=")
    if given := [override for override in overrides if override.startswith(decided)]:
        raise UserError(f"{given[0]}: the demo sets this; choose its directory by --dir")
    base_megatron = directory / "base_megatron"
    settings = [
        f"run.dir={literal(directory)}",
        "run.overwrite=true",
        f"model.hf={literal(laptop / 'base')}",
        f"model.megatron={literal(base_megatron)}",
        f"data.train={literal(laptop / 'train.jsonl')}",
        f"data.eval={literal(laptop / 'eval.jsonl')}",
        "checkpoint.every=0",  # the demo starts from the beginning each time
        *overrides,
    ]
    config = configuration.load(laptop / "prepo.yaml", settings)
    run_directory.check(config)

    _headline("1/3  Hugging Face checkpoint -> Megatron checkpoint")
    ownership.make_room(base_megatron, IMPORTED)
    converter = [sys.executable, "-m", "checkpoints_convert", "import"]
    with activity.handed_over():
        subprocess.run(
            [*converter, "--hf", config.model.hf, "--out", str(base_megatron)], check=True
        )
    ownership.seal(base_megatron, IMPORTED)

    _headline(f"2/3  {config.train.total_steps} steps of PREPO at tensor parallel 2")
    start.train(laptop / "prepo.yaml", settings)

    _headline("3/3  the exported model in plain transformers")
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    summary["pass_rate_transformers"] = plain_transformers_pass_rate(
        directory / "hf", config, samples_per_prompt=config.eval.samples_per_prompt
    )
    write_text(directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(
        f"\nheld-out pass rate: {summary['pass_rate_before']:.3f} before, "
        f"{summary['pass_rate_after']:.3f} after, "
        f"{summary['pass_rate_transformers']:.3f} by transformers alone\n"
        f"{reward_words(list(read_steps(directory)))}"
        f"results are in {directory}; the picture is {directory / 'pass_rate.png'}"
    )
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

    tokenizer = AutoTokenizer.from_pretrained(
        hf_directory, padding_side="left", trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        hf_directory, dtype=getattr(torch, config.model.dtype), trust_remote_code=False
    ).eval()
    [file] = config.data.eval_files.values()
    prompts = read_prompts(file, tokenizer, max_tokens=config.data.max_prompt_tokens)
    prompts = prompts[: config.eval.max_prompts]
    grade = load(config.reward.function)
    torch.manual_seed(config.train.seed)
    passed = 0.0
    for first in progress.bar(range(0, len(prompts), 64), "transformers"):
        batch = prompts[first : first + 64]
        inputs = tokenizer([p.text for p in batch], padding=True, return_tensors="pt")
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
        texts = tokenizer.batch_decode(
            outputs[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
        answers = [p.answer for p in batch for _ in range(samples_per_prompt)]
        rewards = [grade(text, answer) for text, answer in zip(texts, answers, strict=True)]
        passed += sum(reward >= config.reward.high for reward in rewards)
    return passed / (len(prompts) * samples_per_prompt)


def _headline(text: str) -> None:
    print(f"\n== {text}", flush=True)
