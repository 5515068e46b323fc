"""Run all checks that need a GPU, in one command of under 15 minutes.

    python tools/checks/gpu_check.py --out RESULT.json [--verl FOLDER] [--sglang FOLDER]

Runs the tests marked `gpu` and the quick cases of tools/bench/head.py, trains a few steps at tensor
parallel 1, and measures the share of the GPU's peak in training (tools/bench/utilisation.py), the
error of a plan's memory (tools/bench/plan.py), and how long a run waits for a checkpoint of 1.5B
parameters (tools/bench/checkpoint.py).
With the archives of tools/checks/pack_sglang.py, and up to 10 more minutes, it also trains with an
SGLang server on the same GPU, with weight sync by CUDA IPC, and measures that sync at the shape of
a 7B model.  Writes one JSON object with the machine, the versions and the numbers, after every
part.
Each part is a process with a timeout: one that is too slow is stopped and reported, without
affecting other parts.  Exit code 0 means that every part passed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.files.existing import existing
from megatron_prepo.process import machine
from megatron_prepo.process.command import in_one_line

REPOSITORY = Path(__file__).resolve().parents[2]
PART_SECONDS = 180.0
SGLANG_SECONDS = 300.0
"""Timeout of an SGLang part, which includes compiling kernels at first use."""
SGLANG = {
    "attention_backend": "triton",  # the only one in the packed kernels
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,  # the actor uses the same GPU
}
HEAD_SECONDS = 150.0
"""Time after which the benchmark starts nothing new; the remainder is for its current part."""


@in_one_line
def main() -> int:
    """Run all parts; print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=ownership.new_file(), required=True, help="JSON file to write"
    )
    parser.add_argument("--verl", type=existing(), help="as in tools/bench/head.py")
    parser.add_argument("--sglang", type=existing(), help="folder with archives of pack_sglang.py")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device; this check is for a machine that has one", file=sys.stderr)
        return 2
    parts = {
        "tests": run_tests,
        "head": lambda: run_head(options.verl),
        "training": run_training,
        "utilisation": run_utilisation,
        "plan": run_plan,
        "checkpoint": run_checkpoint,
        "sglang": lambda: run_sglang(options.sglang),
    }
    return check(parts, options.out)


def check(parts: dict, out: Path) -> int:
    """Run the parts in turn; the result is on disk after each."""
    result: dict = {"machine": machine.describe()}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        result[name] = part()
        durable.write_text(out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return int(not all(result[name]["passed"] for name in parts))


def run_tests() -> dict:
    """Run the tests marked `gpu`; a skipped test counts as failed."""
    words = ["-m", "gpu", "--only-allowed-skips", "tests/gpu"]
    done = run_within(PART_SECONDS, [sys.executable, "-m", "pytest", *words])
    print(done["output"][-6000:])
    return _without_output(done) | {"summary": done["output"].strip().splitlines()[-1:]}


def run_head(verl: Path | None) -> dict:
    """Run the quick cases of the head's benchmark, and report its goals."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "head.json")
        command = [sys.executable, "tools/bench/head.py", "--quick", "--out", str(out)]
        command += ["--seconds", str(HEAD_SECONDS)] + (["--verl", str(verl)] if verl else [])
        done = run_within(PART_SECONDS, command)
        print(done["output"][-12000:])
        measured = json.loads(out.read_text()) if out.is_file() else None
    return _without_output(done) | {"measured": measured}


def run_training() -> dict:
    """Train 20 steps of the laptop experiment on the GPU: check learning, measure time per step."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "megatron_prepo", "demo", "--dir", directory]
        command += ["parallel.tensor=1", "train.total_steps=20"]
        done = run_within(PART_SECONDS, command)
        if not done["passed"]:
            print(done["output"][-4000:])
            return _without_output(done)
        summary = json.loads((Path(directory) / "summary.json").read_text())
    return _without_output(done) | {
        "passed": summary["gain_ci95"][0] > 0,
        "summary": summary,
    }


def run_utilisation() -> dict:
    """Measure the share of the peak of the actor's passes, packed and padded."""
    return _run_benchmark("utilisation")


def run_plan() -> dict:
    """Compare planned with used memory; measure rates of products and copies."""
    return _run_benchmark("plan")


def run_checkpoint() -> dict:
    """Measure the pause of a background save; with 8 ranks, each copies an eighth of it."""
    model = REPOSITORY / "examples" / "paper" / "qwen2.5-math-1.5b" / "model"
    return _run_benchmark("checkpoint", "--background", "--model", str(model))


def _run_benchmark(name: str, *arguments: str) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "result.json")
        command = [sys.executable, f"tools/bench/{name}.py", "--out", str(out), *arguments]
        done = run_within(PART_SECONDS, [*command, "--seconds", str(PART_SECONDS / 2)])
        print(done["output"][-6000:])
        measured = json.loads(out.read_text()) if out.is_file() else None
    return _without_output(done) | {"measured": measured}


