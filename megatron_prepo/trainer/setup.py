"""Set-up of a training loop on each rank, from checked inputs to the export."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_prepo.actor import parallel
from megatron_prepo.actor.actor import Actor
from megatron_prepo.actor.model import describe
from megatron_prepo.config import Config, RewardConfig
from megatron_prepo.data import CandidateBatches
from megatron_prepo.errors import Stopped, UserError
from megatron_prepo.evaluation.held_out import Evaluation, evaluate, evaluation_request, pooled
from megatron_prepo.inputs import hub, preflight, prompt_digests
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.process import activity
from megatron_prepo.process.stop_signals import StopRequests
from megatron_prepo.records import Prompt, Rollout, scored_sequence
from megatron_prepo.rewards.output import OUTPUT
from megatron_prepo.rewards.pool import Grade, Grader
from megatron_prepo.rollout.build import Ranks, build_engine
from megatron_prepo.rollout.engine import Engine, EngineError
from megatron_prepo.rollout.stopping import unused_end_token
from megatron_prepo.rollout.weight_sync import sync_weights
from megatron_prepo.run import best, dashboards, opening
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run.recorder import Run
from megatron_prepo.run.rollout_journal import Journal
from megatron_prepo.selection import load as load_selector
from megatron_prepo.selection.base import Selector
from megatron_prepo.trainer.groups import reward_tensor
from megatron_prepo.trainer.guarded_update import SkipUpdates, UpdateGuard
from megatron_prepo.trainer.overlong import Overlong
from megatron_prepo.trainer.policy_update import TrainingBatch
from megatron_prepo.trainer.prompt_scores import projection
from megatron_prepo.trainer.resume import Checkpoints, is_affordable, newest_checkpoint
from megatron_prepo.trainer.step_texts import evaluation_texts
from megatron_prepo.trainer.throughput import Throughput

Result = TypeVar("Result")


@dataclass
class Trainer:
    """The objects of a training loop, on each rank."""

    config: Config
    inputs: preflight.Inputs
    run: Run
    stop: StopRequests
    journal: Journal
    engine: Engine
    actor: Actor
    updates: UpdateGuard | SkipUpdates
    grader: Grader
    batches: CandidateBatches
    selector: Selector
    throughput: Throughput
    overlong: Overlong
    resumes_from: Path | None
    """The run's own checkpoint; None if it starts from the beginning."""
    checkpoints: Checkpoints = field(init=False)
    """Set by `resumed`."""
    after: Evaluation = field(init=False)
    """Evaluation after the last step; set once it is done."""

    @cached_property
    def projection_HD(self) -> torch.Tensor | None:
        """Directions of the candidates' hidden states that the selector needs, equal on all ranks.

        A resumed run has the same.
        """
        if not (features := self.selector.hidden_features):
            return None
        return projection(self.actor.hf["hidden_size"], features, self.config.train.seed)

    @contextmanager
    def resumed(self, **parts: Any) -> Iterator[None]:
        """Restore actor, engine and parts from `resumes_from`, or start from the beginning.

        `parts`: further state of the loop in a checkpoint, besides run and updates.  If the engine
        fails, the last complete step is saved and Stopped is raised on all ranks.
        """
        with self.run.dashboards_closed_if_stopped():
            self._restore({"run": self.run, **parts, "updates": self.updates})
            with self.checkpoints.saved_if_the_engine_fails():
                yield
                with self.run.seconds("checkpoint"):
                    self.checkpoints.finish()

    def _restore(self, parts: dict[str, Any]) -> None:
        """Restore actor, engine and parts; raises Stopped if the engine fails."""
        with self.run.seconds("setup"):
            self.checkpoints = Checkpoints(
                self.config.checkpoint,
                self.run.directory / "checkpoints",
                self.actor,
                parts,
                self.journal,
                self.run.log,
                timeout_minutes=self.config.parallel.timeout_minutes,
                best=self.run.best,
            )
            with activity.doing("reading the checkpoint"):
                self.checkpoints.restore(self.resumes_from)
            try:
                with activity.doing("first weight sync, once the engine is ready"):
                    self.sync()
            except EngineError as error:  # of all ranks
                raise Stopped(
                    f"the engine failed before training began: {error}", exit_code=1
                ) from error

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps; evaluate before the first, after the last, and when due.

        An evaluation that a stopped run has made of the same state is not repeated.
        """
        settings, run = self.config.eval, self.run
        if run.num_steps == 0 and run.before is None and settings.before:
            run.before = self.evaluate("before", settings.samples_per_prompt)
            run.save_first_evaluation()
        for step in run.steps():
            if step > 0 and due(step - 1, settings.every) and not run.is_evaluated:
                self.evaluate("during", settings.samples_during)
                self._keep_if_best()
            yield step
        self.after = self.evaluate("after", settings.samples_per_prompt)
        self._keep_if_best()

    def _keep_if_best(self) -> None:
        if self.config.checkpoint.keep_best:
            with self.run.seconds("checkpoint"):
                self.checkpoints.keep_if_best()

    def sync(self) -> None:
        """Give the engine the actor's weights, some by way of the run's directory."""
        self.run.check_directory()
        probe = self.inputs.train_prompts[0].tokens
        sync_weights(
            self.actor,
            self.engine,
            self.config.model,
            self.config.weight_sync,
            probe,
            compare_files=self.resumes_from is None or bool(self.config.loss.kl_coef),
        )

    def evaluate(self, when: str, samples: int) -> Evaluation:
        """Evaluate and record avg@k on held-out prompts, with the same random numbers each time."""
        sets, step = self.inputs.eval_sets, self.run.num_steps
        total = samples * sum(map(len, sets.values()))
        graded: dict[str, list[tuple[Rollout, Grade]]] = {}

        def held_out(on_progress: Callable[[int, int], None]) -> Evaluation:
            found: dict[str, Evaluation] = {}
            for name, prompts in sets.items():
                before = samples * sum(len(sets[earlier]) for earlier in found)

                def show(done: int, _: int, before: int = before) -> None:
                    on_progress(before + done, total)

                show(0, 0)  # a bar with its total, before the first batch is complete
                found[name], graded[name] = self._evaluate_set(prompts, samples, show)
            return pooled(found)

        evaluation = self.run.evaluate(held_out, when, step, samples)
        if (count := self.config.texts.evaluations) != 0:
            self.run.keep("evaluations", partial(evaluation_texts, step, when, graded, count))
        return evaluation

    def _evaluate_set(
        self, prompts: Sequence[Prompt], samples: int, on_progress: Callable[[int, int], None]
    ) -> tuple[Evaluation, list[tuple[Rollout, Grade]]]:
        """Return the evaluation of a set, and its completions with their grades."""
        config = self.config
        graded: list[tuple[Rollout, Grade]] = []

        def rewards_of(rollouts: Sequence[Rollout]) -> torch.Tensor:
            grades = self.grader.grade(rollouts)
            graded.extend(zip(rollouts, grades, strict=True))
            return reward_tensor(grades)

        request = evaluation_request(config, prompts, samples, on_progress)
        evaluation = evaluate(self.engine, request, rewards_of, pass_reward=config.reward.high)
        return evaluation, graded

    def save_if_due(self, step: int) -> None:
        """Finish a pending checkpoint, and save one if settings or a signal ask for it.

        Called between two steps.  Raises Stopped on all ranks if one has received a stop signal.
        """
        self.run.check_directory()
        stopping = self.stop.anywhere()
        with self.run.seconds("checkpoint"):
            self.checkpoints.finish_if_done()
            if self._checkpoint_is_due(step) or self.run.is_last(step) or stopping:
                self.run.is_best()  # by a metric of the step, for the state that is saved
                self.checkpoints.save()
            if stopping:
                self.checkpoints.finish()
                raise self.stop.stopped(self.run.num_steps)

    def _checkpoint_is_due(self, step: int) -> bool:
        """Return whether the settings ask for a checkpoint; collective, by rank 0's clock."""
        settings = self.config.checkpoint
        if settings.every is not None and due(step, settings.every):
            return True
        if settings.every_minutes is not None:
            minutes = (time.monotonic() - self.checkpoints.saved_at) / 60
            return bool(parallel.from_rank_zero(minutes >= settings.every_minutes))
        if settings.every is not None:
            return False
        affordable = parallel.from_rank_zero(is_affordable(self.run.seconds.total))
        return settings.optimizer and affordable

    def speed(self, batch: TrainingBatch) -> dict[str, float]:
        """Return rates of the actor's passes in the step that is about to be recorded."""
        sequences = [scored_sequence(rollout) for rollout in batch.groups.rollouts]
        advantages, masked = batch.advantage_N.tolist(), batch.groups.masked
        learnt = [
            self.updates.learns_from(advantage) and not excluded
            for advantage, excluded in zip(advantages, masked, strict=True)
        ]
        return self.throughput.of_step(self.run.seconds, sequences, learnt)

    def finish(self) -> dict[str, Any]:
        """Export the weights, finish the run and return its summary."""
        with self.run.lost_directory_named():
            self.run.check_directory()
            with self.run.seconds("export"):
                self.actor.export(self.run.directory / "hf", write=self.run.writes)
                if self.config.lora.rank:
                    self._export_adapter()
            self.engine.close()
            self.grader.close()
            self.run.check_directory()
            self.journal.close()
            return self.run.finish(self.after, ranks=dist.get_world_size())

    def _export_adapter(self) -> None:
        """Export the adapters, with the name of their base that holds in any working directory."""
        base, revision = hub.for_other_programs(self.config.model.hf)
        self.actor.export_adapter(
            self.run.directory / "adapter", base=base, revision=revision, write=self.run.writes
        )


