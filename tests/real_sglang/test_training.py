"""A reduced demo through SGLang: it learns, and two servers share the work."""

import pandas
import pytest

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
        assert step["mismatch/logprob_abs_max"] < 1e-4
    result = summary(directory)
    assert result["gain_ci95"][0] > 0.02
    ledger = pandas.read_json(directory / "ledger.jsonl", lines=True)
    assert len(ledger) == 16 * 32 * 8
    assert not ledger.duplicated(["step", "prompt_id", "sample"]).any()
    assert (ledger.weight_version == 2 * ledger.step).all() and not ledger.aborted.any()
    logs = [(directory / "logs" / f"sglang_{i}.log").read_text() for i in range(2)]
    share = [log.count("POST /generate") for log in logs]
    assert min(share) > 0.35 * sum(share), "both servers work"
