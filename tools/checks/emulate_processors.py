"""Run the numeric tests with the kernels of other processors, and report failures per processor.

    python tools/checks/emulate_processors.py --out processors.json      # `make test-processors`
    python tools/checks/emulate_processors.py --only AVX2 --threads 1 -- -k routed

torch, oneDNN and MKL choose kernels by the processor's instruction sets; here they are limited to
fewer.  Another order of additions, or the single rounding of a fused multiply-add, changes float32
results, and no test may fail because of it.  Instruction sets cannot be added, and MKL uses its
AVX-512 kernels only on Intel processors: settings that compute the same have the same `product`, a
digest of one matrix product.  Exit code 1 if a test fails in any setting.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import write_text
from megatron_prepo.process import machine, progress

REPOSITORY = Path(__file__).resolve().parents[2]
NUMERIC = (
    "tests/distributed/test_context_parallel.py",
    "tests/distributed/test_convert.py",
    "tests/distributed/test_layouts.py",
    "tests/distributed/test_replay.py",
    "tests/distributed/test_resume.py",
    "tests/distributed/test_vocab_parallel.py",
    "tests/e2e/test_training.py",
    "tests/parity",
    "tests/unit/prepo/test_advantages.py",
    "tests/unit/actor/test_attention.py",
    "tests/unit/tools/bench/test_head.py",
    "tests/unit/rollout/test_transformers_engine.py",
    "tests/unit/prepo/test_entropy_weights.py",
    "tests/unit/selection/test_foresight.py",
    "tests/unit/rollout/test_sampling_head.py",
    "tests/unit/prepo/test_loss.py",
    "tests/unit/prepo/test_importance.py",
    "tests/unit/prepo/test_perplexity.py",
    "tests/unit/actor/test_lm_head_kernels.py",
    "tests/unit/actor/test_lm_head.py",
)
"""Tests whose result depends on how floating point numbers are rounded."""

PROCESSORS = {
    # name: settings of the kernels of torch, oneDNN and MKL
    "native": {},
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "SSE4": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}
CAPABILITIES = {"AVX2": "AVX2", "SSE4": "DEFAULT"}
"""Capability that torch must report in each setting."""

THREADS = ("TEST_THREADS", "OMP_NUM_THREADS")

PROBE = """
import hashlib, torch
torch.manual_seed(0)
torch.nn.functional.conv2d(torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3))
product = torch.randn(64, 64) @ torch.randn(64, 64)
print("capability", torch.backends.cpu.get_cpu_capability())
print("threads", torch.get_num_threads())
print("product", hashlib.sha256(product.numpy().tobytes()).hexdigest()[:8])
"""


def environment(processor: str, threads: int) -> dict[str, str]:
    """Return the environment variables of a Python process for a processor and threads."""
    kept = {name: value for name, value in os.environ.items() if name not in PROCESSORS["AVX2"]}
    count = str(threads)
    # idle threads sleep: tests have more ranks than there are cores, and those that spin for the
    # next product would take the cores that compute it
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"}
    return kept | PROCESSORS[processor] | waiting | dict.fromkeys(THREADS, count)


def probed(processor: str, threads: int) -> dict[str, str]:
    """Return the capabilities that the libraries report under a setting.

    Raises UserError if torch does not apply it, as on a processor with fewer instruction sets.
    """
    command = [sys.executable, "-c", PROBE]
    told = environment(processor, threads) | {"ONEDNN_VERBOSE": "1"}
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=True)
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines()[-3:])
    isa = re.search(r"cpu,isa:(.*)", done.stdout)
    found["oneDNN"] = isa.group(1) if isa else "not used"
    expected = CAPABILITIES.get(processor, found["capability"])
    if (found["capability"], found["threads"]) != (expected, str(threads)):
        raise UserError(
            f"{processor} with {threads} threads: torch computes with {found['capability']} and "
            f"{found['threads']} threads; choose other settings by --only and --threads"
        )
    return found


def tested(processor: str, threads: int, selection: Sequence[str]) -> dict:
    """Run the tests under a setting; return their number by outcome, and the failing ones."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", *selection]
    output = b""
    with (
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment(processor, threads),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
        progress.bar(desc=f"{processor}, {threads} threads", leave=False) as bar,
    ):
        bar.total = 100
        while chunk := process.stdout.read1():
            output += chunk
            if shares := re.findall(rb"\[ *(\d+)%\]", output):
                bar.update(int(shares[-1]) - bar.n)
    text = output.decode(errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", text, re.MULTILINE)
    last = text.strip().splitlines()[-1]
    if process.returncode not in (0, 1):
        raise UserError(f"pytest ended with code {process.returncode}: {last}")
    return {"passed": process.returncode == 0, "failed": failed, "outcome": last.strip("= ")}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PROCESSORS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--out", type=ownership.new_file(), help="JSON file to write")
    parser.add_argument("pytest", nargs="*", help="additional arguments of pytest, after --")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    settings = [(p, t) for p in options.only or PROCESSORS for t in options.threads or (1, 2)]
    result = {"machine": machine.describe(), "settings": {}}
    try:
        found = {setting: probed(*setting) for setting in settings}
        print("| setting | torch | oneDNN | product | tests |\n|---|---|---|---|---|")
        for (processor, threads), about in found.items():
            outcome = tested(processor, threads, [*NUMERIC, *options.pytest])
            name = f"{processor}, {threads} threads"
            result["settings"][name] = about | outcome
            row = (name, about["capability"], about["oneDNN"], about["product"], outcome["outcome"])
            print(f"| {' | '.join(row)} |", *outcome["failed"], sep="\n  ", flush=True)
            if options.out:
                write_text(options.out, json.dumps(result, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(about["passed"] for about in result["settings"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