def set_up(config: Config) -> Trainer:
    """Read the inputs, join the other ranks, build engine and actor; collective."""
    dashboards.check(config.run)
    best.check(config.checkpoint, config.eval, config.data, config.selection)
    with activity.doing("reading the inputs"):
        needed = run_directory.needs_initial_weights(config)
        inputs = preflight.check(run_directory.as_started(config), initial_weights=needed)
    with activity.doing("waiting for the other ranks"):
        parallel.initialize(config.parallel, config.train.seed)
    prompt_digests.check_ranks(inputs.digests, parallel.gather_to_all)
    stop = StopRequests(config.checkpoint.grace_seconds, gather=parallel.gather_to_all)
    config = begin(config)
    run = Run(config, rank=dist.get_rank(), share=parallel.from_rank_zero)
    if run.writes:
        prompt_digests.save(run.directory, inputs.digests)
    run.log(opening.prompts(config.data, inputs.train_prompts, inputs.eval_sets, inputs.dropped))
    if warning := unused_end_token(inputs.stop_tokens, inputs.tokenizer):
        run.log("; ".join(warning))
    run.log(describe(config))
    if config.sglang and (config.rollout.engine == "embedded" or config.servers.urls):
        run.log("the section sglang: is for servers that the run starts, and is ignored here")
    seed, total_steps = config.train.seed, config.train.total_steps
    batches = CandidateBatches(
        inputs.train_prompts, config.selection.num_candidates, seed, config.data.order
    )
    selector = load_selector(config.selection.method)(
        config.selection, total_steps=total_steps, seed=seed, pass_reward=config.reward.high
    )
    journal = Journal(run.directory / "journal", dist.get_rank(), share=parallel.from_rank_zero)
    with run.seconds("setup"):
        resumes_from = newest_checkpoint(run)
        if resumes_from is None:
            on_rank_zero(lambda: check_beginning(config))
        with activity.doing("starting the grading processes"):
            grader = build_grader(config.reward, run.directory, run.log)
        for prompts in (inputs.train_prompts, *inputs.eval_sets.values()):
            grader.check_answers(prompts)
        with activity.doing("starting the engine"):
            engine = build_engine(
                config, inputs.tokenizer, device=parallel.device(), ranks=ranks(), log=run.log
            )
        preflight.check_engine(config.model, config.rollout, engine)
        with activity.doing("building the model and reading its weights"):
            actor = Actor(config, resumes=resumes_from is not None)
    updates = (
        SkipUpdates(run) if config.debug.mode == "rollout" else UpdateGuard(config, actor, run)
    )
    return Trainer(
        config=config,
        inputs=inputs,
        run=run,
        stop=stop,
        journal=journal,
        engine=engine,
        actor=actor,
        updates=updates,
        grader=grader,
        batches=batches,
        selector=selector,
        throughput=Throughput(
            actor.hf,
            dtype=config.model.dtype,
            by_actor=config.selection.ppl_from == "actor",
            scorings=2 if config.loss.kl_coef else 1,  # the initial policy's scores, too
        ),
        overlong=Overlong.of(config.rollout),
        resumes_from=resumes_from,
    )


