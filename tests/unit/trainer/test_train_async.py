"""The step ahead: which of its state is saved, and how it is resumed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rollout.engine import PendingRollouts
from megatron_prepo.run.rollout_journal import Journal
from megatron_prepo.run.stopwatch import Stopwatch
from megatron_prepo.selection import METHODS
from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.rounds import Choice
from megatron_prepo.train_async import Prefetcher
from megatron_prepo.trainer import stages
from tests.tiny_models import actor_config

PROMPTS = [Prompt(f"p{i}", "", "", tuple(range(3, 9 + i)), (0, 0)) for i in range(12)]


class Batches:
    """Four prompts per step, in order."""

    def __init__(self):
        self.position = 0

    def next(self):
        self.position += 4
        return [PROMPTS[i % 12] for i in range(self.position - 4, self.position)]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Engine:
    """One rollout per prompt; records which it has to generate, and fails after `comes_to`."""

    def __init__(self, weight_version):
        self.weight_version, self.generated, self.comes_to = weight_version, [], 99

    def start_generate(self, request):
        cached = request.cached
        missing = [p for p in request.prompts if (p.id, 0) not in cached]
        self.generated += [(p.id, request.seed) for p in missing]
        new = {(p.id, 0): Rollout(p, (7,), (-1.0,), "", True, self.weight_version) for p in missing}

        def wait():
            for n, (key, rollout) in enumerate(new.items()):
                if n == self.comes_to:
                    raise ConnectionError
                request.on_rollouts({key: rollout})
            return [({**cached, **new})[p.id, 0] for p in request.prompts], 1.5

        return PendingRollouts(wait)

    def generate(self, request):
        return self.start_generate(request).result()


@pytest.fixture
def job_of(monkeypatch, tmp_path):
    """Return a restarted job whose weights have this version.

    Perplexities follow from prompts and weights.
    """
    monkeypatch.setattr(stages.parallel, "assert_equal_on_all_ranks", lambda name, value: None)
    monkeypatch.setattr(stages, "score", score)

    def look_for(version, method="foresight"):
        selection = {"method": method, "num_candidates": 4, "num_selected": 2}
        config = actor_config("unused", selection=selection)
        return SimpleNamespace(
            config=config,
            actor=SimpleNamespace(updates=version),
            engine=Engine(version),
            run=SimpleNamespace(seconds=Stopwatch()),
            batches=Batches(),
            throughput=SimpleNamespace(scored=[]),
            journal=Journal(tmp_path / "journal", 0, share=lambda value: value),
            selector=METHODS[method](config.selection, total_steps=9, seed=1, pass_reward=1.0),
        )

    return look_for


def score(trainer, prompts, step):
    generator = torch.Generator().manual_seed(100 * trainer.actor.updates + step)
    ppl_P, entropy_P = torch.rand(2, len(prompts), generator=generator, dtype=torch.float64) + 1
    hidden_PD = torch.randn(len(prompts), 3, generator=generator, dtype=torch.float64)
    return Candidates(prompts, ppl_P, entropy_P, hidden_PD=hidden_PD)


def learn(job, ready):
    """Do what the loop does with a step's rollouts, as far as it concerns the selector."""
    rewards_KG = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    job.selector.observe(ready.choice.prompts, rewards_KG)


@pytest.mark.parametrize("method", ["prepo", "foresight", "mopps", "mapp", "dps", "vip"])
def test_a_step_ahead_goes_on_from_its_saved_state(job_of, method):
    """The old weights made the choice, the journal has its rollouts; nothing is learnt twice."""
    job = job_of(0, method)
    ahead = Prefetcher(job)
    ahead.start(0)
    learn(job, ahead.take(0))
    ahead.start(1)
    ahead.wait()
    saved = json.loads(json.dumps(ahead.state_dict()))

    again = job_of(1, method)  # the weights have moved on
    went_on = Prefetcher(again)
    went_on.load_state_dict(saved)
    assert json.loads(json.dumps(went_on.state_dict())) == saved
    one, other = ahead.take(1), went_on.take(1)
    assert (one.choice, one.weight_version) == (other.choice, other.weight_version)
    assert other.rollouts == one.rollouts and again.engine.generated == []
    for name in ("ppl_P", "entropy_P", "hidden_PD"):
        assert torch.equal(getattr(one.candidates, name), getattr(other.candidates, name))
    for each, ready in ((job, one), (again, other)):
        learn(each, ready)
    assert job.selector.state_dict() == again.selector.state_dict()
    assert job.batches.state_dict() == again.batches.state_dict()