def run_sglang(folder: Path | None) -> dict:
    """Train with a server on the actor's GPU, verifying each sync; then measure a large sync."""
    if folder is None:
        reason = "no --sglang FOLDER, which tools/checks/pack_sglang.py makes"
        return {"passed": True, "skipped": reason}
    result: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        python = unpack(folder, Path(scratch))
        run, out = Path(scratch, "run"), Path(scratch, "sync.json")
        command = [sys.executable, "-m", "megatron_prepo", "demo", "--dir", str(run)]
        command += ["parallel.tensor=1", "train.total_steps=4", "eval.samples_per_prompt=1"]
        command += [
            "rollout.engine=sglang",
            f"servers.python={python}",
            "weight_sync.verify=always",
        ]
        command += ["weight_sync.transport=ipc"]
        command += [f"sglang.{key}={json.dumps(value)}" for key, value in SGLANG.items()]
        result["training"] = done = run_within(SGLANG_SECONDS, command)
        log = run / "logs" / "sglang_0.log"
        if not done["passed"]:
            print(done["output"][-4000:], log.read_text()[-8000:] if log.is_file() else "no log")
        elif (run / "summary.json").is_file():
            done["summary"] = json.loads((run / "summary.json").read_text())
        command = [sys.executable, "tools/bench/sync.py", "--out", str(out), "--shape", "7b"]
        command += ["--servers-python", str(python), "--transports", "ipc", "--rounds", "3"]
        command += ["--bucket-mb", "1024", "--sglang", json.dumps(SGLANG)]
        result["sync"] = done = run_within(SGLANG_SECONDS, command)
        print(done["output"][-4000:])
        done["measured"] = json.loads(out.read_text()) if out.is_file() else None
    parts = {name: _without_output(done) for name, done in result.items()}
    return parts | {"passed": all(done["passed"] for done in parts.values())}


def unpack(folder: Path, scratch: Path) -> Path:
    """Create an interpreter with this one's packages and those of the folder's archives."""
    packages, python = scratch / "packages", scratch / "python"
    for archive in sorted(folder.glob("sglang_*.zip")):
        with zipfile.ZipFile(archive) as files:
            files.extractall(packages)
    python.write_text(
        f'#!/bin/sh\nexport PYTHONPATH="{packages}:$PYTHONPATH"\n'
        f'export SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    return python


def run_within(seconds: float, command: list[str]) -> dict:
    """Run a command in the repository; it is stopped with its children after `seconds`."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe waits for grandchildren
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be stopped with it
        )
        ended = False
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            ended = True
        finally:  # also at Ctrl-C, which a session apart does not get
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return {
            "passed": process.returncode == 0,
            "ended_at_the_deadline": ended,
            "seconds": round(time.perf_counter() - start, 1),
            "output": output.read(),
        }


def _without_output(done: dict) -> dict:
    return {key: value for key, value in done.items() if key != "output"}


if __name__ == "__main__":
    sys.exit(main())