def begin(config: Config) -> Config:
    """Take the run's directory and return the settings of the run; collective.

    Raises UserError on all ranks if it is in use or holds anything but this run.
    """
    return on_rank_zero(
        lambda: run_directory.begin(config, lambda line: print(line, file=sys.stderr))
    )


def check_beginning(config: Config) -> None:
    """Raise UserError unless the weights that the run started from are unchanged, and fit.

    They have been checked already unless the run has checkpoints, which turned out to be damaged
    only when they were read.
    """
    if not run_directory.needs_initial_weights(config):
        run_directory.check_initial_weights(config)
        preflight.check_weights(config.model, read_hf_config(config.model.hf))


def on_rank_zero(call: Callable[[], Result]) -> Result:
    """Return the result of a call on rank 0, or raise its UserError, on every rank; collective."""
    result: Result | UserError | None = None
    if dist.get_rank() == 0:
        try:
            result = call()
        except UserError as error:
            result = error
    result = parallel.from_rank_zero(result)
    if isinstance(result, UserError):
        raise result
    return cast(Result, result)


def ranks() -> Ranks:
    """Return the ranks of the job, for the engine."""
    return Ranks(
        dist.get_rank(),
        dist.get_world_size(),
        gather=parallel.gather_to_all,
        share=parallel.from_rank_zero_when_done,
    )


def build_grader(reward: RewardConfig, directory: Path, log: Callable[[str], None]) -> Grader:
    """Start the grading processes next to rank 0; all ranks get their results."""
    return Grader(
        reward,
        rank=dist.get_rank(),
        share=parallel.from_rank_zero_when_done,
        log=log,
        output=directory / "logs" / OUTPUT,
    )


def due(step: int, every: int) -> bool:
    """Return whether a periodic action is due after this step, counted from 0."""
    return every > 0 and (step + 1) % every == 0
