"""The parts of the check on a GPU machine (`gpu_check.py`): what each runs, and how it is ended.

Each part is a process with a time limit, and returns a JSON object with `passed` and what it has
measured.  A benchmark that is stopped leaves what it has written until then.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from megatron_prepo.errors import UserError
from megatron_prepo.files import atomic as durable

REPOSITORY = Path(__file__).resolve().parents[2]
PAPER, TINY = (REPOSITORY / "examples" / name for name in ("paper", "laptop/base"))
MEMORY_DISK = Path("/dev/shm")
CHECKPOINT_BYTES = 2 * 14 * 1.55e9
"""Two checkpoints of the 1.5B model, 14 bytes per parameter."""
SGLANG = {
    "attention_backend": "triton",  # the only one in the packed kernels
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,  # the actor uses the same GPU
}
STEP = ("passed", "ended_at_the_deadline", "seconds")
"""What the result of a part has of each of its steps."""
STOP_NEW_WORK = 0.75
"""Share of a part's time after which a benchmark starts nothing new."""
TRAINING = 0.6
"""Share of the SGLang part's time for training; the remainder is for the large sync."""
MARK = "GPU_CHECK_PART"
"""Environment variable by which all processes of a part are found, also those in other sessions."""
HALVES, CHECKSUM = ("model.1", "model.2"), "model.sha256"
"""Files of `pack_gpu.py`: the halves of a model's file; its SHA-256 and name."""
KILL_SECONDS = 10.0
LEFT = "\na killed process of this part does not end, and may keep the GPU\n"
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


@dataclass(frozen=True)
class Options:
    """What the command line selects."""

    verl: Path | None = None
    sglang: Path | None = None
    real: Path | None = None
    """Folder with the halves of a model's file, and prompts (`pack_gpu.py`)."""
    rehearse: bool = False
    """Run at a tiny size, without a GPU."""


class Part(NamedTuple):
    """A part of the check."""

    share: float
    """Share of the remaining time, in proportion to those of all remaining parts."""
    run: Callable[[Options, Path, float], dict[str, Any]]
    """Called with a file for unfinished results, which may be left, and a time limit in seconds."""


def run_head(options: Options, file: Path, seconds: float) -> dict:
    """Run the cases of the head's goals, with its stages and a sweep of chunk sizes."""
    words = ["--quick", "--samples", "12", "--warm-ups", "3"]
    words += ["--seconds", f"{STOP_NEW_WORK * seconds:.0f}"]
    if options.rehearse:
        words = ["--cpu", "--tokens", "64", "--vocab", "256", "--hidden", "16"]
        words += ["--warm-ups", "0", "--samples", "2", "--chunks", "8,32"]
    elif options.verl:
        words += ["--verl", str(options.verl)]
    return benchmark("head", [*words, "--stages"], file, seconds)


def run_utilisation(options: Options, file: Path, seconds: float) -> dict:
    """Measure the share of the GPU's peak that scoring and updates reach."""
    words = ["--seconds", f"{STOP_NEW_WORK * seconds:.0f}"]
    if options.rehearse:
        words += ["--model", str(TINY), "--sequences", "3", "--response-tokens", "20"]
        words += ["--arms", "packed,fused norm,AdamW not fused,padded"]  # the rest is compiled
    return benchmark("utilisation", words, file, seconds)


def run_tests(options: Options, file: Path, seconds: float) -> dict:
    """Run the tests marked `gpu`: a skipped one counts as failed, and so does a run of none."""
    words = ["-vv", "-m", "gpu", "--only-allowed-skips", "-p", "no:cacheprovider", "tests/gpu"]
    if options.rehearse:
        words += ["--collect-only"]
    done = run_within(seconds, [sys.executable, "-m", "pytest", *words])
    outcomes = dict(OUTCOME.findall(done["output"]))
    found = len(outcomes) or done["output"].count("<Function ")
    clean = set(outcomes.values()) <= {"PASSED"}
    return done | {"passed": done["passed"] and found > 0 and clean, "outcomes": outcomes}


