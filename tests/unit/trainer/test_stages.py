"""The stages of a step: what they do when a step does not go as planned, and when to evaluate."""

from types import SimpleNamespace

import pytest

from megatron_prepo.records import Rollout
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.rollout.engine import EngineError
from megatron_prepo.run.rollout_journal import Journal
from megatron_prepo.run.stopwatch import Stopwatch
from megatron_prepo.selection.base import Candidates
from megatron_prepo.trainer import stages
from megatron_prepo.trainer.groups import Groups
from megatron_prepo.trainer.setup import Trainer
from tests.tiny_models import actor_config
from tests.unit.selection.selectors import passes, prompts, selector


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(stages.parallel, "assert_equal_on_all_ranks", lambda name, value: None)


@pytest.mark.parametrize(("method", "rounds"), [("random", 1), ("dapo", 3)])
def test_a_step_selects_once_or_until_a_method_that_refills_has_done(method, rounds):
    """There are 6 candidates, none of which has an advantage, K = 2."""
    chooser, candidates = selector(method, candidates=6), Candidates(prompts(6))
    config = actor_config("unused", selection={"method": method, "num_candidates": 6})
    trainer, chosen = SimpleNamespace(selector=chooser, config=config), []
    for choice in stages.select(trainer, candidates, step=0):
        chosen.append(choice.positions)
        chooser.observe(choice.prompts, passes(*[0] * len(choice.prompts)))
    assert [len(positions) for positions in chosen] == [2] * rounds
    assert len({p for positions in chosen for p in positions}) == 2 * rounds


def trainer_that_records(monkeypatch) -> tuple[SimpleNamespace, list]:
    """Return a trainer and its records: step, entries and metrics."""
    records = []
    monkeypatch.setattr(stages, "ledger_entries", lambda *_: ["entry"])
    monkeypatch.setattr(stages, "selection_metrics", lambda *_: {"reward/mean": 0.5})
    monkeypatch.setattr(stages, "grading_metrics", lambda *_: {})
    monkeypatch.setattr(Groups, "rewards", None)
    trainer = SimpleNamespace(
        config=actor_config("unused"),
        run=SimpleNamespace(record=lambda *record: records.append(record)),
        checkpoints=SimpleNamespace(mark=lambda: records.append("mark")),
        speed=lambda batch: {"speed/update_tokens": 1.0},
    )
    return trainer, records


def test_a_step_is_recorded_after_the_sync_even_if_that_fails(monkeypatch):
    trainer, records = trainer_that_records(monkeypatch)
    batch = SimpleNamespace(metrics=lambda settings: {"entropy/mean": 1.0})
    arguments = (trainer, 3, None, Groups(), Groups(), batch, {"loss/policy": 2.0})
    metrics = {
        "reward/mean": 0.5,
        "entropy/mean": 1.0,
        "loss/policy": 2.0,
        "speed/update_tokens": 1.0,
    }
    with stages.recorded(*arguments):
        assert records == []
    assert records == [(3, ["entry"], metrics), "mark"]
    with pytest.raises(EngineError), stages.recorded(*arguments):
        raise EngineError("all servers are gone")
    assert records[2:] == records[:2]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_evaluations_are_before_between_and_after_the_steps(resumed, first):
    """Every 2 of 4 steps; a resumed run has its first evaluation already, if it makes one."""
    story = []
    settings = SimpleNamespace(before=first, every=2, samples_per_prompt=4, samples_during=1)
    start = 2 if resumed else 0
    run = SimpleNamespace(
        before="before" if resumed and first else None,
        num_steps=start,
        is_evaluated=False,
        save_first_evaluation=lambda: story.append("kept"),
        steps=lambda: iter(range(start, 4)),
    )
    trainer = SimpleNamespace(
        config=SimpleNamespace(eval=settings),
        run=run,
        evaluate=lambda when, samples: story.append((when, samples)) or when,
        _keep_if_best=lambda: story.append("best"),
    )
    for step in Trainer.steps(trainer):
        story.append(step)
    before = [] if resumed else [*[("before", 4), "kept"] * first, 0, 1]
    assert story == [*before, ("during", 1), "best", 2, 3, ("after", 4), "best"]
    assert (run.before, trainer.after) == ("before" if first else None, "after")


class Answers:
    """Prompts p0 and p2 pass with their odd samples; a server that stops after `left` rollouts."""

    weight_version = 4

    def __init__(self, left: int):
        self.left, self.generated = left, []

    def generate(self, request):
        rollouts = dict(request.cached)
        for prompt, n in request.samples():
            if (prompt.id, n) in rollouts:
                continue
            if not self.left:
                raise EngineError("all servers are gone")
            self.left -= 1
            text = str(int(prompt.id in ("p0", "p2") and n % 2))
            rollouts[prompt.id, n] = Rollout(prompt, (n + 7,), (-1.0,), text, True, 4)
            request.on_rollouts({(prompt.id, n): rollouts[prompt.id, n]})
            self.generated.append((prompt.id, n))
        return [rollouts[prompt.id, n] for prompt, n in request.samples()]


def refilled_step(directory, left: int) -> tuple[Answers, Groups]:
    """Return the engine and the groups of a step of Pilot-Commit, K = 2 of 6, G = 8."""
    selection = {"method": "pilot_commit", "num_candidates": 6}
    config = actor_config("unused", selection=selection, rollout={"samples_per_prompt": 8})
    trainer = SimpleNamespace(
        config=config,
        selector=selector("pilot_commit", candidates=6),
        engine=Answers(left),
        journal=Journal(directory / "journal", 0, share=lambda value: value),
        run=SimpleNamespace(seconds=Stopwatch()),
        grader=SimpleNamespace(grade=lambda rollouts: [Grade(float(r.text)) for r in rollouts]),
    )
    groups, candidates = Groups(), Candidates(prompts(6))
    try:
        for choice in stages.select(trainer, candidates, step=0):
            rollouts = stages.roll_out(trainer, choice, "rollouts/0")
            grades = stages.grade(trainer, choice, rollouts)
            groups = groups.extend(choice.positions, rollouts, grades, choice.sizes)
    except EngineError:
        assert trainer.engine.left == 0
    return trainer.engine, groups


@pytest.mark.parametrize("left", range(0, 16, 3))
def test_interrupted_in_any_round_of_a_refilled_step_it_generates_the_rest(tmp_path, left):
    """Each rollout once, also those of a later round that the journal has already."""
    (tmp_path / "whole").mkdir()
    engine, whole = refilled_step(tmp_path / "whole", left=99)
    assert sum(whole.sizes) == len(engine.generated) == 16 and len(set(whole.sizes)) > 1
    assert len(set(engine.generated)) == 16
    first, _ = refilled_step(tmp_path, left)
    second, resumed = refilled_step(tmp_path, left=99)
    assert (len(first.generated), len(second.generated)) == (left, 16 - left)
    assert resumed == whole
