"""Compare a training step with TRL's GRPOTrainer and a plain PyTorch loop, each on one core.

    python tools/bench/train.py --case laptop --trl PYTHON --out benchmarks/results/NAME.json
    python tools/bench/train.py --case log-normal --trl PYTHON --out benchmarks/results/NAME.json

PYTHON is an interpreter that also has TRL (extra `bench`).  All trainers get the same model,
rollouts, rewards, micro-batch size, clip, normaliser and optimizer; a loss or gradient norm that
differs between them stops the benchmark.  Each trainer is a separate process with one thread; they
alternate, in random order per round.  A case that the file already has is replaced, other cases are
kept.  docs/train_benchmark.md explains the numbers.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.models.flops import FlopCount
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.shape import Shape
from megatron_prepo.process import machine
from megatron_prepo.process.command import in_one_line
from megatron_prepo.records import scored_sequence
from tools.bench import train_case
from tools.bench.head_goals import at_least
from tools.bench.train_case import Case

ARMS = Path(__file__).resolve().parent / "train_arms.py"
AGREEMENT = 1e-4
"""Maximum relative difference of losses and gradient norms, from float32 sums in another order."""
UPDATE_GOAL, STEP_GOAL = 2.0, 1.5
"""Goals for tokens per second, relative to TRL."""
PREPO = (
    "selection.method=prepo",
    "weighting.method=relative_entropy",
    "selection.num_candidates=160",
    f"data.train={train_case.LAPTOP / 'train.jsonl'}",
)
STAGES = {
    "perplexity": "score",
    "rollouts": "generate",
    "old_logprobs": "score",
    "generate": "generate",
    "update": "update",
}
"""Names of stages in the trainers, and ours in the table; all other time is `other`."""


@dataclass(frozen=True)
class Arm:
    """A named trainer with its specific settings of ours."""

    name: str
    trainer: str
    overrides: tuple[str, ...] = ()


@in_one_line
def main() -> int:
    """Measure a case; write JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=("laptop", "log-normal"), required=True)
    parser.add_argument("--trl", type=Path, help="interpreter with TRL; default: without TRL")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; other cases are kept")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, help="default: 32 (laptop), 4 (log-normal)")
    options = parser.parse_args()
    earlier = ownership.earlier_result(options.out, ("machine", "cases"))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options, Path(folder))
    out = options.out
    cases = (earlier["cases"] if earlier else {}) | {options.case: measured}
    result = {"machine": machine.describe(), "cases": cases}
    out.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(out, json.dumps(result, indent=2) + "\n")
    print(markdown(options.case, measured))
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict:
    """Measure one case: agreement, the actor's passes, and complete steps if it can generate."""
    can_write = options.case == "laptop"
    if can_write:
        case = train_case.laptop(folder, options.prompts or 32)
    else:
        case = train_case.log_normal(folder, options.prompts or 4)
    case.write(folder)
    arms = available(options.trl)
    fixed = take_turns(arms, "fixed", ("score", "update"), folder, options)
    check_agreement(fixed)
    result = {
        "command": _command(options),
        "trl": _trl_version(options.trl),
        "rollouts": sum(len(g.completions) for g in case.groups),
        "tokens": case.tokens,
        "learnt_share": case.learnt_share,
        "rounds": options.rounds,
        "passes": {arm: passes(case, answers) for arm, answers in fixed.items()},
        "products": products(case, fixed["ours"]),
    }
    if can_write:
        whole = [arm for arm in arms if not arm.overrides]
        whole.append(Arm("ours, PREPO", "ours", PREPO))
        loop = take_turns(whole, "loop", ("step",), folder, options)
        result["steps"] = {arm: steps(case, answers["step"]) for arm, answers in loop.items()}
        result["perplexity_share"] = perplexity_share(result["steps"]["ours, PREPO"])
    return result | {"goals": goals(result)}


def available(trl: Path | None) -> list[Arm]:
    """Return the trainers that can run here, including variants of ours by settings."""
    unshared = "train.share_prefixes=false"
    arms = [
        Arm("ours", "ours"),
        Arm("ours, prompts not shared", "ours", (unshared,)),
        Arm("ours, padded", "ours", (unshared, "train.packing=false")),
        Arm("plain PyTorch", "plain"),
    ]
    return arms + ([Arm("TRL", "trl")] if trl else [])


