"""Measure the share of one GPU's peak that the actor's passes reach, at tensor parallel 1.

    python tools/bench/utilisation.py --out benchmarks/results/NAME.json [--model DIR ...]

Models have the shapes of Qwen2.5-Math-1.5B and Qwen2.5-7B, in bfloat16 with random weights.  If a
model with Adam's state does not fit into memory, the first layers that fit are used, which the
result states.  Rollouts have log-normal lengths, all with an advantage, packed and padded.
Operations are counted by `models/flops.py`, the peak is that of `plan/gpus.py`;
without a GPU (a test) there is none.
"""

import argparse
import gc
import json
import math
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.actor import actor as policy
from megatron_prepo.actor import parallel
from megatron_prepo.actor.actor import Actor, TrainingSequence
from megatron_prepo.config import Config, from_tree
from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.files.existing import existing
from megatron_prepo.models.flops import FlopCount, layer_parameters
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.shape import Shape
from megatron_prepo.plan.gpus import peak_flops
from megatron_prepo.process import machine
from megatron_prepo.process.command import in_one_line
from megatron_prepo.records import ScoredSequence
from tools.bench.head_goals import at_least

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = tuple(
    REPOSITORY / "examples" / "paper" / name / "model"
    for name in ("qwen2.5-math-1.5b", "qwen2.5-7b")
)
GOAL_MODEL, GOAL = "qwen2.5-7b", 0.45
"""Minimum model FLOPs utilisation of an update."""
BYTES_A_PARAMETER = 18
"""Bytes per parameter: weights 2, gradients 4, Adam's moments and float32 weights 12."""
SHARE_FOR_THE_MODEL = 0.7
"""Share of the GPU's memory for these; the remainder is for activations and the head."""
SAMPLES = 3


@in_one_line
def main() -> int:
    """Measure each model; the result is on disk after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=ownership.new_file(), required=True, help="JSON file to write"
    )
    parser.add_argument(
        "--model", type=existing(), action="append", help="folder with a config.json"
    )
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=700, help="median; at most 6 times")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after this")
    options = parser.parse_args()
    models = options.model or MODELS
    for model in models:  # check all before measuring the first
        read_hf_config(model)
    start = time.monotonic()
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine.describe()}
    result |= {"cases": [], "not_started": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for model in models:
        if time.monotonic() - start > options.seconds:
            result["not_started"].append(str(model))
        else:
            result["cases"].append(measure(model, options.sequences, options.response_tokens))
        result["goals"] = goals(result["cases"])
        durable.write_text(options.out, json.dumps(result, indent=2) + "\n")
    print(markdown(result))
    return 0


def measure(model: Path, num_sequences: int, response_tokens: int) -> dict:
    """Measure one model: the passes of an actor that is built once, over the same rollouts."""
    hf = read_hf_config(model)
    layers = layers_that_fit(Shape.of(hf))
    sequences = rollouts(num_sequences, response_tokens, hf["vocab_size"])
    longest = max(len(s.tokens) for s in sequences)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(hf | {"num_hidden_layers": layers}))
        config = _config(folder, longest)
        parallel.initialize(config.parallel, seed=0)
        # no loading: random weights from Megatron take the same time
        with mock.patch.object(policy, "load_hf_weights", lambda *_: None):
            actor = Actor(config)
        arms = {}
        for name, changed in ways(config).items():
            actor.config = changed
            arms[name] = passes(actor, sequences)
        shape, parameters = (
            Shape.of(actor.hf),
            sum(p.numel() for c in actor.chunks for p in c.parameters()),
        )
        del actor
        parallel.shut_down()
    gc.collect()
    torch.cuda.empty_cache()
    work = FlopCount.of(sequences, shape.window)
    return {
        "model": model.parent.name if model.name == "model" else model.name,
        "layers": layers,
        "of_layers": hf["num_hidden_layers"],
        "parameters": parameters,
        "sequences": num_sequences,
        "longest": longest,
        "tokens": work.tokens,
        "arms": {name: rates(shape, work, arm, config.model.dtype) for name, arm in arms.items()},
    }


def layers_that_fit(shape: Shape) -> int:
    """Return the layers that fit with gradients and optimizer state next to the embeddings."""
    if not torch.cuda.is_available():
        return shape.layers
    memory = torch.cuda.get_device_properties(0).total_memory * SHARE_FOR_THE_MODEL
    embeddings = 2 * shape.hidden * shape.vocabulary
    fit = (memory / BYTES_A_PARAMETER - embeddings) / layer_parameters(shape)
    return max(1, min(shape.layers, math.floor(fit)))


def rollouts(num_sequences: int, response_tokens: int, vocabulary: int) -> list[ScoredSequence]:
    """Return prompts of about 200 tokens with completions of log-normal length, sigma 0.8."""
    draw, sequences = random.Random(0), []
    for _ in range(num_sequences):
        prompt = max(2, round(200 * draw.lognormvariate(0, 0.3)))
        completion = max(1, round(response_tokens * min(6, draw.lognormvariate(0, 0.8))))
        tokens = tuple(draw.randrange(vocabulary) for _ in range(prompt + completion))
        sequences.append(ScoredSequence(tokens, start=prompt))
    return sequences


def ways(config: Config) -> dict[str, Config]:
    """Return the settings to compare."""
    padded = replace(config, train=replace(config.train, packing=False))
    return {"packed": config, "padded": padded}


def passes(actor: Actor, sequences: list[ScoredSequence]) -> dict:
    """Return seconds of scoring and of updates, after a warm-up of each, and peak memory."""
    seconds = {"score": [], "update": []}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 + SAMPLES):
        start = _now()
        scores = actor.score(sequences, temperature=1.0)
        seconds["score"].append(_now() - start)
        learnt = [
            TrainingSequence(s, score.logprobs_T, (-1.0) ** i, 1 / len(sequences))
            for i, (s, score) in enumerate(zip(sequences, scores, strict=True))
        ]
        start = _now()
        actor.update(learnt)
        seconds["update"].append(_now() - start)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"seconds": {task: spent[1:] for task, spent in seconds.items()}, "peak_bytes": peak}


def rates(shape: Shape, work: FlopCount, measured: dict, dtype: str) -> dict:
    """Add tokens and operations per second, and the share of the peak if it is published."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak, result = peak_flops(device, dtype), dict(measured)
    for task, forwards in (("score", 1), ("update", 3)):
        spent = median(measured["seconds"][task])
        flops = forwards * work.flops(shape) / spent
        result[task] = {
            "tokens_per_second": work.tokens / spent,
            "tflops": flops / 1e12,
            "mfu": flops / peak if peak else None,
        }
    return result


