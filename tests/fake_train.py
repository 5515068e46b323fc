"""Stand in for `megatron-prepo train`: write a finished run's files, by hand, immediately."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_prepo import config as configuration
from megatron_prepo.files import ownership


def main() -> None:
    """Run as `megatron-prepo train CONFIG key=value ...`."""
    config = configuration.load(sys.argv[1], sys.argv[2:])
    directory = Path(config.run.dir)
    name = f"{directory.parent.name}/{directory.name}"
    with open(os.environ["FAKE_STARTED"], "a") as started:
        started.write(f"{name}\n")
    if (directory / "config.yaml").exists() and not config.run.overwrite:
        sys.exit("already there")
    ownership.mark(directory, ownership.RUN, identity=ownership.new_identity())
    (directory / "config.yaml").write_text(configuration.to_yaml(config))
    if "FAKE_PIDS" in os.environ:
        child = subprocess.Popen(["sleep", "60"])
        with open(os.environ["FAKE_PIDS"], "a") as pids:
            pids.write(f"{os.getpid()}\n{child.pid}\n")
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    if os.environ.get("FAKE_FAILS") == name:
        print("the fake gives up", file=sys.stderr)
        sys.exit(3)

    def write(name: str, rows: list[dict]) -> None:
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    oracle = config.selection.method == "oracle"
    metrics, evaluations, ledger = [], [], []
    for step in range(4):
        evaluations.append(
            {
                "step": step,
                "rollouts": 8 * step,
                "tokens": 80 * step,
                "seconds": 1.5 * step,
                "pass_rate": [0.4, 0.43333333, 0.56666666, 0.6][step],
                "pass_rate_ci95": [0.3, 0.7],
                "samples_per_prompt": 4 if step in (0, 3) else 1,
            }
        )
    for step in range(3):
        metrics.append(
            {
                "step": step,
                "reward/mean": 0.5,
                "reward/zero_variance_ratio": 0.5 / 2**step,
                "entropy/mean": 0.3,
                "ppl/spearman_with_reward": 0.12345678 if step == 1 else None,
                "rollout/paid": 8 * (step + 1),
                "rollout/tokens_paid": 80 * (step + 1),
                "seconds/update": 0.4,
                **({"seconds/probes": 2.0} if oracle else {}),
            }
        )
        for purpose, count in (("train", 8), ("probe", 3 if oracle else 0)):
            for n in range(count):
                ledger.append(
                    {
                        "step": step,
                        "prompt_id": f"p{n // 2}",
                        "sample": n % 2,
                        "selector": config.selection.method,
                        "purpose": purpose,
                        "trained": purpose == "train",
                        "ppl": 1.0 + n // 2,
                        "reward": 1.0 if n < 3 else 0.0,
                        "length": 5,
                        "finished": True,
                        "mean_entropy": 0.3,
                        "weight": 1.0,
                        "zero_variance": n // 2 != 1,
                        "weight_version": step,
                    }
                )
    write("metrics.jsonl", metrics)
    write("evaluations.jsonl", evaluations)
    write("ledger.jsonl", ledger)
    summary = {
        "method": config.selection.method,
        "steps": 3,
        "ranks": 1,
        "pass_rate_before": 0.4,
        "pass_rate_after": 0.6,
        "held_out_prompts": 10,
        "samples_per_prompt": 4,
        "rollouts": 24,
        "tokens": 240,
        "seconds": {"update": 1.0},
        "machine": {"processor": "fake"},
    }
    (directory / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