def take_turns(
    arms: list[Arm], mode: str, tasks: tuple[str, ...], folder: Path, options
) -> dict[str, dict[str, list[dict]]]:
    """Return each arm's results of each task, the first one a warm-up; stops all processes."""
    order, answers = random.Random(0), {arm.name: {task: [] for task in tasks} for arm in arms}
    with ExitStack() as running:
        processes = {}
        for arm in arms:
            python = options.trl if arm.trainer == "trl" else sys.executable
            run = folder / f"{mode} {arm.name}"
            command = [str(python), str(ARMS), arm.trainer, mode, str(folder), f"run.dir={run}"]
            log = running.enter_context(open(folder / f"{mode} {arm.name}.log", "w+"))
            process = subprocess.Popen(
                [*command, *arm.overrides],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
            running.callback(_end, process)
            processes[arm.name] = process, log
        for _ in range(1 + options.rounds):
            for name in order.sample(list(processes), len(processes)):
                for task in tasks:
                    answers[name][task].append(_ask(name, *processes[name], task))
    return answers


def _ask(name: str, process: subprocess.Popen, log, task: str) -> dict:
    process.stdin.write(task + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        log.seek(0)
        raise SystemExit(f"error: {name} ended at {task}; its output:\n{log.read()[-4000:]}")
    return json.loads(line)


def _end(process: subprocess.Popen) -> None:
    process.stdin.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def check_agreement(answers: dict[str, dict[str, list[dict]]]) -> None:
    """Stop the benchmark unless all trainers computed the same numbers, in every round."""
    ours = answers["ours"]
    for name, theirs in answers.items():
        for task, values in (("score", ["logprob"]), ("update", ["loss", "grad_norm"])):
            for mine, other in zip(ours[task], theirs[task], strict=True):
                for value in values:
                    if not math.isclose(mine[value], other[value], rel_tol=AGREEMENT):
                        raise SystemExit(
                            f"error: {name} found {value} {other[value]}, ours {mine[value]}: they "
                            "differ, so their times are not comparable"
                        )


def passes(case: Case, answers: dict[str, list[dict]]) -> dict:
    """Return median seconds and tokens per second of the actor's passes, and process memory."""
    result = {}
    for task, rounds in answers.items():
        seconds = [answer["seconds"][task] for answer in rounds[1:]]
        result[task] = {
            "seconds": seconds,
            "wall": [answer["wall"] for answer in rounds[1:]],
            "tokens_per_second": case.tokens / median(seconds),
        }
    last = answers["update"][-1]
    return result | {
        "loss": answers["update"][0]["loss"],
        "grad_norm": answers["update"][0]["grad_norm"],
        "logprob": answers["score"][0]["logprob"],
        "memory": {key: last[key] for key in ("resident_before", "resident_peak")},
    }


def steps(case: Case, rounds: list[dict]) -> dict:
    """Return seconds per stage of complete steps, and tokens per second, prompts and completions.

    A trainer that selects its prompts reports their length; for all others it is that of the case.
    """
    rounds, prompts = rounds[1:], sum(len(g.prompt) * len(g.completions) for g in case.groups)
    result = {"generate": [], "score": [], "update": [], "other": [], "step": []}
    for answer in rounds:
        stages = dict.fromkeys(result, 0.0)
        for name, stage in STAGES.items():
            stages[stage] += answer["seconds"].get(name, 0.0)
        whole = answer["seconds"]["step"]
        stages |= {"step": whole, "other": whole - sum(stages.values())}
        for stage, seconds in stages.items():
            result[stage].append(seconds)
    given = [answer.get("prompt_tokens", prompts) for answer in rounds]
    generated = [answer["completion_tokens"] for answer in rounds]
    rates = [(p + c) / s for p, c, s in zip(given, generated, result["step"], strict=True)]
    return {
        "seconds": result,
        "perplexity": median(answer["seconds"].get("perplexity", 0.0) for answer in rounds),
        "prompt_tokens": given,
        "completion_tokens": generated,
        "wall": [answer["wall"] for answer in rounds],
        "tokens_per_second": median(rates),
        "memory": {key: rounds[-1][key] for key in ("resident_before", "resident_peak")},
    }


def products(case: Case, answers: dict[str, list[dict]]) -> dict:
    """Return operations per second of our passes relative to plain matrix products on this core.

    Operations are those of the rollouts that a pass processes (`flops.py`).
    """
    shape = Shape.of(read_hf_config(case.config.model.hf))
    a, seconds = torch.randn(1024, 1024), []
    for _ in range(20):
        start = time.process_time()
        a @ a
        seconds.append(time.process_time() - start)
    peak = 2 * 1024**3 / min(seconds)
    rates = {"peak_gflops": peak / 1e9}
    for task, times, passed in (("score", 1, case), ("update", 3, case.learnt())):
        work = FlopCount.of(
            (scored_sequence(rollout) for rollout in passed.rollouts(0)), shape.window
        )
        spent = median(answer["seconds"][task] for answer in answers[task][1:])
        flops = times * work.flops(shape) / spent
        rates[task] = {"gflops": flops / 1e9, "of_peak": flops / peak}
    return rates


def perplexity_share(
    step: dict,
    *,
    prompt_tokens: int = 200,
    response_tokens: int = 2000,
    candidates: float = 5.0,
    samples: int = 8,
) -> dict:
    """Return the share of the perplexity pass in a step of the paper's proportions.

    Per selected prompt, p tokens long, c candidates are scored; its G rollouts of r tokens are
    generated, scored and trained on.  With the measured rates g, in generated tokens per second,
    and s and u, in tokens of prompt and completion per second,

        share = (c p / s) / (c p / s + G r / g + G (p + r) / s + G (p + r) / u)

    c follows from the paper's 20 % of selected candidates; p, r and G are ours.  Not included: the
    growth of attention's share with length, weight sync, grading.
    """
    seconds = {stage: median(values) for stage, values in step["seconds"].items()}
    generated, prompts = median(step["completion_tokens"]), median(step["prompt_tokens"])
    scoring = (prompts + generated) / (seconds["score"] - step["perplexity"])
    learning = (prompts + generated) / seconds["update"]
    probe = candidates * prompt_tokens / scoring
    rollouts = samples * response_tokens / (generated / seconds["generate"])
    rest = samples * (prompt_tokens + response_tokens) * (1 / scoring + 1 / learning)
    return {
        "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens,
        "candidates": candidates,
        "samples": samples,
        "share": probe / (probe + rollouts + rest),
    }


def goals(result: dict) -> list[dict]:
    """Return the goals, compared with TRL in the same run."""
    rows = []
    for part, task, goal in (("passes", "update", UPDATE_GOAL), ("steps", "step", STEP_GOAL)):
        arms = result.get(part, {})
        if part == "passes":
            arms = {name: arm[task] for name, arm in arms.items()}
        if not arms:
            continue
        measured = None
        if "TRL" in arms:
            measured = arms["ours"]["tokens_per_second"] / arms["TRL"]["tokens_per_second"]
        rows.append(at_least(f"{task}, tokens a second over TRL's", goal, measured))
    return rows


def _command(options: argparse.Namespace) -> str:
    """Return the command to reproduce the result."""
    words = ["python tools/bench/train.py --case", options.case, "--rounds", options.rounds]
    words += ["--prompts", options.prompts] if options.prompts else []
    return " ".join(map(str, [*words, *(["--trl TRL/bin/python"] if options.trl else [])]))


def _trl_version(python: Path | None) -> str | None:
    if python is None:
        return None
    code = "from importlib import metadata; print(metadata.version('trl'))"
    return subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def markdown(name: str, measured: dict) -> str:
    """Return the tables of a case."""
    ours = measured["passes"]["ours"]
    lines = [
        f"## {name}: {measured['rollouts']} rollouts, {measured['tokens']:,} tokens, "
        f"{measured['learnt_share']:.0%} of them in groups with an advantage",
        "",
        "| | score, tokens/s | ours over it | update, tokens/s | ours over it | memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for arm, row in measured["passes"].items():
        cells = [arm]
        for task in ("score", "update"):
            rate = row[task]["tokens_per_second"]
            cells += [f"{rate:,.0f}", f"{ours[task]['tokens_per_second'] / rate:.2f}"]
        memory = row["memory"]["resident_peak"] - row["memory"]["resident_before"]
        lines.append("| " + " | ".join([*cells, f"{memory / 2**20:,.0f}"]) + " |")
    for arm, row in measured.get("steps", {}).items():
        if arm == "ours":
            lines += [
                "",
                "| step, seconds | generate | score | update | other | whole | tokens/s |",
            ]
            lines += ["|---|---|---|---|---|---|---|"]
        cells = [f"{median(row['seconds'][stage]):.3f}" for stage in row["seconds"]]
        lines.append("| " + " | ".join([arm, *cells, f"{row['tokens_per_second']:,.0f}"]) + " |")
    for goal in measured["goals"]:
        value = "" if goal["measured"] is None else f"{goal['measured']:.2f}, "
        lines.append(f"\n{goal['goal']} {goal['bound']}: {value}{goal['verdict']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