def test_rollouts_that_never_came_are_generated_by_the_weights_of_the_day(job_of):
    """The engine failed while the previous step was learnt from, which is done and saved."""
    job = job_of(0)
    ahead = Prefetcher(job)
    ahead.start(1)
    job.engine.weight_version = 1
    saved = ahead.state_dict()
    again = job_of(2)
    went_on = Prefetcher(again)
    went_on.load_state_dict(saved)
    ready = went_on.take(1)
    assert again.engine.generated == [(p.id, "1/rollouts/1") for p in ready.choice.prompts]
    assert [rollout.weight_version for rollout in ready.rollouts] == [2, 2]
    assert ready.choice == ahead.pending.choice and ready.seconds == 1.5


@pytest.mark.parametrize("killed_again", [False, True])
def test_of_rollouts_that_came_in_part_the_rest_is_generated_by_the_weights_of_the_day(
    job_of, killed_again
):
    """No rollout is generated twice, however often the run stops."""
    job = job_of(0)
    ahead = Prefetcher(job)
    ahead.start(1)
    job.engine.comes_to = 1
    with pytest.raises(ConnectionError):
        ahead.wait()
    saved = ahead.state_dict()
    jobs = [job_of(2)]
    if killed_again:
        went_on = Prefetcher(jobs[0])
        went_on.load_state_dict(saved)
        went_on.wait()
        assert json.loads(json.dumps(went_on.state_dict())) == json.loads(json.dumps(saved))
        jobs.append(job_of(2))
    went_on = Prefetcher(jobs[-1])
    went_on.load_state_dict(saved)
    ready = went_on.take(1)
    first, second = (p.id for p in ready.choice.prompts)
    assert [r.weight_version for r in ready.rollouts] == [0, 2]
    assert [prompt for job in jobs for prompt, _ in job.engine.generated] == [second]
    assert job.engine.generated[0][0] == first


def test_a_request_has_as_many_rollouts_of_each_prompt_as_were_chosen(job_of, monkeypatch):
    job, requests = job_of(0, "vip"), []
    monkeypatch.setattr(job.selector, "group_sizes", lambda prompts, group_size: [9, 7])
    start = job.engine.start_generate
    job.engine.start_generate = lambda request: requests.append(request) or start(request)
    ahead = Prefetcher(job)
    ahead.start(0)
    [request] = requests
    assert request.samples_per_prompt == ahead.pending.choice.samples == [range(9), range(7)]


def test_what_is_generated_is_journalled_once(job_of):
    ahead = Prefetcher(job_of(3))
    ahead.start(5)
    assert job_of(3).journal.waiting == {}
    ahead.wait()
    ahead.wait()
    assert [path.name for path in ahead.trainer.journal.directory.iterdir()] == [
        "rollouts_5.0.jsonl"
    ]
    assert len(job_of(3).journal.waiting) == 2


def test_rollouts_are_on_disk_before_either_loop_has_them(job_of, monkeypatch):
    forced = []

    def flush(path: str, dir_fd: int) -> None:
        forced.append(Path(path).name)

    monkeypatch.setattr("megatron_prepo.run.rollout_journal.flush", flush)
    job = job_of(3)
    stages.roll_out(job, Choice([0, 1], PROMPTS[:2], [range(1)] * 2), "rollouts/4")
    assert forced == ["rollouts_4.0.jsonl", "journal"]
    forced.clear()
    ahead = Prefetcher(job)
    ahead.start(5)
    assert forced == []
    ahead.wait()
    assert forced == ["rollouts_5.0.jsonl", "journal"]


def test_without_a_step_ahead_the_state_is_that_of_now(job_of):
    job = job_of(0)
    ahead = Prefetcher(job)
    ahead.start(0)
    learn(job, ahead.take(0))
    state = ahead.state_dict()
    assert state["coming"] is None and state["batches"] == {"position": 4}
    assert state["selector"] == job.selector.state_dict()
    ahead.wait()  # for nothing
