"""How long a run waits for a checkpoint: written while it waits, and in the background.

    python tools/bench_checkpoint.py --out benchmarks/results/checkpoint_cpu_2core.json

A random model with its Adam state, one process.  `at once` is all of a save; `background` is its
pause, which ends when the state is copied, `written` until all threads have ended with nothing else
to do, and `finish`, the second pause.  `plain copy` writes as many bytes to the same disk, and
forces them there: what the disk allows.  Each is the fastest of `--rounds`.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_prepo import durable, machine
from megatron_prepo.actor import parallel
from megatron_prepo.actor.policy import Actor
from megatron_prepo.config import from_tree

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


def main() -> int:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--directory", help="on the disk to be measured (default: a temporary one)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        actor = make_actor(make_model(directory))
        rounds = [measure(actor, Path(directory)) for _ in range(options.rounds)]
    seconds = {name: min(times[name] for times, _ in rounds) for name in rounds[0][0]}
    num_bytes = rounds[0][1]
    result = {
        "machine": machine.describe(),
        "threads": 1,
        "parameters": sum(p.numel() for chunk in actor.chunks for p in chunk.parameters()),
        "bytes": num_bytes,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "bytes_per_second": {name: round(num_bytes / value) for name, value in seconds.items()},
        "rounds": [times for times, _ in rounds],
    }
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    durable.write_text(options.out, text)
    print(text, end="")
    return 0


def make_model(directory: str) -> Path:
    """With random weights, as Hugging Face has it."""
    hf = Path(directory, "hf")
    Qwen3ForCausalLM(Qwen3Config(**MODEL)).save_pretrained(hf)
    return hf


def make_actor(hf: Path, **sections: dict) -> Actor:
    """In float32."""
    config = from_tree(
        sections
        | {
            "run": {"dir": "unused"},
            "model": {"hf": str(hf), "dtype": "float32"},
            "data": {"train": "unused", "eval": "unused"},
            "selection": {"num_candidates": 4, "num_selected": 2},
            "rollout": {"max_new_tokens": 4},
            "train": {"total_steps": 3},
        }
    )
    parallel.initialize(config.parallel, seed=1)
    return Actor(config)


def measure(actor: Actor, directory: Path) -> tuple[dict[str, float], int]:
    """Seconds by what is waited for, and a checkpoint's bytes."""
    seconds, timeout = {}, actor.config.parallel.timeout_minutes
    begin = time.perf_counter()
    path = actor.save(directory / "saved", step=1)
    seconds["at once"] = time.perf_counter() - begin
    num_bytes = sum(file.stat().st_size for file in path.iterdir())
    shutil.rmtree(path)

    begin = time.perf_counter()
    saving = actor.start_saving(directory / "saved", step=2)
    seconds["background"] = time.perf_counter() - begin
    saving.thread.join()
    seconds["written"] = time.perf_counter() - begin
    begin = time.perf_counter()
    saving.finish(timeout)
    seconds["finish"] = time.perf_counter() - begin
    shutil.rmtree(directory / "saved")

    begin = time.perf_counter()
    copy = directory / "copy"
    write_plainly(copy, num_bytes)
    seconds["plain copy"] = time.perf_counter() - begin
    copy.unlink()
    return seconds, num_bytes


def write_plainly(path: Path, num_bytes: int) -> None:
    """So many bytes, on the disk when this returns."""
    block = torch.randint(256, (BLOCK,), dtype=torch.uint8).numpy().tobytes()
    with open(path, "wb") as file:
        for begin in range(0, num_bytes, BLOCK):
            file.write(block[: num_bytes - begin])
    durable.flush(path)


if __name__ == "__main__":
    sys.exit(main())
