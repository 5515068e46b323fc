"""Measure seconds per stage of a weight sync to an SGLang server, per transport, and of a copy.

    python tools/bench/sync.py --out benchmarks/results/sync_NAME.json [--servers-python PYTHON]
        [--shape 0.5gb] [--bucket-mb 64] [--transports value,ipc,distributed,disk] [--rounds 5]

A model of random weights, one trainer process and one server on the same machine.  In each round
every transport syncs once, and the same bytes are copied within memory.  Before each sync the sign
of all weights is flipped; the server's results must then be the same for all transports, and
different from before.

| stage | content |
|---|---|
| `pause` | from the start until the server is in a session |
| `gather` | conversion of Megatron's tensors to Hugging Face names |
| `send` | transport: flattening, and the wait for the previous bucket (its `load`) |
| `resume` | end of the session, cache flush, version; generation continues |
| `load` | the server's response per bucket (part of `send`, overlaps the next bucket's `gather`) |

`loop` is gather and send; `total` is pause to resume.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.actor import parallel
from megatron_prepo.actor.model import build_model
from megatron_prepo.config import Config, from_tree
from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.models.hf_files import buckets
from megatron_prepo.models.megatron_to_hf import hf_plan, hf_shapes, hf_weights
from megatron_prepo.process import machine
from megatron_prepo.rollout.sglang.engine import SGLangEngine
from megatron_prepo.rollout.sglang.transport import num_bytes

SHAPES = {
    "0.5gb": (1024, 3072, 7, 16, 8, 32768, "float32"),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, "bfloat16"),
    "7b": (4096, 12288, 32, 32, 8, 151936, "bfloat16"),
}
"""Shapes: hidden, feed-forward, layers, heads, key-value heads, vocabulary, type."""
PROBE = tuple(range(5, 37))
LOADS = ("/update_weights_from_tensor", "/update_weights_from_distributed")
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=ownership.new_file(), help="JSON file to write")
    parser.add_argument("--shape", choices=SHAPES, default="0.5gb")
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transports", help="default: all; on a GPU, all except distributed")
    parser.add_argument("--servers-python", help="interpreter with SGLang")
    parser.add_argument("--sglang", default="{}", help="JSON: arguments of the server")
    options = parser.parse_args()
    # NCCL does not support two ranks on one device
    default = "value,ipc,disk" if torch.cuda.is_available() else "value,ipc,distributed,disk"
    transports = (options.transports or default).split(",")
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch), options, transports)
    print(table(result))
    if options.out:
        durable.write_text(options.out, json.dumps(result, indent=2) + "\n")
    return 0


def measure(scratch: Path, options: argparse.Namespace, transports: list[str]) -> dict:
    """Run all rounds of all transports and return the statistics."""
    configs = {name: config_of(scratch, options, name) for name in transports}
    config = configs[transports[0]]
    parallel.initialize(config.parallel, seed=1)
    device = parallel.device()
    engine = SGLangEngine(
        config, SimpleNamespace(eos_token_id=2, decode=None), device=device, log=print
    )
    try:
        weights = Weights(config, device)
        size = sum(num_bytes(dtype, shape) for dtype, shape in weights.shapes.values())
        ways = {name: engine.make_transport(each, device) for name, each in configs.items()}
        runs: dict[str, list[dict]] = {name: [] for name in transports}
        copies, seen = [], defaultdict(list)
        for number in range(options.rounds + 1):
            weights.negate()
            copies.append(seconds_of_a_copy(weights))
            for name, engine.transport in ways.items():
                seconds = sync(engine, weights, options.bucket_mb)
                runs[name].append(seconds)
                [logprobs] = engine.prompt_logprobs(PROBE).values()
                seen[number % 2].append(torch.tensor(logprobs))
    finally:
        engine.close()
        parallel.shut_down()
    check(seen, TOLERANCE[config.model.dtype])
    copy = statistics.median(copies[1:])
    return {
        "shape": options.shape,
        "gigabytes": size / 1e9,
        "tensors": len(weights.shapes),
        "bucket_mb": options.bucket_mb,
        "rounds": options.rounds,
        "machine": machine.describe(),
        "copy": {"seconds": copy, "gigabytes_a_second": size / 1e9 / copy},
        "transports": {
            name: summary(of_one[1:], size, copy)  # the first allocates and creates groups
            for name, of_one in runs.items()
        },
    }


def summary(runs: list[dict], size: int, copy: float) -> dict:
    """Return medians, and the throughput of the loop relative to the copy."""
    seconds = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
    return {
        "seconds": seconds,
        "loop_seconds_all": [round(run["loop"], 4) for run in runs],
        "gigabytes_a_second": size / 1e9 / seconds["loop"],
        "of_the_copys_speed": copy / seconds["loop"],
    }


def sync(engine: SGLangEngine, weights: "Weights", bucket_mb: int) -> dict[str, float]:
    """Run one weight sync and return seconds per stage."""
    seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def timed(stage: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds[stage] += time.perf_counter() - start

    def gathered():
        stream = iter(buckets(weights.stream(), bucket_mb << 20))
        while True:
            with timed("gather"):
                bucket = next(stream, None)
            if bucket is None:
                return
            yield bucket

    transport, call = engine.transport, engine.fleet.call
    shown = SimpleNamespace(in_session=transport.in_session)
    for step in ("start", "send", "finish"):
        setattr(shown, step, timed("send")(getattr(transport, step)))

    async def timed_call(server, path, *args, **kwargs):
        with timed("load" if path in LOADS else path.strip("/")):
            return await call(server, path, *args, **kwargs)

    engine.transport, engine.fleet.call = shown, timed_call
    prepare, conclude = engine._prepare, engine._conclude
    engine._prepare, engine._conclude = (
        awaited(timed, "pause", prepare),
        awaited(timed, "resume", conclude),
    )
    try:
        with timed("total"):
            engine.load_weights(gathered(), weights.version, weights.shapes)
    finally:
        engine.transport, engine.fleet.call = transport, call
        engine._prepare, engine._conclude = prepare, conclude
    seconds["loop"] = seconds["gather"] + seconds["send"]
    return dict(seconds)


def awaited(timed, stage: str, coroutine):
    """Wrap a coroutine function to measure its time."""

    async def run(*args):
        with timed(stage):
            return await coroutine(*args)

    return run


class Weights:
    """Megatron model with random weights, without an optimizer."""

    def __init__(self, config: Config, device: torch.device):
        from megatron_prepo.models.hf_config import read_hf_config

        hf = read_hf_config(config.model.hf)
        (self.model,) = build_model(hf, config.model, config.parallel)
        self.model.to(device)
        self.vocab_size, self.version = hf["vocab_size"], 0
        self.plan = hf_plan([self.model])
        self.shapes = hf_shapes([self.model], self.vocab_size, self.plan)

    def stream(self):
        """Return weights like the actor's method."""
        return hf_weights([self.model], self.vocab_size, self.plan)

    @torch.no_grad()
    def negate(self) -> None:
        """Flip the sign of all weights; applied twice, it restores them exactly."""
        for parameter in self.model.parameters():
            parameter.neg_()
        self.version += 1