def run_plan(options: Options, file: Path, seconds: float) -> dict:
    """Compare planned with used memory; measure rates of products and copies."""
    words = ["--seconds", f"{STOP_NEW_WORK * seconds:.0f}"]
    if options.rehearse:
        words += ["--model", str(TINY), "--length", "64", "--sequences", "2", "--copy-mib", "1"]
    return benchmark("plan", words, file, seconds)


def run_demo(options: Options, file: Path, seconds: float) -> dict:
    """Train 20 steps of the laptop experiment: check learning, measure time per step."""
    steps = ["train.total_steps=20"]
    if options.rehearse:
        steps = ["train.total_steps=1", "eval.samples_per_prompt=1"]
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "megatron_prepo", "demo", "--dir", directory]
        done = run_within(seconds, [*command, "parallel.tensor=1", *steps])
        summary = _read(Path(directory, "summary.json"))
    learnt = bool(summary) and (options.rehearse or summary["gain_ci95"][0] > 0)
    return done | {"passed": done["passed"] and learnt, "measured": summary}


def run_checkpoint(options: Options, file: Path, seconds: float) -> dict:
    """Measure the pause of a background save to memory; with 8 ranks, each copies an eighth."""
    words = ["--background", "--seconds", f"{STOP_NEW_WORK * seconds:.0f}"]
    if options.rehearse:
        words += ["--model", str(TINY), "--rounds", "1"]
    else:
        words += ["--model", str(PAPER / "qwen2.5-math-1.5b" / "model")]
    if MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free > CHECKPOINT_BYTES:
        words += ["--directory", str(MEMORY_DISK)]
    return benchmark("checkpoint", words, file, seconds)


def run_sglang(options: Options, file: Path, seconds: float) -> dict:
    """Train with a server on the actor's GPU, verifying each sync; then measure a large sync."""
    assert options.sglang is not None, "gpu_check.py requires it for this part"
    with tempfile.TemporaryDirectory() as scratch:
        python = unpack(options.sglang, Path(scratch))
        training = _train_with_sglang(python, Path(scratch, "run"), TRAINING * seconds)
        durable.write_text(file, json.dumps(training))  # the sync may be killed with this process
        out = Path(scratch, "sync.json")
        words = ["--shape", "7b", "--servers-python", str(python), "--transports", "ipc"]
        words += ["--rounds", "3", "--bucket-mb", "1024", "--sglang", json.dumps(SGLANG)]
        sync = benchmark("sync", words, out, (1 - TRAINING) * seconds)
    return together({"training": training, "sync": sync})


def together(steps: dict[str, dict]) -> dict:
    """Return the result of a part of several steps: stopped, unless one failed within its time."""
    late = [done["ended_at_the_deadline"] for done in steps.values()]
    failed = [done for done in steps.values() if not done["passed"]]
    return {
        "passed": not failed,
        "ended_at_the_deadline": any(late) and all(d["ended_at_the_deadline"] for d in failed),
        "seconds": round(sum(done["seconds"] for done in steps.values()), 1),
        "output": "".join(done["output"] for done in steps.values()),
        "measured": {name: done["measured"] for name, done in steps.items() if done["measured"]},
        **{name: {key: done[key] for key in STEP if key in done} for name, done in steps.items()},
    }


def _train_with_sglang(python: Path, run: Path, seconds: float) -> dict:
    command = [sys.executable, "-m", "megatron_prepo", "demo", "--dir", str(run)]
    command += ["parallel.tensor=1", "train.total_steps=4", "eval.samples_per_prompt=1"]
    command += ["rollout.engine=sglang", f"servers.python={python}"]
    command += ["weight_sync.verify=always", "weight_sync.transport=ipc"]
    command += [f"sglang.{key}={json.dumps(value)}" for key, value in SGLANG.items()]
    done = run_within(seconds, command)
    log = run / "logs" / "sglang_0.log"
    if not done["passed"] and log.is_file():
        done["output"] += log.read_text(errors="replace")[-8000:]
    return done | {"measured": _read(run / "summary.json")}


