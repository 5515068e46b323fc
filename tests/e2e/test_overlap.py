"""The overlapped loop with its own, fake servers: what overlap shifts, and what it does not.

Without a learning rate no weights ever change, so that who generated a rollout makes no difference:
the loops must then generate the same rollouts, and compute the same from them.
"""

import json
import sys
from itertools import pairwise

import fake_sglang_package
import pandas
import pytest
from fake_sglang import FakeSGLang

from megatron_prepo.cli import main
from tests.e2e.laptop import FILES, LAPTOP, SHORT, made_by_ranks, metrics, summary, train

STEPS = 4
SETTINGS = [
    *SHORT,
    f"train.total_steps={STEPS}",
    "rollout.engine=sglang",
    f"servers.python={sys.executable}",
    "weight_sync.verify=never",
    "parallel.tensor=1",
    "loss.importance=truncated",
]
SHIFTED = {"weight_version", "staleness"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of both loops, by name; a completion takes the fake a second."""
    directory = tmp_path_factory.mktemp("overlap")
    with pytest.MonkeyPatch.context() as patch:
        fake_sglang_package.install(directory / "package", patch)
        patch.setenv("FAKE_SECONDS", "1.0")
        settings = [*SETTINGS, "optimizer.lr=0", "eval.every=2"]
        made_by_ranks(directory / "in turn", *settings)
        assert train(directory / "overlapped", *settings, "train.overlap=true") == 0
    return {name: directory / name for name in ("in turn", "overlapped")}


def ledger(directory) -> pandas.DataFrame:
    return pandas.read_json(directory / "ledger.jsonl", lines=True)


def test_the_same_rollouts_by_weights_that_are_a_step_older(runs):
    """Step s, of two updates, learns from rollouts by the weights that step s - 1 began with."""
    in_turn, overlapped = (ledger(directory) for directory in runs.values())
    same = [name for name in in_turn.columns if name not in SHIFTED]
    pandas.testing.assert_frame_equal(in_turn[same], overlapped[same])
    assert (in_turn.weight_version == 2 * in_turn.step).all() and (in_turn.staleness == 0).all()
    assert (overlapped.weight_version == 2 * (overlapped.step - 1).clip(lower=0)).all()
    assert (overlapped.staleness == 2 * overlapped.step.clip(upper=1)).all()
    assert len(overlapped) == STEPS * 8 * 4 == summary(runs["overlapped"])["rollouts"]


def test_the_same_metrics_under_the_same_keys(runs):
    for one, other in zip(*(metrics(directory) for directory in runs.values()), strict=True):
        assert other.keys() - one.keys() == {"seconds/generation"}
        for key in one.keys() - {"rollout/staleness"}:
            if not key.startswith(("seconds/", "speed/")):
                assert other[key] == one[key], key
    assert [step["rollout/staleness"] for step in metrics(runs["overlapped"])] == [0, 2, 2, 2]


def test_evaluations_see_the_same_weights(runs):
    evaluations = [
        [json.loads(line) for line in (directory / "evaluations.jsonl").read_text().splitlines()]
        for directory in runs.values()
    ]
    for one, other in zip(*evaluations, strict=True):
        assert {**one, "seconds": None} == {**other, "seconds": None}
    assert [evaluation["step"] for evaluation in evaluations[0]] == [0, 2, 4]


def test_generation_is_waited_for_less_long_than_it_takes(runs):
    """Waiting is shorter by the time that the previous step trains; the sequential loop is the
    control."""
    steps = metrics(runs["overlapped"])
    for step, coming in pairwise(steps[1:]):
        trains = step["seconds/old_logprobs"] + step["seconds/update"]
        generates = coming["seconds/generation"]
        assert generates >= 1.0
        assert step["seconds/rollouts"] < generates - 0.5 * min(trains, generates)
    for step in metrics(runs["in turn"]):
        assert step["seconds/rollouts"] >= 1.0


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    """The rollouts of the next step are in the journal, its choice in the checkpoint."""
    fake_sglang_package.install(tmp_path / "package", monkeypatch)
    settings = [*FILES, *SETTINGS, "train.overlap=true", "checkpoint.every=1", "eval.every=2"]
    config, out = str(LAPTOP / "prepo.yaml"), str(tmp_path / "prove")
    code = main(["resume", "--prove", config, "--dir", out, "--steps", "2", "2", *settings])
    assert code == 0, capsys.readouterr().out


@pytest.mark.slow
def test_when_the_engine_fails_the_step_that_trained_is_saved_and_the_run_goes_on(tmp_path):
    """All servers are gone while step 1 is generated and step 0 is learnt from."""
    directory = tmp_path / "run"
    with FakeSGLang() as fake:
        fake.fault = lambda path, body: "die" if len(fake.requests) > 8 + 32 + 10 else None
        settings = [*SETTINGS, "train.overlap=true", f"servers.urls=[{fake.url}]"]
        settings += ["servers.connect_seconds=60", "servers.request_seconds=60"]
        assert train(directory, *settings) == 1
        assert len(ledger(directory)) == 32 and len(metrics(directory)) == 1
        fake.restart()
        assert train(directory, *settings) == 0
    whole = ledger(directory)
    assert len(whole) == STEPS * 32 and not whole.duplicated(["step", "prompt_id", "sample"]).any()
    # the finished rollouts of step 1 were kept, and the current weights generated the rest
    versions = [whole.weight_version[whole.step == step].value_counts() for step in range(STEPS)]
    kept = versions[1].get(0)
    assert [dict(v) for v in versions] == [{0: 32}, {0: kept, 2: 32 - kept}, {2: 32}, {4: 32}]
    assert 0 < kept <= 10
    assert (whole.staleness == 2 * whole.step - whole.weight_version).all()
    assert [step["rollout/staleness"] for step in metrics(directory)] == [0, 2, 2, 2]
