"""Compare the results of `megatron-prepo plan` with this machine: peak memory, and rates.

    python tools/bench/plan.py --out benchmarks/results/NAME.json [--model DIR ...]

Memory: an actor of a shape, with random weights at tensor parallel 1, trains on sequences that fill
its micro-batches; the peak of bytes in tensors (`torch.cuda.max_memory_allocated`) is compared with
the plan's for that rank, without an engine.  Of a shape that is too large, the first layers that
fit are used, which the result states.  Further memory of the process corresponds to the reserve of
a plan.

Rates: the products of a layer and of the head, forward, at the micro-batch's tokens; copies within
memory, and to and from pinned host memory; each compared with the vendor's peak.

Without a GPU (a test), torch's profiler counts allocations, and there are no peaks.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import math
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.actor import actor as policy
from megatron_prepo.actor import parallel
from megatron_prepo.actor.actor import Actor, TrainingSequence
from megatron_prepo.config import Config, from_tree
from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.files.existing import existing
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.shape import Shape
from megatron_prepo.plan import planner as plan
from megatron_prepo.plan.gpus import DEVICE_NAMES, GPUS
from megatron_prepo.plan.layout_search import RECOMPUTE
from megatron_prepo.process import machine
from megatron_prepo.process.command import in_one_line
from megatron_prepo.records import ScoredSequence
from tools.bench.utilisation import MODELS, layers_that_fit

GIB = 2**30
WITHIN = 0.1
"""Maximum of planned bytes divided by measured bytes, minus 1."""
SAMPLES = 5


@in_one_line
def main() -> int:
    """Measure each model; the result is on disk after each part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=ownership.new_file(), required=True, help="JSON file to write"
    )
    parser.add_argument(
        "--model", type=existing(), action="append", help="folder with a config.json"
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--sequences", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument("--copy-mib", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after this")
    options = parser.parse_args()
    models = options.model or MODELS
    for model in models:  # check all before measuring the first
        read_hf_config(model)
    start = time.monotonic()
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine.describe()}
    result |= {"memory": [], "products": [], "copies": {}, "not_started": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        result["goal"] = goal(result["memory"])
        durable.write_text(options.out, json.dumps(result, indent=2) + "\n")

    result["copies"] = copies(options.copy_mib * 2**20)
    save()
    for model in models:
        result["products"] += products(model, options.length * options.sequences)
        save()
    for model in models:
        for megatron in ({}, RECOMPUTE):
            if time.monotonic() - start > options.seconds:
                result["not_started"].append([str(model), megatron])
            else:
                result["memory"].append(memory(model, megatron, options.length, options.sequences))
            save()
    print(markdown(result))
    return 0


def memory(model: Path, megatron: dict, length: int, num_sequences: int) -> dict:
    """Return planned and measured bytes of a rank for two updates of two micro-batches."""
    hf = read_hf_config(model)
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(folder, megatron, length, num_sequences)
        layers = layers_that_fit(Shape.of(hf), config)
        Path(folder, "config.json").write_text(json.dumps(hf | {"num_hidden_layers": layers}))
        question = plan.PlanRequest(gpus=1, engine="elsewhere")
        (rank,) = plan.make_plan(config, question).ranks
        measured = _learn(config, length, 2 * num_sequences, hf["vocab_size"])
    planned = rank.actor + rank.activations + rank.head
    return {
        "model": _name(model),
        "layers": layers,
        "of_layers": hf["num_hidden_layers"],
        "kind": config.model.layers,
        "megatron": megatron,
        "tokens": length * num_sequences,
        "planned": planned,
        "planned_parts": {
            name: getattr(rank, name) for name in ("actor", "activations", "head", "parameters")
        },
        **measured,
        "planned_over_measured": planned / measured["peak"],
    }


def _learn(config: Config, length: int, num_sequences: int, vocabulary: int) -> dict:
    """Return the peak bytes over the lifetime of an actor."""
    generator = torch.Generator().manual_seed(0)
    with most_bytes() as most:
        parallel.initialize(config.parallel, seed=0)
        # no loading: random weights from Megatron take the same memory
        with mock.patch.object(policy, "load_hf_weights", lambda *_: None):
            actor = Actor(config)
        for _ in range(2):  # Adam's moments exist from the second update on
            tokens_NS = torch.randint(vocabulary, (num_sequences, length), generator=generator)
            rollouts = [
                TrainingSequence(
                    ScoredSequence(tuple(tokens_S.tolist()), start=length // 2),
                    torch.full((length - length // 2,), -1.0),
                    (-1.0) ** i,
                    1 / num_sequences,
                )
                for i, tokens_S in enumerate(tokens_NS)
            ]
            actor.update(rollouts)
        held = _outside()
        del actor
        parallel.shut_down()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"peak": most.bytes, **held}


@contextmanager
def most_bytes():
    """Yield an object whose `bytes` will be the peak of tensors created in the context."""
    most = SimpleNamespace(bytes=0)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield most
        most.bytes = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            yield most
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        most.bytes = max(itertools.accumulate(changes, initial=0))


def _outside() -> dict:
    """Return bytes of the allocator beyond tensors, and of the process beyond the allocator."""
    if not torch.cuda.is_available():
        return {"fragments": None, "context": None}
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.max_memory_reserved()
    return {
        "fragments": reserved - torch.cuda.max_memory_allocated(),
        "context": total - free - torch.cuda.memory_reserved(),
    }


def products(model: Path, tokens: int) -> list[dict]:
    """Measure the matrix products of a layer and of the head, in bfloat16."""
    shape, device = Shape.of(read_hf_config(model)), parallel.device()
    sizes = {
        "queries, keys, values": (shape.hidden, shape.queries + 2 * shape.keys),
        "attention's output": (shape.queries, shape.hidden),
        "gate and up": (shape.hidden, 2 * shape.mlp),
        "down": (shape.mlp, shape.hidden),
        "head": (shape.hidden, shape.vocabulary),
    }
    gpu = this_gpu()
    measured = []
    for name, (inputs, outputs) in sizes.items():
        x_TI = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
        weight_OI = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
        spent = seconds(lambda x_TI=x_TI, weight_OI=weight_OI: x_TI @ weight_OI.t())
        rate = 2 * tokens * inputs * outputs / spent
        measured.append(
            {
                "model": _name(model),
                "product": name,
                "sizes": [tokens, inputs, outputs],
                "flops": rate,
                "of_peak": rate / gpu.flops if gpu else None,
            }
        )
    return measured


def copies(num_bytes: int) -> dict:
    """Bytes per second; a copy within memory reads and writes each."""
    device, gpu = parallel.device(), this_gpu()
    here, there = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    within = 2 * num_bytes / seconds(lambda: there.copy_(here))
    found = {"memory": within, "memory_of_peak": within / gpu.bandwidth if gpu else None}
    if device.type == "cuda":
        host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        found["to_host"] = num_bytes / seconds(lambda: host.copy_(here, non_blocking=True))
        found["from_host"] = num_bytes / seconds(lambda: here.copy_(host, non_blocking=True))
    return found


def seconds(work) -> float:
    """Median of SAMPLES, the device being done, after one to warm up."""
    spent = []
    for _ in range(1 + SAMPLES):
        start = _now()
        work()
        spent.append(_now() - start)
    return median(spent[1:])


def this_gpu():
    """The vendor's numbers of the device; None where we know of none."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return GPUS[DEVICE_NAMES[name]] if name in DEVICE_NAMES else None


def goal(cases: list[dict]) -> dict:
    """Whether every plan was within the goal of what was measured, on a GPU only."""
    said = {"goal": "planned over measured bytes, less 1, at most", "value": WITHIN}
    if not cases or not torch.cuda.is_available():
        return said | {"worst": None, "verdict": "not measured"}
    worst = max(abs(case["planned_over_measured"] - 1) for case in cases)
    return said | {"worst": worst, "verdict": "met" if worst <= WITHIN else "missed"}


def configuration(folder: str, megatron: dict, length: int, num_sequences: int) -> Config:
    """Return an actor for `num_sequences` per micro-batch, without any other part of a run."""
    prompt = length // 2
    # set explicitly, since a plan assumes the choice that needs more memory
    layers = "torch" if importlib.util.find_spec("transformer_engine") is None else "te"
    tree = {
        "run": {"dir": "unused"},
        "model": {"hf": folder, "dtype": "bfloat16", "layers": layers},
        "data": {"train": "unused", "eval": "unused", "max_prompt_tokens": prompt},
        "selection": {"num_candidates": num_sequences, "num_selected": num_sequences},
        "rollout": {"max_new_tokens": length - prompt, "samples_per_prompt": 2},
        "train": {"total_steps": 10, "micro_batch_tokens": length * num_sequences},
        "loss": {"head_memory_mib": 256},
        "megatron": megatron,
    }
    return from_tree(tree)


def markdown(result: dict) -> str:
    """Return tables in Markdown."""
    lines = ["| model | layers | recomputed | tokens | planned GiB | measured GiB | ratio |"]
    lines.append("|" + "---|" * 7)
    for case in result["memory"]:
        cells = [case["model"], f"{case['layers']} of {case['of_layers']}"]
        cells += ["yes" if case["megatron"] else "no", f"{case['tokens']:,}"]
        cells += [f"{case[name] / GIB:.3f}" for name in ("planned", "peak")]
        lines.append("| " + " | ".join([*cells, f"{case['planned_over_measured']:.3f}"]) + " |")
    lines += ["", "| model | product | TFLOP/s | of the peak |", "|" + "---|" * 4]
    for row in result["products"]:
        share = "" if row["of_peak"] is None else f"{row['of_peak']:.2f}"
        cells = [row["model"], row["product"], f"{row['flops'] / 1e12:.3f}", share]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, rate in result["copies"].items():
        if rate is not None:
            lines.append(
                f"{name}: {rate:.2f}" if "peak" in name else f"{name}: {rate / 1e9:.1f} GB/s"
            )
    return "\n".join([*lines, f"goal: {result['goal']['verdict']}"])


def _name(model: Path) -> str:
    return model.parent.name if model.name == "model" else model.name


def _now() -> float:
    """Return the time in seconds, after the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