def run_real(options: Options, file: Path, seconds: float) -> dict:
    """Train 50 steps of the pretrained model, which has to learn; tasks are graded by numbers."""
    assert options.real is not None, "gpu_check.py requires it for this part"
    # the machine has no reasoning-gym, and each of the tasks' answers is a number
    words = ["parallel.tensor=1", "reward.function=final_number", "train.total_steps=50"]
    with tempfile.TemporaryDirectory() as directory:
        join(options.real, Path(directory, "model"))
        words = ["--dir", directory, "--prompts", str(options.real.absolute()), *words]
        done = run_within(seconds, [sys.executable, "examples/real/run.py", *words])
        summary = _read(Path(directory, "run", "summary.json"))
    learnt = bool(summary) and summary["gain_ci95"][0] > 0
    return done | {"passed": done["passed"] and learnt, "measured": summary}


def join(folder: Path, directory: Path) -> Path:
    """Join the two halves of a model's file in a directory; return the file.

    Raises UserError if a half is missing, or if the file is not the one that was split.
    """
    record = folder / CHECKSUM
    for part in (record, *(folder / half for half in HALVES)):
        if not part.is_file():
            raise UserError(f"--real {folder} has no {part.name}: run both commands that carry it")
    expected, name = record.read_text().split()
    content = b"".join((folder / half).read_bytes() for half in HALVES)
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(
            f"--real {folder}: the halves do not make {name}; pack and carry both again"
        )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(content)
    return directory / name


PARTS = {
    "head": Part(130, run_head),
    "utilisation": Part(140, run_utilisation),
    "tests": Part(100, run_tests),
    "plan": Part(60, run_plan),
    "demo": Part(50, run_demo),
    "checkpoint": Part(60, run_checkpoint),
    "sglang": Part(500, run_sglang),
    "real": Part(500, run_real),
}
"""Parts, the most valuable first."""
APART = ("sglang", "real")
"""Parts that run only if they are selected: they need a separate command, and an option of their
name."""


def benchmark(name: str, words: list[str], file: Path, seconds: float) -> dict:
    """Run a benchmark that writes its result to `file`; what a stopped one wrote is kept."""
    command = [sys.executable, f"tools/bench/{name}.py", "--out", str(file), *words]
    done = run_within(seconds, command)
    return done | {"measured": _read(file)}


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


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


def run_within(seconds: float, command: list[str]) -> dict[str, Any]:
    """Run a command in the repository; after `seconds` it is stopped.

    Processes that it started are stopped with it, however it ended and whatever their session.
    """
    start, mark = time.perf_counter(), secrets.token_hex(16)
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe waits for grandchildren
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | {MARK: mark, "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        ended = False
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            ended = True
        finally:  # also at Ctrl-C
            _kill(mark)
            left = _is_left(process)
        output.seek(0)
        return {
            "passed": process.returncode == 0,
            "ended_at_the_deadline": ended,
            "seconds": round(time.perf_counter() - start, 1),
            "output": output.read() + (LEFT if left else ""),
        }


def _is_left(process: subprocess.Popen) -> bool:
    """Return whether a killed process does not end, as one that waits for a driver does."""
    try:
        process.wait(timeout=KILL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _kill(mark: str) -> None:
    """Kill all processes with the mark in their environment, until none is left."""
    late = time.monotonic() + KILL_SECONDS
    while (marked := [p for p in psutil.process_iter() if _has(p, mark)]) and (
        time.monotonic() < late
    ):
        for process in marked:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                process.kill()
        time.sleep(0.05)


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:  # it has ended, or is another user's
        return False
