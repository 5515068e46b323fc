"""Runs of the laptop experiment at a reduced size, through the command line as a user would."""

import json
from pathlib import Path

from ranks import join, on_ranks

from megatron_prepo import config as configuration
from megatron_prepo.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
LAPTOP = REPOSITORY / "examples" / "laptop"

FILES = [
    f"model.hf={LAPTOP / 'base'}",
    f"data.train={LAPTOP / 'train.jsonl'}",
    f"data.eval={LAPTOP / 'eval.jsonl'}",
]
SHORT = [
    "train.total_steps=2",
    "selection.num_candidates=24",
    "selection.num_selected=8",
    "rollout.samples_per_prompt=4",
    "eval.max_prompts=8",
    "eval.samples_per_prompt=1",
    "checkpoint.every=0",  # saves nothing that most tests would read
]


def train(directory: Path, *overrides: str) -> int:
    """Run `megatron-prepo train examples/laptop/prepo.yaml ...`; return the exit code."""
    config = str(LAPTOP / "prepo.yaml")
    return main(["train", config, f"run.dir={directory}", *FILES, *overrides])


def train_in_ranks(num_ranks: int, runs: dict[str, list[str]]) -> None:
    """Make one run after the other, given by directory, in a rank that `on_ranks` has started.

    For tests of what is computed: starting a command for each would take longer than its steps.
    """
    from megatron_prepo.actor import parallel
    from megatron_prepo.train import train

    for directory, overrides in runs.items():
        join(num_ranks)
        settings = [*FILES, f"run.dir={directory}", *overrides]
        train(configuration.load(LAPTOP / "prepo.yaml", settings))
        parallel.shut_down()


def made_by_ranks(directory: Path, *overrides: str, num_ranks: int = 1) -> Path:
    """Make a run in forked ranks, for what a run by the command is compared with; return it."""
    on_ranks(num_ranks, train_in_ranks, num_ranks, {str(directory): [*overrides]})
    return directory


def metrics(directory: Path) -> list[dict]:
    """Return the steps of a run."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def summary(directory: Path) -> dict:
    """Return the result of a run."""
    return json.loads((directory / "summary.json").read_text())
