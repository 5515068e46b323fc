"""Measure how long a run waits for a checkpoint: saved synchronously, and in the background.

    python tools/bench/checkpoint.py --out benchmarks/results/checkpoint_cpu_2core.json

A random model with its Adam state, one process, on CUDA if available.  `at once` is the time of a
synchronous save; `background` is the pause until the state is copied, `written` the time until all
threads have ended, without other work, and `finish` the second pause.  `plain copy` writes and
flushes the same number of bytes to the same disk: the limit of the disk.  Each is the fastest of
`--rounds`.

`--model FOLDER`, with a config.json, selects the shape of another model, in bfloat16 on CUDA, with
the distributed optimizer; `--background` skips the other two saves.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import Qwen3Config

from megatron_prepo.actor import actor as policy
from megatron_prepo.actor import parallel
from megatron_prepo.actor.actor import Actor
from megatron_prepo.config import from_tree
from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.files.existing import existing
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.process import machine
from megatron_prepo.process.command import in_one_line

MODEL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32768,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
BLOCK = 1 << 24


@in_one_line
def main() -> int:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=ownership.new_file(), required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--directory", type=existing(), help="directory on the disk to measure (default: temporary)"
    )
    parser.add_argument("--model", type=existing(), help="folder with a config.json")
    parser.add_argument("--background", action="store_true", help="only this save")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no round after this")
    options = parser.parse_args()
    if options.model:
        read_hf_config(options.model)  # before the job is initialised
    start = time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        folder = options.model or make_model(directory)
        actor = make_actor(folder, optimizer={"use_distributed_optimizer": bool(options.model)})
        rounds = []
        while not rounds or (
            len(rounds) < options.rounds and time.monotonic() - start < options.seconds
        ):
            rounds.append(measure(actor, Path(directory), options.background))
            text = json.dumps(described(rounds, actor, options.model), indent=1, allow_nan=False)
            durable.write_text(options.out, text + "\n")  # after each, for a process that is killed
    print(text)
    return 0


def described(rounds: list[tuple[dict, int]], actor: Actor, model: Path | None) -> dict:
    """Return the result of some rounds."""
    seconds = {name: min(times[name] for times, _ in rounds) for name in rounds[0][0]}
    num_bytes = rounds[0][1]
    return {
        "machine": machine.describe(),
        "threads": 1,
        "model": str(model or "of this tool"),
        "dtype": actor.config.model.dtype,
        "parameters": sum(p.numel() for chunk in actor.chunks for p in chunk.parameters()),
        "bytes": num_bytes,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "bytes_per_second": {name: round(num_bytes / value) for name, value in seconds.items()},
        "rounds": [times for times, _ in rounds],
    }


def make_model(directory: str) -> Path:
    """Write a folder with the shape of this tool's model."""
    folder = Path(directory, "hf")
    Qwen3Config(**MODEL, architectures=["Qwen3ForCausalLM"]).save_pretrained(folder)
    return folder


def make_actor(folder: Path, **sections: dict) -> Actor:
    """Build an actor with random weights from Megatron, without loading; in bfloat16 on CUDA."""
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    config = from_tree(
        sections
        | {
            "run": {"dir": "unused"},
            "model": {"hf": str(folder), "dtype": dtype},
            "data": {"train": "unused", "eval": "unused"},
            "selection": {"num_candidates": 4, "num_selected": 2},
            "rollout": {"max_new_tokens": 4},
            "train": {"total_steps": 3},
        }
    )
    parallel.initialize(config.parallel, seed=1)
    with mock.patch.object(policy, "load_hf_weights", lambda *_: None):
        return Actor(config)


def measure(actor: Actor, directory: Path, background: bool) -> tuple[dict[str, float], int]:
    """Return seconds per phase, and the bytes of a checkpoint."""
    seconds, timeout = {}, actor.config.parallel.timeout_minutes
    if not background:
        begin = time.perf_counter()
        path = actor.save(directory / "saved", step=1)
        seconds["at once"] = time.perf_counter() - begin
        shutil.rmtree(path)

    begin = time.perf_counter()
    saving = actor.start_saving(directory / "saved", step=2)
    seconds["background"] = time.perf_counter() - begin
    saving.thread.join()
    seconds["written"] = time.perf_counter() - begin
    begin = time.perf_counter()
    saving.finish(timeout)
    seconds["finish"] = time.perf_counter() - begin
    num_bytes = sum(file.stat().st_size for file in directory.glob("saved/iter_*/*"))
    shutil.rmtree(directory / "saved")

    if not background:
        begin = time.perf_counter()
        copy = directory / "copy"
        write_plainly(copy, num_bytes)
        seconds["plain copy"] = time.perf_counter() - begin
        copy.unlink()
    return seconds, num_bytes


def write_plainly(path: Path, num_bytes: int) -> None:
    """Write a number of bytes and flush them to the disk."""
    block = torch.randint(256, (BLOCK,), dtype=torch.uint8).numpy().tobytes()
    with open(path, "wb") as file:
        for begin in range(0, num_bytes, BLOCK):
            file.write(block[: num_bytes - begin])
    durable.flush(path)


if __name__ == "__main__":
    sys.exit(main())
