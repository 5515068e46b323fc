"""Prompt files and base models of the tiny tasks: one seed, one CPU thread.

Each task's ``build.py`` describes its task and calls `main`.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_prepo.trainer.step_metrics import spearman
from tiny_task import (
    ANSWER_MARK,
    Draw,
    Problem,
    build_tokenizer,
    draw_training_text,
    draw_unique,
    is_correct,
)

NUM_TRAIN_PROMPTS = 800
NUM_EVAL_PROMPTS = 400

NUM_FRESH_PROMPTS = 12_800

NUM_SCARCE_PROMPTS = 3200
SCARCE_SHARE = 0.2
"""Share of the pool among scarce prompts; the rest is beyond the base model."""

BATCH_SIZE = 32
LEARNING_RATE = 4e-3
WARM_UP_STEPS = 50
DECAY_SHARE = 0.3
ROPE_THETA = 10000.0

SAMPLING_BATCH = 256


@dataclass(frozen=True)
class Task:
    """Description of a task, given by its `build.py`."""

    folder: Path
    seed: int
    draw_for_corpus: Draw
    """Sampler of problems for training the base model."""
    draw_for_pool: Draw
    """Sampler of problems for reinforcement learning and evaluation."""
    draw_beyond: Draw
    """Sampler of problems that the base model cannot do."""
    words: Collection[str]
    max_new_tokens: int
    hidden_size: int
    intermediate_size: int
    num_steps: int
    """Number of steps of supervised training."""
    measured_by: tuple[str, ...]
    """Fields of a problem by which `--measure` splits the pass rate."""
    direct_share: float = 0.3
    """Share of training texts that are answered without working."""


def main(task: Task, description: str) -> None:
    """Run the command line of a task's `build.py`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=task.folder)
    parser.add_argument("--seed", type=int, default=task.seed)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--measure", action="store_true", help="measure --out without building")
    what.add_argument(
        "--fresh",
        type=positive,
        nargs="?",
        const=NUM_FRESH_PROMPTS,
        metavar="N",
        help=f"only write a train.jsonl of N new prompts (default {NUM_FRESH_PROMPTS}) to --out",
    )
    what.add_argument(
        "--scarce",
        type=positive,
        nargs="?",
        const=NUM_SCARCE_PROMPTS,
        metavar="N",
        help=f"only write a train.jsonl of N new prompts (default {NUM_SCARCE_PROMPTS}) to --out, "
        "four of five of which are beyond the base model",
    )
    options = parser.parse_args()
    only_prompts = options.fresh is not None or options.scarce is not None
    if only_prompts and options.out.resolve() == task.folder.resolve():
        parser.error(
            "--fresh and --scarce need an --out: they would replace the shipped train.jsonl"
        )
    if not options.measure:
        written = ["train.jsonl"] if only_prompts else FILES
        refuse_to_replace(task, options.out, written)

    torch.set_num_threads(1)  # one thread adds in one order, so the weights are reproducible
    started = time.perf_counter()
    if options.measure:
        measure(task, options.out, options.seed)
    elif options.fresh is not None:
        write_fresh_prompts(task, options.out, options.seed, options.fresh)
    elif options.scarce is not None:
        write_scarce_prompts(task, options.out, options.seed, options.scarce)
    else:
        build(task, options.out, options.seed)
    wall_seconds = time.perf_counter() - started
    print(f"{wall_seconds:.0f} s, of which {time.process_time():.0f} s on the CPU")


def positive(text: str) -> int:
    """Return a number of prompts; argparse reports anything but a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


# Build


def build(task: Task, out: Path, seed: int) -> None:
    """Write the two prompt files and the base model."""
    problems = write_shipped_prompts(task, out, seed)
    tokenizer = build_tokenizer(task.words)
    corpus = draw_corpus(task, seed, held_back={problem.prompt for problem in problems})
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(base_config(task, tokenizer))
    train(model, tokenizer, [" ".join(text) for text in corpus], random.Random(f"order {seed}"))
    save_base(out / "base", model, tokenizer, task.max_new_tokens)

    sentence = problems[0].prompt
    reloaded_ids = AutoTokenizer.from_pretrained(out / "base")(sentence).input_ids
    assert reloaded_ids == tokenizer(sentence).input_ids, "AutoTokenizer read another tokenizer"


def draw_shipped(task: Task, seed: int) -> list[Problem]:
    """Draw the problems of train.jsonl, then those of eval.jsonl."""
    rng = random.Random(f"pool {seed}")
    return draw_unique(task.draw_for_pool, rng, NUM_TRAIN_PROMPTS + NUM_EVAL_PROMPTS)


def draw_corpus(task: Task, seed: int, held_back: Collection[str]) -> list[tuple[str, str]]:
    """Draw prompt and answer of the training texts of all steps; each is used once."""
    rng = random.Random(f"corpus {seed}")
    return [
        draw_training_text(task.draw_for_corpus, rng, task.direct_share, held_back)
        for _ in range(task.num_steps * BATCH_SIZE)
    ]


FILES = ("train.jsonl", "eval.jsonl", "base")
"""Outputs of `build`."""


def refuse_to_replace(task: Task, out: Path, names: Sequence[str]) -> None:
    """Exit if a folder other than the task's folder already contains an output."""
    there = [name for name in names if os.path.lexists(out / name)]
    if there and out.resolve() != task.folder.resolve():
        sys.exit(
            f"error: --out {out} already contains {', '.join(there)}; nothing was written: choose "
            "another folder, or move the files"
        )


