"""What a run leaves behind: its directory, its totals, and what it shows on the terminal.

| file | what |
|---|---|
| `config.yaml` | the resolved configuration |
| `metrics.jsonl` | one object a step |
| `evaluations.jsonl` | one object an evaluation |
| `ledger.jsonl` | one object a rollout |
| `summary.json` | the result |
| `pass_rate.png` | the result as a picture |
| `checkpoints/` | Megatron checkpoints |
| `hf/` | the trained model in Hugging Face format |
| `profile/` | traces of `profile.steps` |
| `logs/` | what ranks other than 0 printed, and errors |
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml
from tqdm import tqdm

from megatron_prepo import machine, report
from megatron_prepo.config import Config, to_tree
from megatron_prepo.durable import write_text
from megatron_prepo.errors import UserError
from megatron_prepo.evaluate import Evaluation, mean_ci95
from megatron_prepo.ledger import Ledger, LedgerEntry
from megatron_prepo.metrics import MetricsLog, Stopwatch
from megatron_prepo.profiling import profiled

OURS = (
    "config.yaml",
    "metrics.jsonl",
    "evaluations.jsonl",
    "ledger.jsonl",
    "summary.json",
    "pass_rate.png",
    "checkpoints",
    "hf",
    "profile",
)
"""What a run writes, and `run.overwrite` removes; anything else in the directory is left alone."""

TRAINING_STAGES = (
    "perplexity",
    "probes",
    "rollouts",
    "rewards",
    "old_logprobs",
    "update",
    "weight_sync",
)
"""Whose seconds a comparison by time counts: all of a step, but not what only looks at it."""


def check_free(config: Config) -> None:
    """UserError if the directory holds a run that may not be replaced."""
    directory = Path(config.run.dir)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"run.dir={directory} is a file; choose a directory")
    if (directory / "config.yaml").exists() and not config.run.overwrite:
        raise UserError(
            f"run.dir={directory} already holds a run; choose another directory, or set "
            "run.overwrite=true to replace it"
        )


def create_directory(config: Config) -> Path:
    """Make room for the run and save its configuration; one rank does it."""
    check_free(config)
    directory = Path(config.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    for name in OURS:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_text(directory / "config.yaml", yaml.safe_dump(to_tree(config), sort_keys=False))
    return directory


class Run:
    """Files, progress bar, seconds and totals of a run; rank 0 writes and shows them."""

    def __init__(self, config: Config, *, rank: int):
        self.config, self.rank, self.writes = config, rank, rank == 0
        self.directory = Path(config.run.dir)
        self.seconds = Stopwatch()
        self.rollouts = self.tokens = self.num_steps = 0
        if self.writes:
            create_directory(config)
            project = config.run.wandb_project
            self.ledger = Ledger(self.directory / "ledger.jsonl")
            self.metrics = MetricsLog(self.directory / "metrics.jsonl", project, to_tree(config))
            self.evaluations = MetricsLog(self.directory / "evaluations.jsonl")

    def say(self, sentence: str) -> None:
        """A line on the terminal, once."""
        if self.writes:
            print(sentence, file=sys.stderr)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps, from 0, with a progress bar; ends when the budget is spent."""
        self.bar = tqdm(range(self.config.train.total_steps), "train", disable=not self.writes)
        for step in self.bar:
            with profiled(self.config.profile, step, self.rank, self.directory):
                yield step
            if self.is_last(step):
                break
        self.bar.close()

    def is_last(self, step: int) -> bool:
        """Whether this step, which has been recorded, ends the run."""
        budget = self.config.train.rollout_budget
        spent = budget is not None and self.rollouts >= budget
        return spent or step + 1 == self.config.train.total_steps

    def record(self, step: int, entries: Sequence[LedgerEntry], metrics: dict) -> None:
        """A step's ledger entries and metrics."""
        self.num_steps += 1
        self.rollouts += len(entries)
        self.tokens += sum(entry.length for entry in entries)
        totals = {"rollout/paid": self.rollouts, "rollout/tokens_paid": self.tokens}
        seconds = {f"seconds/{stage}": value for stage, value in self.seconds.of_step().items()}
        if self.writes:
            self.ledger.append(entries)
            self.metrics.write(step, {**metrics, **totals, **seconds})
        self.bar.set_postfix(
            reward=f"{metrics['reward/mean']:.2f}",
            entropy=f"{metrics['entropy/mean']:.2f}",
            rollouts=self.rollouts,
        )

    def evaluate(
        self, held_out: Callable[..., Evaluation], when: str, step: int, samples: int
    ) -> Evaluation:
        """`held_out(samples_per_prompt, on_progress)` with a progress bar; written and shown."""
        bar = tqdm(desc=f"evaluate {when}", leave=when != "during", disable=not self.writes)

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        with self.seconds("evaluate"), bar:
            evaluation = held_out(samples_per_prompt=samples, on_progress=on_progress)
            bar.set_postfix(pass_rate=f"{evaluation.pass_rate:.3f}")
        if self.writes:
            self.evaluations.write(
                step,
                {
                    "rollouts": self.rollouts,
                    "tokens": self.tokens,
                    "seconds": sum(self.seconds.total[stage] for stage in TRAINING_STAGES),
                    "pass_rate": evaluation.pass_rate,
                    "pass_rate_ci95": list(evaluation.ci95),
                    "samples_per_prompt": samples,
                },
            )
        return evaluation

    def finish(self, before: Evaluation, after: Evaluation, *, ranks: int) -> dict:
        """The summary; written with the plot, and the files closed."""
        gain_P = after.passes_P - before.passes_P
        summary = {
            "method": self.config.selection.method,
            "weighting": self.config.weighting.method,
            "steps": self.num_steps,
            "ranks": ranks,
            "pass_rate_before": before.pass_rate,
            "pass_rate_before_ci95": list(before.ci95),
            "pass_rate_after": after.pass_rate,
            "pass_rate_after_ci95": list(after.ci95),
            "gain": float(gain_P.mean()),
            "gain_ci95": list(mean_ci95(gain_P)),
            "held_out_prompts": len(gain_P),
            "samples_per_prompt": self.config.eval.samples_per_prompt,
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            "seconds": {stage: round(value, 2) for stage, value in self.seconds.total.items()},
            "machine": machine.describe(),
        }
        if self.writes:
            for log in (self.ledger, self.metrics, self.evaluations):
                log.close()
            write_text(self.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
            report.plot(self.directory)
        return summary
