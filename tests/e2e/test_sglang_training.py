"""The training loop with its own servers, which are fakes: `tests/real_sglang` has real ones.

No model generates the completions, so nothing is learnt; the test is that ranks, servers, sync,
ledger and clean-up work together.
"""

import sys

import fake_sglang_package
import pandas

from tests.e2e.laptop import SHORT, summary, train


def test_two_ranks_train_on_what_servers_of_the_run_generate(tmp_path, monkeypatch):
    pids = fake_sglang_package.install(tmp_path / "package", monkeypatch)
    directory = tmp_path / "run"
    code = train(
        directory,
        *SHORT,
        "rollout.engine=sglang",
        f"servers.python={sys.executable}",
        "servers.count=2",
        "weight_sync.verify=never",
        "parallel.tensor=2",
    )
    assert code == 0
    ledger = pandas.read_json(directory / "ledger.jsonl", lines=True)
    assert len(ledger) == summary(directory)["rollouts"] == 2 * 8 * 4
    assert not ledger.duplicated(["step", "prompt_id", "sample"]).any()
    assert (ledger.weight_version == 2 * ledger.step).all()
    assert (directory / "logs" / "sglang_1.log").is_file()
    fake_sglang_package.wait_until_gone(fake_sglang_package.processes(pids, servers=2))


def test_without_sglang_nothing_is_started(capsys, tmp_path):
    code = train(tmp_path / "run", *SHORT, "rollout.engine=sglang")
    assert code == 2
    assert "has no SGLang" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_server_that_does_not_start_ends_the_run_with_its_own_words(
    capsys, tmp_path, monkeypatch
):
    fake_sglang_package.install(tmp_path / "package", monkeypatch)
    monkeypatch.setenv("FAKE_FAILS", "1")
    engine = ["rollout.engine=sglang", f"servers.python={sys.executable}"]
    assert train(tmp_path / "run", *SHORT, *engine, "parallel.tensor=2") == 1
    said = capsys.readouterr().err
    assert "the engine failed before training began" in said and "Traceback" not in said
    assert "the fake cannot find its model" in said
