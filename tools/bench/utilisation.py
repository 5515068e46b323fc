"""Measure the share of one GPU's peak that the actor's passes reach, at tensor parallel 1.

    python tools/bench/utilisation.py --out benchmarks/results/NAME.json [--model DIR ...]

Models have the shapes of Qwen2.5-7B and Qwen2.5-Math-1.5B, in bfloat16 with random weights.  If a
model does not fit into memory with its gradients, Adam's state and activations, the first layers
that fit are used, which the result states.  Rollouts have log-normal lengths, all with an
advantage.  Each arm (`ARMS`) is a way to compute the same; all models are measured in one arm
before the next, and the result is on disk after each.  An arm that runs out of memory, or needs a
library that is not installed, is reported and ends no other.  Operations are counted by
`models/flops.py`, the peak is that of `plan/gpus.py`; without a GPU (a test) there is none.
"""

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import math
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from megatron.core.jit import jit_fuser
from megatron.core.models.common.embeddings import rope_utils
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.actor import actor as policy
from megatron_prepo.actor import attention, optimizer, parallel
from megatron_prepo.actor.actor import Actor, TrainingSequence
from megatron_prepo.config import Config, from_tree
from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.files.existing import existing
from megatron_prepo.models.flops import FlopCount, layer_parameters
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.shape import Shape
from megatron_prepo.plan import planner
from megatron_prepo.plan.gpus import peak_flops
from megatron_prepo.plan.memory import stage_activations
from megatron_prepo.process import machine
from megatron_prepo.process.command import in_one_line
from megatron_prepo.records import ScoredSequence
from tools.bench.head_goals import at_least

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = tuple(
    REPOSITORY / "examples" / "paper" / name / "model"
    for name in ("qwen2.5-7b", "qwen2.5-math-1.5b")
)
GOAL_MODEL, GOAL = "qwen2.5-7b", 0.45
"""Minimum model FLOPs utilisation of an update."""
BYTES_A_PARAMETER = 18
"""Bytes per parameter: weights 2, gradients 4, Adam's moments and float32 weights 12."""
SHARE_OF_MEMORY = 0.9
"""Share of the GPU's memory for what a plan counts; the remainder is for the CUDA context,
temporaries of the backward pass and fragmentation."""
SAMPLES = 3


class Arm(NamedTuple):
    """A way to compute the same: settings by section, and attributes that it replaces."""

    settings: dict[str, dict[str, Any]]
    replaced: tuple[tuple[Any, str, Any], ...] = ()
    needs: tuple[str, ...] = ()
    """Modules of which one must be installed."""


