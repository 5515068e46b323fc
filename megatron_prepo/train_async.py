"""The overlapped loop: the next step's rollouts are generated while this step's are learnt from.

    choose and start step n + 1  ->  learn from step n  ->  wait for step n + 1  ->  weight sync
                \\_____________ the servers generate _____________/

Prompts are chosen, and rollouts generated, by the weights before step n has been learnt from.  The
first two steps' are the initial weights', so from the second on rollouts are one step old when
their turn comes.  The loss corrects for that by the ratio of the actor's probabilities, right
before the update, to the engine's (`loss.importance`).  All else is as in `train.py`, stage by
stage and key by key; rewards are observed before the next prompts are chosen, here as there.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch

from megatron_prepo.actor import parallel
from megatron_prepo.config import Config
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rollout.sglang.engine import Generating
from megatron_prepo.selection.base import Candidates
from megatron_prepo.train import ledger_entries, look_at, sampling
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.policy_update import score_rollouts, step_record, update_policy
from megatron_prepo.trainer.setup import Job, due, set_up
from megatron_prepo.trainer.step_metrics import grading_metrics, selection_metrics


def train_overlapped(config: Config) -> dict:
    """`train` for `train.overlap=true`; collective, and the same summary."""
    job = set_up(config)
    config = job.config
    run, actor, selector, ahead = job.run, job.actor, job.selector, Ahead(job)
    checkpoints = job.go_on({"run": run, "ahead": ahead, "updates": job.updates})

    with checkpoints.saved_if_the_engine_fails():
        if run.before is None:
            run.before = job.evaluate("before", config.eval.samples_per_prompt)
        for step in run.steps():
            if step > 0 and due(step - 1, config.eval.every):
                job.evaluate("during", config.eval.samples_during)
            if ahead.coming is None:
                ahead.start(step)  # with nothing to learn from meanwhile
            ready = ahead.take()
            with run.seconds("rewards"):
                grades = job.grader.grade(ready.rollouts)
            paid = Groups().and_also(ready.chosen, ready.rollouts, grades)
            rewards_KG = paid.rewards_KG
            selector.observe(ready.selected, rewards_KG)
            of_selector = selector.metrics()
            if not run.is_last(step, to_be_recorded=len(ready.rollouts)):
                ahead.start(step + 1)

            with run.seconds("old_logprobs"):
                old = score_rollouts(config, actor, paid.rollouts)
            with run.seconds("update"):
                learner = job.updates.of_step(
                    step_record(config, step, ready.candidates, paid, old)
                )
                weight_N, losses = update_policy(config, learner, paid.rollouts, rewards_KG, old)
            try:
                ahead.wait()
                with run.seconds("weight_sync"):
                    job.sync()
            finally:  # the step is done, whether or not the engine lives to see it
                run.record(
                    step,
                    ledger_entries(
                        config, step, ready.candidates, paid, Groups(), paid, old, weight_N
                    ),
                    selection_metrics(ready.candidates, ready.chosen, rewards_KG)
                    | grading_metrics(grades)
                    | of_selector
                    | old.metrics(config.loss, weight_N, paid.rollouts)
                    | losses
                    | job.speed(ahead.take_scored(), paid)
                    | {"seconds/generation": ready.seconds},
                )
                checkpoints.mark()
            job.save_if_due(checkpoints, step)
        after = job.evaluate("after", config.eval.samples_per_prompt)
        with run.seconds("checkpoint"):
            checkpoints.finish()
    return job.finish(after)


@dataclass
class Coming:
    """A step whose prompts are chosen, and whose rollouts are on their way or there."""

    step: int
    candidates: Candidates
    chosen: list[int]
    weight_version: int
    """Of the weights that chose and, as far as the engine did not fail, generate."""
    under_way: Generating | None = None
    rollouts: list[Rollout] | None = None
    seconds: float = 0.0
    """How long they took; the seconds of the stage `rollouts` are those waited."""

    @property
    def selected(self) -> list[Prompt]:
        """The chosen prompts."""
        return [self.candidates.prompts[i] for i in self.chosen]

    @property
    def purpose(self) -> str:
        """Names its random numbers and its place in the journal."""
        return f"rollouts/{self.step}"


class Ahead:
    """Chooses and generates a step ahead; every rank calls the same methods, all collective.

    As a part of a checkpoint it holds prompts and selector as they were before the coming step was
    chosen, and the perplexities that it was chosen by, which no weights can give again.  Rollouts
    are in the journal; should some not have come, the weights of the day generate them.
    """

    def __init__(self, job: Job):
        self.job = job
        self.coming: Coming | None = None
        self.scored: list[Candidates] = []
        """Candidates scored since the last step was recorded."""

    def start(self, step: int) -> None:
        """Score the candidates, choose, and let the servers generate."""
        job = self.job
        self._before = self._position()
        with job.run.seconds("perplexity"):
            prompts = job.batches.next()
            candidates = look_at(job.config, job.actor, job.engine, job.selector, prompts, step)
        self.scored.append(candidates)
        self._choose(step, candidates, job.engine.weight_version)
        self._generate()

    def wait(self) -> None:
        """Until the rollouts of the coming step, if there is one, are there."""
        if self.coming is None:
            return
        with self.job.run.seconds("rollouts"):
            if self.coming.rollouts is None and self.coming.under_way is None:
                self._generate()  # the run was interrupted
            under_way, self.coming.under_way = self.coming.under_way, None
            if under_way is not None:
                self.coming.rollouts = under_way.result()
                self.coming.seconds = under_way.seconds
                self.job.journal.force()

    def take(self) -> Coming:
        """The coming step, with its rollouts, which is this step from now on."""
        self.wait()
        ready, self.coming = self.coming, None
        return ready

    def take_scored(self) -> list[Candidates]:
        """Return the candidates whose scores took this step's seconds of `perplexity`."""
        scored, self.scored = self.scored, []
        return scored

    def state_dict(self) -> dict:
        """Plain JSON."""
        if self.coming is None:
            return self._position() | {"coming": None}
        candidates = self.coming.candidates
        scores = {
            name: None if value_P is None else value_P.tolist()
            for name, value_P in vars(candidates).items()
            if name != "prompts"
        }
        coming = {"step": self.coming.step, "weight_version": self.coming.weight_version}
        return self._before | {"coming": coming | {"scores": scores}}

    def load_state_dict(self, state: dict) -> None:
        """Choose the coming step again, as it was chosen; its rollouts are looked for in `wait`."""
        self.job.batches.load_state_dict(state["batches"])
        self.job.selector.load_state_dict(state["selector"])
        if (coming := state["coming"]) is None:
            return
        self._before = self._position()
        scores = {
            name: None if values is None else torch.tensor(values, dtype=torch.float64)
            for name, values in coming["scores"].items()
        }
        candidates = Candidates(self.job.batches.next(), **scores)
        self._choose(coming["step"], candidates, coming["weight_version"])

    def _choose(self, step: int, candidates: Candidates, weight_version: int) -> None:
        chosen = self.job.selector.choose(candidates, step)
        parallel.assert_equal_on_all_ranks("the selection", chosen)
        self.coming = Coming(step, candidates, chosen, weight_version)

    def _generate(self) -> None:
        coming, engine, journal = self.coming, self.job.engine, self.job.journal
        paid = {}
        # those of the day: after a failure they have generated the rest
        for version in (engine.weight_version, coming.weight_version):
            paid |= journal.find(coming.purpose, version, coming.selected)
        coming.under_way = engine.start_generate(
            coming.selected,
            **sampling(self.job.config, coming.purpose),
            paid=paid,
            keep=partial(journal.add, coming.purpose),
        )

    def _position(self) -> dict:
        batches, selector = self.job.batches, self.job.selector
        return deepcopy({"batches": batches.state_dict(), "selector": selector.state_dict()})
