"""Measure the mismatch of actor and SGLang in a mixture of experts, with and without replay.

    python tools/bench/routing.py --out benchmarks/results/routing_cpu_2core.json

A tiny Qwen3-MoE with random weights, in float32 and in bfloat16; the measurements are defined in
`tests/real_sglang/test_routing.py`.  Mean differences of log-probability per token, in nats.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import tiny_models
from ranks import on_ranks

from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.process import machine
from tests.real_sglang.test_routing import DTYPES, compared

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 1500.0


def main() -> int:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=ownership.new_file(), required=True, help="JSON file to write"
    )
    default = REPOSITORY / ".venv-sglang" / "bin" / "python"
    parser.add_argument("--python", default=str(default), help="with SGLang (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        hf = tiny_models.save(tiny_models.qwen3_moe(), Path(directory, "hf"))
        [found] = on_ranks(1, compared, hf, directory, options.python, deadline_s=DEADLINE_SECONDS)
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine.describe()}
    for dtype in DTYPES:
        result[dtype] = {name: value for (of, name), value in found.items() if of == dtype}
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    durable.write_text(options.out, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