def torchs_norm(self: attention.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Return the norm by torch's fused kernel."""
    return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def ligers_norm(self: attention.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Return the norm by Liger's kernel, which rounds where ours does."""
    from liger_kernel.ops import LigerRMSNormFunction

    offset, casting, in_place = 0.0, "llama", False
    return LigerRMSNormFunction.apply(x, self.weight, self.eps, offset, casting, in_place)


MEGATRONS_ROPE = rope_utils._apply_rotary_pos_emb_bshd


def compiled_rope(*args: Any, **settings: Any) -> torch.Tensor:
    """Return Megatron's rotation, compiled as it compiles its fused activation."""
    return _compiled_rope()(*args, **settings)


@functools.cache
def _compiled_rope():
    return jit_fuser(MEGATRONS_ROPE)


ACTIVATION = {"megatron": {"bias_activation_fusion": True}}
NORM = ((attention.RMSNorm, "forward", torchs_norm),)
LIGER = ((attention.RMSNorm, "forward", ligers_norm),)
ROPE = ((rope_utils, "_apply_rotary_pos_emb_bshd", compiled_rope),)
ARMS = {
    "packed": Arm({}),
    "all fused": Arm(ACTIVATION, NORM + ROPE),
    "fused activation and norm": Arm(ACTIVATION, NORM),
    "fused activation": Arm(ACTIVATION),
    "fused norm": Arm({}, NORM),
    "fused rope": Arm({}, ROPE),
    "fused weight gradient": Arm(
        {"megatron": {"gradient_accumulation_fusion": True}},
        needs=("transformer_engine", "fused_weight_gradient_mlp_cuda"),
    ),
    "TransformerEngine rope": Arm(
        {"megatron": {"apply_rope_fusion": True}}, needs=("transformer_engine",)
    ),
    "Liger norm": Arm({}, LIGER, needs=("liger_kernel",)),
    "AdamW not fused": Arm({}, ((optimizer, "fuse_adam", lambda *_, **__: None),)),
    "padded": Arm({"train": {"packing": False}}),
}
"""Arms, the most valuable first.  Fused activation and rope are compiled at first use."""


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
    parser.add_argument("--arms", type=known_arms, default=list(ARMS), help="separated by commas")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after this")
    options = parser.parse_args()
    models = options.model or MODELS
    for model in models:  # check all before measuring the first
        read_hf_config(model)
    start = time.monotonic()
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine.describe()}
    result |= {"cases": [], "not_started": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in itertools.product(options.arms, models):
            case = case_of(result["cases"], model, Path(folder), options)
            if time.monotonic() - start > options.seconds:
                result["not_started"].append(f"{case['model']}, {name}")
            else:
                case["arms"][name] = measure(Path(folder, case["model"]), case, ARMS[name], options)
            result["goals"] = goals(result["cases"])
            durable.write_text(options.out, json.dumps(result, indent=2) + "\n")
    print(markdown(result))
    return 0


def known_arms(words: str) -> list[str]:
    """Return names of arms."""
    names = words.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of {', '.join(ARMS)}")
    return names


def case_of(cases: list[dict], model: Path, folder: Path, options) -> dict:
    """Return the model's case, without arms at first, and write its config.json."""
    name = model.parent.name if model.name == "model" else model.name
    for case in cases:
        if case["model"] == name:
            return case
    hf = read_hf_config(model)
    sequences = rollouts(options.sequences, options.response_tokens, hf["vocab_size"])
    longest = max(len(s.tokens) for s in sequences)
    own = folder / name
    own.mkdir()
    layers = layers_that_fit(Shape.of(hf), _config(own, longest, {}))
    (own / "config.json").write_text(json.dumps(hf | {"num_hidden_layers": layers}))
    case = {
        "model": name,
        "layers": layers,
        "of_layers": hf["num_hidden_layers"],
        "parameters": None,
        "sequences": options.sequences,
        "longest": longest,
        "tokens": FlopCount.of(sequences).tokens,
        "arms": {},
    }
    cases.append(case)
    return case


def measure(folder: Path, case: dict, arm: Arm, options) -> dict:
    """Measure one arm: the passes of a new actor over the same rollouts."""
    if arm.needs and not any(map(importlib.util.find_spec, arm.needs)):
        return {"failed": f"needs {' or '.join(arm.needs)}"}
    config = _config(folder, case["longest"], arm.settings)
    shape = Shape.of(hf := read_hf_config(folder))
    sequences = rollouts(options.sequences, options.response_tokens, hf["vocab_size"])
    parallel.initialize(config.parallel, seed=0)
    with ExitStack() as replaced:
        # no loading: random weights from Megatron take the same time
        for place in ((policy, "load_hf_weights", lambda *_: None), *arm.replaced):
            replaced.enter_context(mock.patch.object(*place))
        try:
            actor = Actor(config)
            case["parameters"] = sum(p.numel() for c in actor.chunks for p in c.parameters())
            measured = passes(actor, sequences)
            work = FlopCount.of(sequences, shape.window)
            result = rates(shape, work, measured, config.model.dtype)
        except torch.OutOfMemoryError as error:
            result = {"failed": str(error).splitlines()[0]}
        except (RuntimeError, ImportError, AssertionError, TypeError, ValueError) as error:
            # a library that rejects this machine: the next arm is measured
            result = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    actor = None  # its memory is for the next arm
    parallel.shut_down()
    gc.collect()
    torch.cuda.empty_cache()
    return result


def layers_that_fit(shape: Shape, config: Config) -> int:
    """Return the layers that fit with gradients, Adam, activations, embeddings and the head."""
    if not torch.cuda.is_available():
        return shape.layers
    memory = torch.cuda.get_device_properties(0).total_memory * SHARE_OF_MEMORY
    embeddings = 2 * shape.hidden * shape.vocabulary
    layer = layer_parameters(shape) + shape.idle_parameters // shape.layers
    kept = partial(
        stage_activations,
        shape,
        config.parallel,
        planner.layer_kind(config.model),
        config.megatron,
        in_flight=1,
        tokens=config.train.micro_batch_tokens,
    )
    for layers in range(shape.layers, 1, -1):
        parameters = BYTES_A_PARAMETER * (embeddings + layers * layer)
        if parameters + kept(num_layers=layers) + planner.head_bytes(config, shape) <= memory:
            return layers
    return 1


def rollouts(num_sequences: int, response_tokens: int, vocabulary: int) -> list[ScoredSequence]:
    """Return prompts of about 200 tokens with completions of log-normal length, sigma 0.8."""
    draw, sequences = random.Random(0), []
    for _ in range(num_sequences):
        prompt = max(2, round(200 * draw.lognormvariate(0, 0.3)))
        completion = max(1, round(response_tokens * min(6, draw.lognormvariate(0, 0.8))))
        tokens = tuple(draw.randrange(vocabulary) for _ in range(prompt + completion))
        sequences.append(ScoredSequence(tokens, start=prompt))
    return sequences


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
    """Return the goal of an update, judged by its best arm, which the goal names."""
    reached = {
        name: arm["update"]["mfu"]
        for case in cases
        for name, arm in case["arms"].items()
        if case["model"] == GOAL_MODEL and "failed" not in arm and arm["update"]["mfu"] is not None
    }
    goal = f"{GOAL_MODEL}, update, model FLOPs utilisation"
    if not reached:
        return [at_least(goal, GOAL, None)]
    best = max(reached, key=reached.__getitem__)
    return [at_least(f"{goal}, {best}", GOAL, reached[best])]


def markdown(result: dict) -> str:
    """Return one line per variant and pass."""
    lines = ["| model | way | pass | tokens/s | TFLOP/s | MFU | peak GiB |", "|" + "---|" * 7]
    for case in result["cases"]:
        layers = f"{case['layers']} of {case['of_layers']} layers"
        for way, arm in case["arms"].items():
            if "failed" in arm:
                lines.append(f"| {case['model']}, {layers} | {way} | failed: {arm['failed']} |")
                continue
            peak = "" if arm["peak_bytes"] is None else f"{arm['peak_bytes'] / 2**30:.1f}"
            for task in ("score", "update"):
                row = arm[task]
                mfu = "" if row["mfu"] is None else f"{row['mfu']:.3f}"
                cells = [f"{case['model']}, {layers}", way, task]
                cells += [f"{row['tokens_per_second']:,.0f}", f"{row['tflops']:.3f}", mfu, peak]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _config(folder: Path, longest: int, settings: dict[str, dict[str, Any]]) -> Config:
    """Return an actor with an arm's settings, without any other part of a run."""
    # set explicitly, since a plan assumes the choice that needs more memory
    layers = "torch" if importlib.util.find_spec("transformer_engine") is None else "te"
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    tree = {
        "run": {"dir": "unused"},
        "model": {"hf": str(folder), "dtype": dtype, "layers": layers},
        "data": {"train": "unused", "eval": "unused", "max_prompt_tokens": longest - 1},
        "selection": {"num_candidates": 1, "num_selected": 1},
        "rollout": {"max_new_tokens": 1},
        "train": {"total_steps": 10} | settings.get("train", {}),
        "megatron": settings.get("megatron", {}),
    }
    return from_tree(tree)


def _now() -> float:
    """Return the time in seconds, after the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
