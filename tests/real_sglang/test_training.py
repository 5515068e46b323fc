"""A reduced demo through SGLang: it learns, and two servers share the work."""

import pandas
import pytest

from megatron_prepo.rollout.weight_sync import TOLERANCE
from tests.e2e.laptop import metrics, summary, train


@pytest.mark.slow
def test_it_learns(sglang_python, tmp_path):
    directory = tmp_path / "run"
    code = train(
        directory,
        "rollout.engine=sglang",
        f"servers.python={sglang_python}",
        "servers.count=2",
        "train.total_steps=16",
        "eval.every=0",
        "weight_sync.verify=always",
    )
    assert code == 0
    for step in metrics(directory):
        assert step["mismatch/logprob_abs/mean"] < TOLERANCE["float32"]
    result = summary(directory)
    assert result["gain_ci95"][0] > 0.02
    ledger = pandas.read_json(directory / "ledger.jsonl", lines=True)
    assert len(ledger) == 16 * 32 * 8
    assert not ledger.duplicated(["step", "prompt_id", "sample"]).any()
    assert (ledger.weight_version == 2 * ledger.step).all() and not ledger.aborted.any()
    logs = [(directory / "logs" / f"sglang_{i}.log").read_text() for i in range(2)]
    share = [log.count("POST /generate") for log in logs]
    assert min(share) > 0.35 * sum(share), "both servers work"


@pytest.mark.slow
def test_it_learns_overlapped_and_from_the_servers_perplexities(sglang_python, tmp_path):
    """Rollouts are a step old, with importance correction; servers choose as the actor would."""
    directory = tmp_path / "run"
    code = train(
        directory,
        "rollout.engine=sglang",
        f"servers.python={sglang_python}",
        "train.overlap=true",
        "loss.importance=truncated",
        "selection.ppl_from=engine",
        "train.total_steps=16",
        "eval.every=4",
        "eval.samples_during=1",
    )
    assert code == 0
    steps = metrics(directory)
    assert [step["rollout/staleness"] for step in steps] == [0, *[2] * 15]
    for step in steps[::4]:
        assert step.get("ppl/engine_actor_spearman", 1.0) > 0.999
    assert steps[0]["ppl/engine_actor_relative/max"] < TOLERANCE["float32"]
    # a step's weights apart, which float32 alone is not
    assert all(TOLERANCE["float32"] < step["mismatch/logprob_abs/mean"] < 0.1 for step in steps[2:])
    assert all(step["importance/truncated_share"] < 0.05 for step in steps)
    assert summary(directory)["gain_ci95"][0] > 0.02
    waited = sum(step["seconds/rollouts"] for step in steps[1:])
    assert waited < sum(step["seconds/generation"] for step in steps[1:])
    ledger = pandas.read_json(directory / "ledger.jsonl", lines=True)
    assert len(ledger) == 16 * 32 * 8
    assert (ledger.weight_version == 2 * (ledger.step - 1).clip(lower=0)).all()