def write_shipped_prompts(task: Task, out: Path, seed: int) -> list[Problem]:
    """Write train.jsonl and eval.jsonl; returns their problems."""
    problems = draw_shipped(task, seed)
    write_prompts(out / "train.jsonl", "train", problems[:NUM_TRAIN_PROMPTS])
    write_prompts(out / "eval.jsonl", "eval", problems[NUM_TRAIN_PROMPTS:])
    return problems


def write_fresh_prompts(task: Task, out: Path, seed: int, count: int) -> list[Problem]:
    """Write a train.jsonl from the same distribution, without any prompt of the shipped files."""
    shipped = {problem.prompt for problem in draw_shipped(task, seed)}
    problems = draw_unique(task.draw_for_pool, random.Random(f"fresh {seed}"), count, shipped)
    write_prompts(out / "train.jsonl", "fresh", problems)
    return problems


def write_scarce_prompts(task: Task, out: Path, seed: int, count: int) -> None:
    """Write a train.jsonl in which few prompts are of the pool, and no prompt of the shipped files.

    The rest is beyond the base model: where prompts that teach are scarce, choosing them pays.
    """
    shipped = {problem.prompt for problem in draw_shipped(task, seed)}
    rng = random.Random(f"scarce {seed}")
    within = round(count * SCARCE_SHARE)
    problems = draw_unique(task.draw_for_pool, rng, within, shipped)
    held_back = shipped | {problem.prompt for problem in problems}
    problems += draw_unique(task.draw_beyond, rng, count - within, held_back)
    rng.shuffle(problems)
    write_prompts(out / "train.jsonl", "scarce", problems)


