"""The records of a run: the files of its directory, its totals, and its output on the terminal.

| file | content |
|---|---|
| `config.yaml` | the resolved configuration |
| `inputs.json` | digests of the files that the run reads (`inputs/digests.py`) |
| `prompts.json` | the chat template's date, and a digest of each prompt (`prompt_digests.py`) |
| `metrics.jsonl` | one object per step |
| `evaluations.jsonl` | one object per evaluation |
| `first_evaluation.json` | state after the evaluation before the first step |
| `ledger.jsonl` | one object per rollout |
| `summary.json` | the result |
| `pass_rate.png` | the result as a picture |
| `checkpoints/` | Megatron checkpoints, with the rest of the state that the run resumes from |
| `journal/` | rollouts that no checkpoint covers yet |
| `texts/` | texts of rollouts and evaluations, if `texts` asks for them |
| `dumps/` | steps dumped for debugging (`debug.dump_steps`), and skipped updates |
| `hf/` | the trained model in Hugging Face format |
| `profile/` | traces of `profile.steps` |
| `tensorboard/`, `wandb/`, `mlflow/`, `swanlab/`, `trackio/` | what dashboards store, if used |
| `logs/` | output of all ranks but 0, and errors |
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_prepo.config import Config, EvalConfig
from megatron_prepo.errors import Stopped, UserError
from megatron_prepo.evaluation.held_out import Evaluation, shared
from megatron_prepo.files.atomic import naming, read_lines, write_text
from megatron_prepo.process import activity, machine
from megatron_prepo.process.progress import bar as progress_bar
from megatron_prepo.run import best, dashboards, metrics_table
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run import summary as report
from megatron_prepo.run.ledger import Ledger, LedgerEntry
from megatron_prepo.run.metrics_log import MetricsLog
from megatron_prepo.run.profiling import profiled
from megatron_prepo.run.stopwatch import Stopwatch
from megatron_prepo.run.texts import FOLDER, Kind, TextFiles, file_name

FIRST_EVALUATION = "first_evaluation.json"
LOGS = ("ledger.jsonl", "metrics.jsonl", "evaluations.jsonl")
"""Files to which lines are appended; those of `texts/` are more, if there are any."""

TRAINING_STAGES = (
    "perplexity",
    "probes",
    "rollouts",
    "rewards",
    "old_logprobs",
    "update",
    "weight_sync",
)
"""Stages whose seconds a comparison by time counts: all of a step, without its evaluation."""


class Run:
    """Files, progress bar, seconds and totals of a run; rank 0 writes and shows them.

    `share` gives rank 0's value to every rank; a job of one rank needs none.  The directory may be
    moved, removed or replaced during the run.  Files that are opened by path are therefore written
    only after a check that the directory is still the run's: by all ranks together
    (`check_directory`) between the stages of a step, and by rank 0 alone (`lost`) in code that not
    all ranks execute.  The files that grow by lines stay open, so they need no check.
    """

    def __init__(
        self, config: Config, *, rank: int, share: Callable[[Any], Any] = lambda value: value
    ) -> None:
        self.config, self.rank, self.writes, self.share = config, rank, rank == 0, share
        self.directory = Path(config.run.dir)
        self.seconds = Stopwatch()
        self.rollouts = self.tokens = self.num_steps = 0
        """Totals so far: rollouts generated, their tokens, and steps completed."""
        self.before: Evaluation | None = None
        """The evaluation before the first step; None if there is none (`eval.before=false`)."""
        self.sampling_before = config.eval.sampling
        """How that evaluation was sampled: `eval` may change when a run is resumed."""
        self.is_evaluated = False
        """Whether the state after `num_steps` has been evaluated."""
        self.best = best.of(config.checkpoint)
        self.misses_metric = False
        """Whether it has been logged that a state has no number `checkpoint.keep_best`."""
        self.latest: Mapping[str, object] = {}
        """The metrics of the last step or evaluation, whichever was later."""
        self.identity = run_directory.identity(self.directory) if self.writes else None
        """The run's identity, from the directory's marker."""
        if self.writes:
            self.dashboards = dashboards.opened(config, self.log)
            self.ledger = Ledger(self.directory / "ledger.jsonl")
            self.metrics = MetricsLog(self.directory / "metrics.jsonl")
            self.evaluations = MetricsLog(self.directory / "evaluations.jsonl")
            self.texts = TextFiles(self.directory, config.texts)

    def lost(self) -> str | None:
        """Return an error message if the directory is no longer this run's; only for rank 0."""
        assert self.writes, "rank 0 holds the directory's lock"
        assert self.identity is not None, "a run marks its directory"
        return run_directory.lost(self.directory, self.identity)

    def check_directory(self) -> None:
        """Raise UserError on all ranks if the directory is no longer this run's; collective.

        Raises OSError on all ranks if the check itself fails.
        """
        found: UserError | OSError | None = None
        if self.writes:
            try:
                found = UserError(problem) if (problem := self.lost()) else None
            except OSError as error:
                found = error
        if found := self.share(found):
            raise found

    @contextmanager
    def lost_directory_named(
        self, errors: tuple[type[Exception], ...] = (OSError,)
    ) -> Iterator[None]:
        """Replace an error by UserError if its cause is that the directory was lost; rank 0 only.

        An error that only one rank raises stops the other ranks through the launcher.
        """
        try:
            yield
        except errors as error:
            if self.writes and (problem := self.lost()):
                raise UserError(problem) from error
            raise

    @contextmanager
    def dashboards_closed_if_stopped(self) -> Iterator[None]:
        """Close the dashboards before Stopped is raised: they store what they still hold."""
        try:
            yield
        except Stopped:
            if self.writes and not self.lost():
                self.dashboards.close(dashboards.STOP_SECONDS)
            raise

    def has_lines(self) -> bool:
        """Return whether rollouts of this run are in its ledger, on every rank; collective."""
        return bool(self.share(self.writes and os.fstat(self.ledger.file.fileno()).st_size > 0))

    def log(self, line: str) -> None:
        """Print a line on the terminal, on rank 0 only."""
        if self.writes:
            print(line, file=sys.stderr)

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps' numbers, with a progress bar, until the budget is spent."""
        first, total = self.num_steps, self.config.train.total_steps
        if first and self.is_last(first - 1):
            return
        self.bar = progress_bar(desc="train", total=total, initial=first, disable=not self.writes)
        for step in range(first, total):
            with profiled(self.config.profile, step, self.rank, self.directory):
                yield step
            if self.is_last(step):
                break
        self.bar.total = self.bar.n  # also if the budget of rollouts was spent earlier
        self.bar.close()

    def is_last(self, step: int, to_be_recorded: int = 0) -> bool:
        """Return whether the run ends with this step.

        `to_be_recorded`: number of its rollouts that are not recorded yet.
        """
        budget = self.config.train.rollout_budget
        spent = budget is not None and self.rollouts + to_be_recorded >= budget
        return spent or step + 1 == self.config.train.total_steps

    def record(self, step: int, entries: Sequence[LedgerEntry], metrics: dict[str, Any]) -> None:
        """Record a step's ledger entries and metrics."""
        self.num_steps, self.is_evaluated = self.num_steps + 1, False
        self.rollouts += len(entries)
        self.tokens += sum(entry.length for entry in entries)
        totals = {"rollout/paid": self.rollouts, "rollout/tokens_paid": self.tokens}
        seconds = {f"seconds/{stage}": value for stage, value in self.seconds.of_step().items()}
        row = {**metrics, **totals, **seconds}
        metrics_table.check_step(row, custom_selector=self.config.selection.is_custom)
        self.latest = row
        if self.writes and not self.lost():  # all ranks check together before the next stage
            self.ledger.append(entries)
            self.metrics.write(step, row)
            self.dashboards.write(step, row)
        self.bar.update()
        self.bar.set_postfix(
            reward=f"{metrics['reward/mean']:.2f}",
            entropy=f"{metrics['entropy/mean']:.2f}",
            rollouts=self.rollouts,
        )

    def keep(self, kind: Kind, line: Callable[[], Mapping[str, Any]]) -> None:
        """Keep the texts of a step or an evaluation; only rank 0 calls `line`, which takes time."""
        if self.writes and not self.lost():
            kept = line()
            self.texts.append(kind, kept)
            self.dashboards.write_texts(kind, kept)

    def evaluate(
        self, held_out: Callable[..., Evaluation], when: str, step: int, samples: int
    ) -> Evaluation:
        """Call `held_out(on_progress)`, of `samples` per prompt, with a progress bar; record it."""

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        shown = {"leave": when != "during", "disable": not self.writes}
        with self.seconds("evaluate"), progress_bar(desc=f"evaluate {when}", **shown) as bar:
            evaluation = held_out(on_progress=on_progress)
            bar.set_postfix(pass_rate=f"{evaluation.pass_rate:.3f}")
        row = self._evaluation_row(evaluation, samples)
        self.latest, self.is_evaluated = _on_dashboards(row), True
        if self.writes and not self.lost():
            self.evaluations.write(step, row)
            self.dashboards.write(step, self.latest)
        return evaluation

    def _evaluation_row(self, evaluation: Evaluation, samples: int) -> dict[str, Any]:
        """Return the values of an evaluation, as its line in `evaluations.jsonl` has them."""
        settings = self.config.eval
        row: dict[str, Any] = {
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            "seconds": sum(self.seconds.total[stage] for stage in TRAINING_STAGES),
            **_rates(evaluation, settings.pass_at),
            "samples_per_prompt": samples,
            "prompts": len(evaluation.passes_P),
            "temperature": settings.temperature,
        }
        row |= {"top_p": settings.top_p} if settings.top_p < 1 else {}
        row |= {"top_k": settings.top_k} if settings.top_k else {}
        of_sets = {
            name: _rates(of_set, settings.pass_at) | {"prompts": len(of_set.passes_P)}
            for name, of_set in evaluation.sets().items()
        }
        row |= {"sets": of_sets} if of_sets else {}
        metrics_table.check_evaluation({"step", *row})
        return row

    def is_best(self) -> bool:
        """Take the latest metrics, and return whether the state is the best so far; collective."""
        if self.best is None or self.num_steps == 0:
            return False
        value = self.share(self.latest.get(self.best.metric))
        if self.best.step is None and not best.is_number(value) and not self.misses_metric:
            self.misses_metric = self.best.is_of_evaluations == self.is_evaluated
            if self.misses_metric:
                self.log(
                    f"checkpoint.keep_best={self.best.metric}: there is no such number after "
                    f"{self.num_steps} steps; until there is, no checkpoint is the best"
                )
        return self.best.take(self.num_steps, value)

    def save_first_evaluation(self) -> None:
        """Save the state after the evaluation before the first step, which `restart` restores."""
        if self.writes and not self.lost():
            saved = {"eval": _first_evaluated_by(self.config.eval), "run": self.state_dict()}
            write_text(self.directory / FIRST_EVALUATION, json.dumps(saved) + "\n")

    def restart(self) -> None:
        """Start before the first step; steps that no checkpoint has are removed; collective.

        The evaluation before the first step is kept, if the settings that it depends on are, and
        its line.
        """
        saved = self.share(self._read_first_evaluation() if self.writes else None)
        if saved is None:
            self.truncate_logs({})
        else:
            self.load_state_dict(saved)

    def _read_first_evaluation(self) -> dict[str, Any] | None:
        path, lines = self.directory / FIRST_EVALUATION, Path(self.evaluations.file.name)
        if not self.config.eval.before or not path.is_file():
            return None
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            made_by, state = saved["eval"], saved["run"]
            is_ours = state["identity"] == self.identity
            line = lines.read_bytes()[: state["files"][lines.name]]
            if json.loads(line)["step"] != 0:
                raise ValueError("it is the line of another evaluation")
        except (ValueError, KeyError, TypeError):
            self.log(f"{path} is damaged, or not for {lines.name}; the evaluation is repeated")
            return None
        kept: dict[str, Any] = state
        return kept if is_ours and made_by == _first_evaluated_by(self.config.eval) else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps: identity, totals, first evaluation, file sizes."""
        return {
            "identity": self.identity,
            "num_steps": self.num_steps,
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            "seconds": dict(self.seconds.total),
            "before": None
            if self.before is None
            else vars(self.before) | {"passes_P": self.before.passes_P.tolist()},
            "sampling_before": self.sampling_before,
            "files": {name: os.fstat(file.fileno()).st_size for name, file in self._logs().items()}
            if self.writes
            else None,
            **({"is_evaluated": True} if self.is_evaluated else {}),
            **({"best": dict(vars(self.best))} if self.best else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state; lines that were written after it are removed."""
        self.num_steps, self.rollouts = state["num_steps"], state["rollouts"]
        self.tokens = state["tokens"]
        self.seconds.restore(state["seconds"])
        if (before := state["before"]) is not None:
            if isinstance(before, list):  # from an older version, in which `eval` could not change
                samples = self.config.eval.samples_per_prompt
                before = {"passes_P": before, "samples_per_prompt": samples}
            passes_P = torch.tensor(before["passes_P"], dtype=torch.float64)
            sizes = before.get("sizes", {})  # older versions had one set
            self.before = Evaluation(passes_P, before["samples_per_prompt"], sizes)
            if "temperature_before" in state:  # of an older version, which sampled from all tokens
                earlier = EvalConfig(temperature=state["temperature_before"])
                self.sampling_before = earlier.sampling
            self.sampling_before = state.get("sampling_before", self.sampling_before)
        if self.best and "best" in state:
            self.best.load_state_dict(state["best"])
        self.truncate_logs(state["files"])
        self.is_evaluated = state.get("is_evaluated", False)
        if self.is_evaluated and self.writes:
            self._show_again()

    def _show_again(self) -> None:
        """Show the evaluation of the restored state: dashboards may drop all from this step on."""
        *_, row = read_lines(self.directory / "evaluations.jsonl")
        self.dashboards.write(self.num_steps, _on_dashboards(row))
        if (kept := self.directory / file_name("evaluations")).is_file():
            for line in read_lines(kept):
                if line["step"] == self.num_steps:
                    self.dashboards.write_texts("evaluations", line)

    def truncate_logs(self, sizes: dict[str, int]) -> None:
        """Truncate the files of lines to these sizes in bytes; files without a size are emptied.

        Raises UserError if a file is shorter than its size, except that texts may be removed.
        """
        if not self.writes:
            return
        for name, file in self._logs().items():
            size, found = sizes.get(name, 0), os.fstat(file.fileno()).st_size
            if name.startswith(FOLDER):
                size = min(size, found)
            if found < size:
                raise UserError(
                    f"{file.name} has lost lines that its checkpoints need ({size} bytes); restore "
                    "it, or start a new run in another run.dir from the last checkpoint "
                    f"(model.megatron={self.directory / 'checkpoints'})"
                )
            with naming(file.name):
                os.truncate(file.fileno(), size)
                os.fsync(file.fileno())

    def _check_on_rank_zero(self) -> None:
        """Raise UserError on rank 0 if the directory is lost; after the last collective call."""
        if problem := self.lost():
            raise UserError(problem)

    def _logs(self) -> dict[str, TextIO]:
        """Return the open files by name, since their paths may be another run's by now."""
        logs = (self.ledger, self.metrics, self.evaluations)
        return dict(zip(LOGS, (log.file for log in logs), strict=True)) | self.texts.files

    def _gain(
        self, before: Evaluation | None, after: Evaluation
    ) -> tuple[float | None, list[float] | None]:
        """Return the gain and its interval, by two evaluations of the same prompts.

        Both are None without the first one, and if they were sampled differently, since such pass
        rates are not comparable.
        """
        if before is None or self.sampling_before != self.config.eval.sampling:
            return None, None
        return after.pass_rate - before.pass_rate, list(after.gain_ci95(before))

    def _log_other_sampling(self) -> None:
        """Log how the two evaluations were sampled if there is no gain."""
        now = self.config.eval.sampling
        if names := [name for name, value in now.items() if value != self.sampling_before[name]]:
            before, after = (
                ", ".join(f"{name} {sampling[name]}" for name in names)
                for sampling in (self.sampling_before, now)
            )
            self.log(
                f"no gain is computed: the evaluation before the run was sampled at {before}, and "
                f"this one at {after}"
            )

    def _change(self, before: Evaluation | None, after: Evaluation) -> dict[str, Any]:
        """Return two evaluations of the same prompts, and the gain, as the summary has them."""
        gain, gain_ci95 = self._gain(before, after)
        return {
            "pass_rate_before": before.pass_rate if before else None,
            "pass_rate_before_ci95": list(before.ci95) if before else None,
            "pass_rate_after": after.pass_rate,
            "pass_rate_after_ci95": list(after.ci95),
            "gain": gain,
            "gain_ci95": gain_ci95,
            "held_out_prompts": len(after.passes_P),
        }

    def finish(self, after: Evaluation, *, ranks: int) -> dict[str, Any]:
        """Return the summary, after closing files and dashboards and writing summary and plot."""
        if self.best and self.best.step is None:
            self.log(
                f"checkpoint.keep_best={self.best.metric}: no state that was compared had such a "
                "number, so no checkpoint is the best"
            )
        before = self.before
        if before is not None:
            self._log_other_sampling()
            before, after = shared(before, after)
        sets_before = before.sets() if before else {}
        of_sets = {
            name: self._change(sets_before.get(name), of_set)
            for name, of_set in after.sets().items()
        }
        summary = {
            "method": self.config.selection.name,
            "weighting": self.config.weighting.method,
            "steps": self.num_steps,
            "ranks": ranks,
            **self._change(before, after),
            **({"sets": of_sets} if of_sets else {}),
            "samples_per_prompt": self.config.eval.samples_per_prompt,
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            **({"best": dict(vars(self.best))} if self.best else {}),
            "seconds": {stage: round(value, 2) for stage, value in self.seconds.total.items()},
            "machine": machine.describe(),
        }
        if self.writes:
            for log in (self.ledger, self.metrics, self.evaluations, self.texts):
                log.close()
            self._check_on_rank_zero()
            with activity.doing("drawing pass_rate.png"):
                report.plot(self.directory, summary)
            self._check_on_rank_zero()
            # the last of the run's own files, since it marks the run as finished
            write_text(self.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
            self.dashboards.close(picture=(self.num_steps, self.directory / report.PICTURE))
            run_directory.end(self.directory)
        return summary


def _rates(evaluation: Evaluation, pass_at: Sequence[int]) -> dict[str, Any]:
    """Return pass rate and pass@k with their intervals, as a line of evaluations has them."""
    low, high = evaluation.ci95
    rates = {"pass_rate": evaluation.pass_rate, "pass_rate_ci95": [low, high]}
    known = {str(k): evaluation.pass_at(k) for k in pass_at if k <= evaluation.samples_per_prompt}
    return rates | ({"pass_at": known} if known else {})


def _on_dashboards(row: Mapping[str, Any]) -> dict[str, float]:
    """Return what dashboards show of an evaluation's line."""
    shown = _shown(row) | {name: row[name] for name in ("samples_per_prompt", "rollouts")}
    for name, of_set in row.get("sets", {}).items():
        shown |= {f"{name}/{key}": value for key, value in _shown(of_set).items()}
    shown = {f"eval/{name}": value for name, value in shown.items()}
    metrics_table.check_on_dashboards(shown)
    return shown


def _first_evaluated_by(settings: EvalConfig) -> dict[str, Any]:
    """Return the settings that the evaluation before the first step depends on, as plain JSON."""
    names = ("samples_per_prompt", "max_prompts")
    own = {name: getattr(settings, name) for name in names}
    return {**own, **settings.sampling, "pass_at": list(settings.pass_at)}


def _shown(rates: Mapping[str, Any]) -> dict[str, float]:
    """Return what dashboards show of `_rates`."""
    low, high = rates["pass_rate_ci95"]
    shown = {"pass_rate": rates["pass_rate"], "ci95_low": low, "ci95_high": high}
    return shown | {f"pass_at_{k}": at["mean"] for k, at in rates.get("pass_at", {}).items()}
