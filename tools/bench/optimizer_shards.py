"""Compare checkpoints of the distributed optimizer: one part per rank, or gathered by Megatron.

    python tools/bench/optimizer_shards.py --out benchmarks/results/optimizer_shards_cpu_2core.json

Data-parallel ranks on this machine, a random model in float32 with its Adam state.  Reports the
maximum over ranks of: seconds until the run continues after the start of a background save, the
increase of host memory, both also for loading, and bytes read from files.  Both variants alternate
in the same processes; the minimum of `--rounds`, after a warm-up round.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from megatron_prepo.actor import optimizer_shards, parallel
from megatron_prepo.actor.actor import Actor
from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.process import machine
from tools.bench.checkpoint import make_actor, make_model

DEADLINE_SECONDS = 1800


def main() -> int:
    """Start the ranks, write and print the result; or run as one of the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=ownership.new_file(), required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure_on_a_rank(Path(os.environ["SCRATCH"]), options)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        make_model(scratch)
        world = {"WORLD_SIZE": str(options.ranks), "SCRATCH": scratch}
        meeting = {parallel.MEETING_FILE: f"{scratch}/meeting"}
        ranks = [
            subprocess.Popen(
                [sys.executable, *sys.argv], env=os.environ | world | meeting | {"RANK": str(rank)}
            )
            for rank in range(options.ranks)
        ]
        deadline = time.monotonic() + DEADLINE_SECONDS
        try:
            while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
                if time.monotonic() > deadline:
                    late = codes.index(None)
                    print(f"rank {late} is not done after {DEADLINE_SECONDS} s", file=sys.stderr)
                    return 1
                time.sleep(0.1)
        finally:
            for rank in ranks:
                rank.kill()
    return int(any(codes))


def measure_on_a_rank(scratch: Path, options: argparse.Namespace) -> None:
    """Measure on all ranks; rank 0 writes and prints the result."""
    torch.set_num_threads(1)
    actor = make_actor(
        scratch / "hf",
        parallel={"data": options.ranks},
        optimizer={"use_distributed_optimizer": True},
    )
    rounds = []
    for number in range(1 + options.rounds):
        rounds.append({"own parts": measure(actor, scratch / f"own-{number}")})
        with as_megatron_does():
            rounds[-1]["gathered"] = measure(actor, scratch / f"gathered-{number}")
    if dist.get_rank() == 0:
        result = {
            "machine": machine.describe(),
            "ranks": options.ranks,
            "threads": 1,
            "parameters": sum(p.numel() for chunk in actor.chunks for p in chunk.parameters()),
            "least": {
                way: {
                    name: min(measured[way][name] for measured in rounds[1:])
                    for name in rounds[0][way]
                }
                for way in rounds[0]
            },
            "rounds": rounds,
        }
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        durable.write_text(options.out, text)
        print(text, end="")
    dist.barrier()
    parallel.shut_down()


@contextmanager
def as_megatron_does() -> Iterator[None]:
    """Use Megatron's implementation of `fully_reshardable` checkpoints."""
    ours = optimizer_shards.write_own_parts, optimizer_shards.load_state

    def not_ours(optimizer) -> None:
        for part in optimizer_shards.distributed_parts(optimizer):
            vars(part).pop("sharded_param_state_fully_reshardable", None)

    optimizer_shards.write_own_parts = not_ours
    optimizer_shards.load_state = lambda part, state: (
        part.load_parameter_state_from_fully_reshardable(state)
    )
    try:
        yield
    finally:
        optimizer_shards.write_own_parts, optimizer_shards.load_state = ours


def measure(actor: Actor, directory: Path) -> dict[str, float]:
    """Return the maximum over ranks."""
    actor.host_buffers.room = []  # each variant allocates its own
    (saving, pause), pause_bytes = with_memory(lambda: start_saving(actor, directory))
    saving.finish(timeout_minutes=30)
    path = directory / "iter_0000001"
    read = bytes_read()
    begin = time.perf_counter()
    _, load_bytes = with_memory(lambda: actor.load(path))
    load = time.perf_counter() - begin
    found = {
        "pause, s": round(pause, 3),
        "pause, MB": pause_bytes / 1e6,
        "load, s": round(load, 3),
        "load, MB": load_bytes / 1e6,
        "read, MB": (bytes_read() - read) / 1e6,
    }
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(directory)
    of_ranks = parallel.gather_to_all(found)
    return {name: round(max(of_rank[name] for of_rank in of_ranks), 3) for name in found}


def start_saving(actor: Actor, directory: Path):
    """Return the started save, and the seconds that the run waits."""
    dist.barrier()
    begin = time.perf_counter()
    saving = actor.start_saving(directory, step=1)
    return saving, time.perf_counter() - begin


def with_memory(call: Callable):
    """Return a function's result, and its peak resident memory in bytes above the initial value."""
    ctypes.CDLL(None).malloc_trim(0)  # otherwise memory freed by an earlier call is reused
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    before = status("VmRSS")
    return call(), status("VmHWM") - before


def status(name: str) -> int:
    """Return a number of bytes from Linux's statistics of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def bytes_read() -> int:
    """Return the bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    sys.exit(main())
