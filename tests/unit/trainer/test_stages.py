"""The stages of a step: what they do when a step does not go as planned, and when to evaluate."""

from types import SimpleNamespace

import pytest

from megatron_prepo.rollout.engine import EngineError
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