def goals(cases: list[dict]) -> list[dict]:
    """Return the goal of an update, judged by its best variant."""
    reached = [
        arm["update"]["mfu"]
        for case in cases
        for arm in case["arms"].values()
        if case["model"] == GOAL_MODEL and arm["update"]["mfu"] is not None
    ]
    best = max(reached, default=None)
    return [at_least(f"{GOAL_MODEL}, update, model FLOPs utilisation", GOAL, best)]


def markdown(result: dict) -> str:
    """Return one line per variant and pass."""
    lines = ["| model | way | pass | tokens/s | TFLOP/s | MFU | peak GiB |", "|" + "---|" * 7]
    for case in result["cases"]:
        layers = f"{case['layers']} of {case['of_layers']} layers"
        for way, arm in case["arms"].items():
            peak = "" if arm["peak_bytes"] is None else f"{arm['peak_bytes'] / 2**30:.1f}"
            for task in ("score", "update"):
                row = arm[task]
                mfu = "" if row["mfu"] is None else f"{row['mfu']:.3f}"
                cells = [f"{case['model']}, {layers}", way, task]
                cells += [f"{row['tokens_per_second']:,.0f}", f"{row['tflops']:.3f}", mfu, peak]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _config(folder: str, longest: int) -> Config:
    """Return an actor, without any other part of a run."""
    tree = {
        "run": {"dir": "unused"},
        "model": {"hf": folder, "dtype": "bfloat16" if torch.cuda.is_available() else "float32"},
        "data": {"train": "unused", "eval": "unused", "max_prompt_tokens": longest - 1},
        "selection": {"num_candidates": 1, "num_selected": 1},
        "rollout": {"max_new_tokens": 1},
        "train": {"total_steps": 10},
    }
    return from_tree(tree)


def _now() -> float:
    """Return the time in seconds, after the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