def seconds_of_a_copy(weights: Weights) -> float:
    """Copy all parameters to memory that was written before, and return the seconds."""
    sources = [parameter.detach() for parameter in weights.model.parameters()]
    targets = [source.clone() for source in sources]
    wait = torch.cuda.synchronize if sources[0].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
    wait()
    return time.perf_counter() - start


def check(seen: dict[int, list[torch.Tensor]], tolerance: float) -> None:
    """Raise AssertionError unless the server's results depend only on the weights."""
    for answers in seen.values():
        for answer in answers:
            worst = float((answer - answers[0]).abs().mean())
            assert worst <= tolerance, f"weights that differ by transport: {worst:.2g} nats"
    moved = float((seen[0][0] - seen[1][0]).abs().mean())
    assert moved > 10 * tolerance, f"flipped weights changed the result by only {moved:.2g} nats"


def config_of(scratch: Path, options: argparse.Namespace, transport: str) -> Config:
    """Return a run with one server, for a model given by a config.json."""
    hf = scratch / "hf"
    hidden, ffn, layers, heads, groups, vocab, dtype = SHAPES[options.shape]
    if not hf.exists():
        from transformers import Qwen3Config

        config = Qwen3Config(
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=128,
            vocab_size=vocab,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            architectures=["Qwen3ForCausalLM"],
            dtype=dtype,
        )
        config.save_pretrained(hf)
    return from_tree(
        {
            "run": {"dir": str(scratch / "run")},
            "model": {"hf": str(hf), "dtype": dtype},
            "data": {"train": "unused", "eval": "unused"},
            "selection": {"num_candidates": 4, "num_selected": 2},
            "rollout": {"engine": "sglang", "max_new_tokens": 4},
            "train": {"total_steps": 1},
            "servers": {"python": options.servers_python},
            "weight_sync": {"transport": transport, "bucket_mb": options.bucket_mb},
            "sglang": json.loads(options.sglang),
        }
    )


def table(result: dict) -> str:
    """Return a table in Markdown."""
    copy = result["copy"]
    stages = ("pause", "gather", "send", "load", "resume", "loop", "total")
    lines = [
        f"{result['gigabytes']:.2f} GB in {result['tensors']} tensors, buckets of "
        f"{result['bucket_mb']} MiB; a copy: {copy['seconds']:.3f} s, "
        f"{copy['gigabytes_a_second']:.1f} GB/s",
        f"{'':12}" + "".join(f"{stage:>9}" for stage in stages) + "     GB/s  of copy",
    ]
    for name, of_one in result["transports"].items():
        seconds = "".join(f"{of_one['seconds'].get(stage, 0.0):9.3f}" for stage in stages)
        lines.append(
            f"{name:12}{seconds}{of_one['gigabytes_a_second']:9.2f}"
            f"{of_one['of_the_copys_speed']:9.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