def write_prompts(path: Path, split: str, problems: Sequence[Problem]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for index, problem in enumerate(problems):
            record = {"id": f"{split}-{index:04d}", **asdict(problem)}
            record["answer"] = str(record["answer"])
            del record["working"]
            file.write(json.dumps(record) + "\n")


def base_config(task: Task, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Return a Qwen3 configuration.

    Not Qwen2: for it, AutoTokenizer of transformers 5 ignores the tokenizer class in the directory
    and rebuilds a byte-level tokenizer, which silently drops our words.
    """
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=task.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=task.hidden_size // 4,
        intermediate_size=task.intermediate_size,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    rng: random.Random,
) -> None:
    """Train with the loss on the full text, so that the perplexity of prompts is meaningful."""
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    num_steps = len(rows) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_steps)
    )
    model.train()
    with tqdm(length_bucketed_batches(rows, rng), total=num_steps, unit="step") as progress:
        for batch in progress:
            input_ids = pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
            labels = pad_sequence(batch, batch_first=True, padding_value=-100)
            # The padding is on the right, which causal attention never sees: no mask is needed.
            loss = model(input_ids=input_ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Return the factor of a schedule: linear warm-up, constant, then linear decay to zero.

    The decay takes the last DECAY_SHARE of the steps.
    """
    warm_up = (step + 1) / WARM_UP_STEPS
    decay = (num_steps - step) / (DECAY_SHARE * num_steps)
    return min(1.0, warm_up, decay)


def length_bucketed_batches(
    rows: list[list[int]], rng: random.Random, batches_per_bucket: int = 50
) -> Iterator[list[torch.Tensor]]:
    """Yield batches of rows of similar length: each bucket is sorted, split, and its batches
    shuffled."""
    bucket_size = batches_per_bucket * BATCH_SIZE
    for start in range(0, len(rows), bucket_size):
        bucket = sorted(rows[start : start + bucket_size], key=len)
        firsts = list(range(0, len(bucket), BATCH_SIZE))
        rng.shuffle(firsts)
        for first in firsts:
            yield [torch.tensor(row) for row in bucket[first : first + BATCH_SIZE]]


def save_base(
    path: Path,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: int,
) -> None:
    """Save a Hugging Face directory that versions before transformers 5 can read as well."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    # transformers 5 nests the rope base and renamed the tokenizer class; it still reads these.
    set_entry(path / "config.json", "rope_theta", ROPE_THETA)
    set_entry(path / "tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast")


def set_entry(path: Path, key: str, value: object) -> None:
    entries = json.loads(path.read_text(encoding="utf-8"))
    entries[key] = value
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Measure


Record = dict[str, Any]
"""One line of a prompt file."""


def measure(task: Task, out: Path, seed: int) -> None:
    """Print the base model's pass rate at temperature 1, and its correlation with perplexity.

    Suffixes: P prompts of a file, G samples per prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    model = AutoModelForCausalLM.from_pretrained(out / "base").eval()
    torch.manual_seed(seed)

    records = read_prompts(out / "eval.jsonl")
    passed_PG, _ = sample_passes(model, tokenizer, records, num_samples=4)
    print(f"eval.jsonl, {len(records)} prompts x 4: pass rate {passed_PG.mean():.3f}")
    for key in task.measured_by:
        print(f"  by {key}: {format_means(records, key, passed_PG)}")

    records = read_prompts(out / "train.jsonl")
    passed_PG, direct_PG = sample_passes(model, tokenizer, records, num_samples=8)
    pass_rate_P = passed_PG.mean(dim=1)
    ppl_P = score_perplexity(model, tokenizer, records)
    length_P = torch.tensor([float(len(tokenizer(r["prompt"]).input_ids)) for r in records])
    print(f"train.jsonl, {len(records)} prompts x 8: pass rate {passed_PG.mean():.3f}")
    print(f"  without working {direct_PG.float().mean():.3f}", end=", ")
    print(f"pass rate {passed_PG[direct_PG].mean():.3f}", end=", ")
    print(f"with working {passed_PG[~direct_PG].mean():.3f}")
    print(f"  groups all right {(pass_rate_P == 1).float().mean():.3f}")
    print(f"  groups all wrong {(pass_rate_P == 0).float().mean():.3f}")
    print(f"  prompt perplexity {ppl_P.min():.2f} .. {ppl_P.max():.2f}")
    print(f"  Spearman(perplexity, pass rate) {spearman(ppl_P, pass_rate_P):.3f}")
    print(f"  Spearman(prompt length, pass rate) {spearman(length_P, pass_rate_P):.3f}")


def read_prompts(path: Path) -> list[Record]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@torch.no_grad()
def sample_passes(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: list[Record],
    num_samples: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample at temperature 1; returns 1.0 where correct, and whether direct, both ``[P, G]``."""
    order = sorted(range(len(records)), key=lambda index: len(records[index]["prompt"]))
    passed_PG = torch.zeros(len(records), num_samples)
    direct_PG = torch.zeros(len(records), num_samples, dtype=torch.bool)
    for chunk in tqdm(torch.tensor(order).split(SAMPLING_BATCH // num_samples), unit="batch"):
        prompts = [records[index]["prompt"] for index in chunk]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        output_ids = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=num_samples,
        )
        responses = tokenizer.batch_decode(output_ids[:, inputs.input_ids.shape[1] :])
        for place, response in enumerate(responses):
            index, sample = chunk[place // num_samples], place % num_samples
            passed_PG[index, sample] = is_correct(response, records[index]["answer"])
            direct_PG[index, sample] = response.startswith(ANSWER_MARK)
    return passed_PG, direct_PG


@torch.no_grad()
def score_perplexity(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> torch.Tensor:
    """Return exp(mean negative log-likelihood) of the prompt tokens after ``<bos>``, ``[P]``."""
    losses = []
    for record in records:
        input_ids = torch.tensor([tokenizer(record["prompt"]).input_ids])
        losses.append(model(input_ids=input_ids, labels=input_ids).loss)
    return torch.stack(losses).exp()


def format_means(records: list[Record], key: str, passed_PG: torch.Tensor) -> str:
    """Return the mean pass rate per value of a field, such as ``1: 0.81, 2: 0.51``."""
    values = torch.tensor([record[key] for record in records])
    means = {int(value): passed_PG[values == value].mean() for value in values.unique()}
    return ", ".join(f"{value}: {mean:.2f}" for value, mean in means.items())
