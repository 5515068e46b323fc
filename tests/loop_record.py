"""Record what short runs of both loops leave, to compare two versions of the code.

    python -m tests.loop_record BEFORE            # in one tree
    python -m tests.loop_record AFTER             # in the other
    python -m tests.loop_record --compare BEFORE AFTER

A record has the ledger byte for byte; metrics, evaluations, summary and the checkpoints' states
without what a clock measures; and the checksums of exported weights and dumps.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

TINY = [
    "parallel.tensor=1",
    "train.total_steps=3",
    "selection.num_candidates=16",
    "selection.num_selected=4",
    "rollout.samples_per_prompt=4",
    "rollout.max_new_tokens=40",
    "checkpoint.optimizer=false",
    "eval.every=2",
    "eval.max_prompts=4",
    "eval.samples_per_prompt=1",
]
SERVERS = [
    "train.total_steps=4",
    "rollout.engine=sglang",
    f"servers.python={sys.executable}",
    "weight_sync.verify=never",
    "loss.importance=truncated",
    f"reward.function={Path(__file__).resolve()}:parity",
]
OVERLAPPED = [*SERVERS, "train.overlap=true"]
BY_ENGINE = ["selection.ppl_from=engine", "selection.ppl_agreement=-1"]
OTHER_LOSS = [
    "loss.kl_coef=0.01",
    "loss.entropy_coef=0.001",
    "loss.importance=masked",
    "loss.aggregation=token-mean",
    "weighting.include_zero_variance=false",
]
METHODS = (
    "prepo",
    "random",
    "dapo",
    "greso",
    "oracle",
    "mopps",
    "mapp",
    "kgps",
    "dps",
    "hive",
    "vip",
    "pilot_commit",
    "foresight",
)
WITH = {"vip": ["selection.vip_least=3", "selection.vip_most=5"]}
"""Settings by which groups of G = 4 differ in size."""
CASES = {
    **{name: (1, [f"selection.method={name}", *WITH.get(name, [])]) for name in METHODS},
    "engine_ppl": (1, BY_ENGINE),
    "kl": (1, OTHER_LOSS),
    "debug_rollout": (1, ["debug.mode=rollout", "train.total_steps=2"]),
    "dumped": (1, ["debug.dump_steps=[1]", "train.total_steps=2", "weighting.method=none"]),
    "budget": (1, ["selection.method=dapo", "train.rollout_budget=40", "train.total_steps=9"]),
    "overlap": (1, OVERLAPPED),
    "overlap_foresight": (1, [*OVERLAPPED, "selection.method=foresight"]),
    "servers_engine_ppl": (2, [*SERVERS, *BY_ENGINE, "parallel.tensor=2"]),
    "resumed": (1, ["train.total_steps=4", "selection.method=foresight"]),
    "overlap_resumed": (1, OVERLAPPED),
    "tp2_pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "dp2_dapo": (2, ["parallel.data=2", "selection.method=dapo"]),
}
"""Number of ranks, and settings, by name; those that end in `resumed` are stopped and resumed."""
CLOCKED = ("seconds", "speed/", "machine")


def parity(completion: str, answer: str) -> float:
    """Return a reward in which the fake servers' completions vary."""
    return float(sum(completion.encode()) % 2)


def run(num_ranks: int, directory: str, overrides: list[str], stop: bool) -> None:
    """Train in a rank, and with `stop` be asked to stop after the first step."""
    from ranks import join

    from megatron_prepo import config as configuration
    from megatron_prepo.actor import parallel
    from megatron_prepo.errors import Stopped
    from megatron_prepo.train import train
    from megatron_prepo.train_async import train_overlapped
    from tests.e2e.laptop import FILES, LAPTOP

    join(num_ranks)
    settings = [*FILES, *TINY, f"run.dir={directory}", *overrides]
    config = configuration.load(LAPTOP / "prepo.yaml", settings)
    if stop:
        metrics = Path(directory) / "metrics.jsonl"
        threading.Thread(target=_ask_to_stop, args=(metrics,), daemon=True).start()
    try:
        (train_overlapped if config.train.overlap else train)(config)
    except Stopped:
        assert stop, "stopped without a request"
    parallel.shut_down()


def _ask_to_stop(metrics: Path) -> None:
    while not (metrics.is_file() and b"\n" in metrics.read_bytes()):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


def record(out: Path, names: list[str]) -> None:
    """Make the runs, and write a record of each."""
    import fake_sglang_package
    from ranks import on_ranks

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="loops_") as root:
        os.environ.update(fake_sglang_package.environment(Path(root) / "package"))
        sys.path.insert(0, str(Path(root) / "package"))
        for name in names or CASES:
            (num_ranks, overrides), directory = CASES[name], Path(root) / name
            if name.endswith("resumed"):
                overrides = [*overrides, "checkpoint.optimizer=true"]
                on_ranks(num_ranks, run, num_ranks, str(directory), overrides, True)
                assert not (directory / "summary.json").exists(), "it was not stopped"
            on_ranks(num_ranks, run, num_ranks, str(directory), overrides, False)
            (out / f"{name}.json").write_text(json.dumps(left_behind(directory), indent=1))
            print(name, flush=True)


def left_behind(directory: Path) -> dict:
    """Return what a run leaves in its directory that another one like it must leave, too."""

    def lines(name: str) -> list:
        return [timeless(json.loads(line)) for line in (directory / name).read_text().splitlines()]

    states = [json.loads(p.read_text()) for p in sorted(directory.glob("checkpoints/*/run.json"))]
    for state in states:  # lines with seconds vary in length
        files = state["run"]["files"]
        state["run"]["files"] = {name: files[name] for name in files if name == "ledger.jsonl"}
    weights = [directory / "hf" / "model.safetensors"]
    dumps = sorted(directory.glob("dumps/*/batch.safetensors"))
    return {
        "ledger": (directory / "ledger.jsonl").read_text(),
        "metrics": lines("metrics.jsonl"),
        "evaluations": lines("evaluations.jsonl"),
        "summary": timeless(json.loads((directory / "summary.json").read_text())),
        "states": timeless(states),
        "sums": {
            str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (*weights, *dumps)
        },
    }


def timeless(value):
    """Return the same with keys only for what a clock or the machine decides."""
    if isinstance(value, dict):
        return {k: None if k.startswith(CLOCKED) else timeless(v) for k, v in value.items()}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def compare(before: Path, after: Path) -> int:
    """Print what differs; return the number of records that do, or are missing on a side."""
    names, differing = {path.name for side in (before, after) for path in side.glob("*.json")}, 0
    for name in sorted(names):
        if missing := [side for side in (before, after) if not (side / name).is_file()]:
            differing += 1
            print(f"MISSING {name} in {missing[0]}")
            continue
        one, other = (json.loads((side / name).read_text()) for side in (before, after))
        parts = [part for part in one if one[part] != other[part]]
        differing += bool(parts)
        what = f"{len(one['metrics'])} steps, {len(one['ledger'].splitlines())} rollouts"
        print(f"{'DIFFERS' if parts else 'equal':<8}{name:<26}{what} {' '.join(parts)}")
    return differing


def main() -> int:
    """Record, or compare; the exit code is 1 if records differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    options = parser.parse_args()
    if options.compare:
        return int(compare(*options.compare) > 0)
    record(options.out, options.cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
