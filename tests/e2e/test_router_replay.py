"""Rollouts that include their routing: a run that is killed and resumed, a dump replayed."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny_models

from megatron_prepo.cli import main
from megatron_prepo.debug import dump
from megatron_prepo.rollout.weight_sync import TOLERANCE
from tests.e2e.laptop import LAPTOP, SHORT, made_by_ranks, metrics, train
from tests.e2e.test_resume import assert_equal, start, wait_for_steps

REWARD = "def even(completion, answer):\n    return 1.0 - sum(completion.encode()) % 2\n"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """Settings of a model of 8 experts, a reward that random weights get, too, and no checkpoint
    before the end."""
    directory = tmp_path_factory.mktemp("experts")
    hf = Path(tiny_models.save(tiny_models.qwen3_moe(), directory / "hf"))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(LAPTOP / "base" / name, hf)
    (directory / "reward.py").write_text(REWARD)
    return [
        *SHORT,
        f"model.hf={hf}",
        f"reward.function={directory / 'reward.py'}:even",
        "rollout.router_replay=true",
        "rollout.max_new_tokens=24",
        "parallel.tensor=1",
        "eval.every=0",
        "optimizer.lr=1e-3",
        "checkpoint.every=0",
        "debug.dump_steps=[1]",
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, settings) -> Path:
    return made_by_ranks(tmp_path_factory.mktemp("undisturbed") / "run", *settings)


def test_the_actor_follows_the_embedded_engine(undisturbed):
    for step in metrics(undisturbed):
        assert step["mismatch/logprob_abs/mean"] < TOLERANCE["float32"]
        assert step["loss/grad_norm"] > 0
        assert 0 <= step["mismatch/routed_differently"] < 0.01


def test_a_killed_run_goes_on_with_the_routing_of_what_it_has_paid_for(
    tmp_path, settings, undisturbed
):
    """The first step's rollouts are in the journal, and nothing else remains of the step."""
    process = start(tmp_path, *settings, "texts.rollouts=0", "texts.evaluations=0")
    wait_for_steps(1, tmp_path, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert (tmp_path / "journal" / "rollouts_0.0.jsonl").is_file()
    assert train(tmp_path, *settings) == 0
    assert_equal(undisturbed, tmp_path, texts=False)


def test_a_dump_has_the_routing_and_is_replayed_with_it_in_another_layout(undisturbed):
    dumped = undisturbed / "dumps" / "step_0001"
    of = dump.read(dumped)
    for rollout, sequence in zip(of.rollouts, (s.sequence for s in of.batch), strict=True):
        assert len(rollout.routing) == (len(sequence.tokens) - 1) * 4 * 2
        assert rollout.routing == sequence.routing
    layout = ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch_tokens=256"]
    assert main(["replay", str(dumped), *layout]) == 0
