"""Everything that needs a GPU, in one command of under 10 minutes.

    python tools/gpu_check.py --out benchmarks/results/NAME.json

Runs the tests marked `gpu`, times the output head against the bare matrix product, and trains a
little at tensor parallel 1; writes one JSON object with the machine, the versions and the numbers.
The exit code is 0 only if every test passed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
HEAD_SHAPES = [
    {"name": "Qwen2.5-1.5B", "tokens": 8192, "hidden": 1536, "vocab": 151936},
    {"name": "Qwen2.5-7B", "tokens": 8192, "hidden": 3584, "vocab": 152064},
]


def main() -> int:
    """Run all parts; print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    out = Path(parser.parse_args().out)
    if not torch.cuda.is_available():
        print("error: no CUDA device; this check is for a machine that has one", file=sys.stderr)
        return 2
    sys.path.insert(0, str(REPOSITORY))
    from megatron_prepo import machine

    result = {
        "machine": machine.describe(),
        "tests": run_tests(),
        "head": [time_head(**s) for s in HEAD_SHAPES],
    }
    result["training"] = run_training()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return int(not (result["tests"]["passed"] and result["training"]["passed"]))


def run_tests() -> dict:
    """The tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:])
    return {
        "passed": done.returncode == 0,
        "summary": done.stdout.strip().splitlines()[-1:],
        "seconds": time.perf_counter() - start,
    }


def time_head(name: str, tokens: int, hidden: int, vocab: int) -> dict:
    """Forward and forward+backward of the head, beside the matrix products it cannot avoid.

    Interleaved; medians of 10 after 3 warm-ups, milliseconds.  Peak extra memory in MiB.
    """
    from megatron_prepo.actor.vocab_parallel import vocab_parallel_logprobs_and_entropy

    generator = torch.Generator(device="cuda").manual_seed(1)
    hidden_TH = torch.randn(tokens, hidden, device="cuda", generator=generator).bfloat16()
    weight_VH = torch.randn(vocab, hidden, device="cuda", generator=generator).bfloat16() / 16
    targets_T = torch.randint(vocab, (tokens,), device="cuda", generator=generator)
    hidden_TH.requires_grad_(), weight_VH.requires_grad_()

    def head():
        return vocab_parallel_logprobs_and_entropy(
            hidden_TH, weight_VH, targets_T, vocab_size=vocab
        )

    def forward():
        with torch.no_grad():
            head()

    def forward_backward():
        logprobs_T, _ = head()
        torch.autograd.grad(logprobs_T.sum(), [hidden_TH, weight_VH])

    def bare_product():
        for rows in hidden_TH.detach().split(1024):
            rows @ weight_VH.detach().t()

    runs = {"forward": forward, "forward_backward": forward_backward, "bare_product": bare_product}
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(13):
        for key, run in runs.items():
            times[key].append(_milliseconds(run))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    medians = {key: sorted(values[3:])[5] for key, values in times.items()}
    return {
        "shape": {"name": name, "tokens": tokens, "hidden": hidden, "vocab": vocab},
        "milliseconds": medians,
        "forward_over_bare_product": medians["forward"] / medians["bare_product"],
        "forward_peak_extra_mib": peak,
    }


def run_training() -> dict:
    """20 steps of the laptop experiment on the GPU: it learns, and how long a step takes."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "megatron_prepo", "demo", "--dir", directory]
        done = subprocess.run(
            [*command, "parallel.tensor=1", "train.total_steps=20"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(done.stderr[-4000:])
            return {"passed": False}
        summary = json.loads((Path(directory) / "summary.json").read_text())
    return {"passed": summary["gain_ci95"][0] > 0, "summary": summary}


def _milliseconds(run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


if __name__ == "__main__":
    sys.exit(main())
