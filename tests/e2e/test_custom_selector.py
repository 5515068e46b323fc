"""The selector in docs/selection.md, as a reader would use it: tried, trained with, resumed."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_prepo.config import SelectionConfig
from megatron_prepo.run.ledger import read
from megatron_prepo.selection.user_class import TrialRun, check
from tests.e2e.laptop import REPOSITORY, SHORT, metrics, summary, train


@pytest.fixture
def method(tmp_path) -> str:
    """The first block of Python on the page, saved as `mine.py`."""
    page = (REPOSITORY / "docs" / "selection.md").read_text()
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    return f"{tmp_path}/mine.py:LatestPassRate"


def paid(directory: Path) -> list[tuple]:
    return [(e.step, e.prompt_id, e.sample, e.reward) for e in read(directory / "ledger.jsonl")]


def test_the_page_s_selector_passes_the_trial(method):
    config = SelectionConfig(method=method, num_candidates=24, num_selected=8)
    check(TrialRun(config, total_steps=20, seed=1, group_size=4), overlap=True)


@pytest.mark.slow
def test_the_page_s_selector_trains_two_ranks_and_resumes(tmp_path, method, capsys):
    mine = [*SHORT, f"selection.method={method}", "checkpoint.every=1"]
    assert train(tmp_path / "run", *mine) == 0, capsys.readouterr().err
    assert summary(tmp_path / "run")["method"] == "mine.py:LatestPassRate"
    assert [step["selection/groups_paid"] for step in metrics(tmp_path / "run")] == [8, 8]
    assert {e.selector for e in read(tmp_path / "run" / "ledger.jsonl")} == {
        "mine.py:LatestPassRate"
    }
    longer = ["train.total_steps=3", "selection.horizon=2", "optimizer.lr_decay_steps=2"]
    longer.append("optimizer.min_lr=1e-6")
    assert train(tmp_path / "once", *mine, *longer) == 0, capsys.readouterr().err
    assert train(tmp_path / "twice", *mine, *longer[1:]) == 0
    assert train(tmp_path / "twice", *mine, *longer) == 0, capsys.readouterr().err
    assert paid(tmp_path / "once") == paid(tmp_path / "twice")
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + "\n")
    assert train(tmp_path / "run", *mine, *longer) == 2
    assert "the content of selection.method=" in capsys.readouterr().err


def test_a_choice_that_cannot_be_rolled_out_ends_the_run_with_the_file_s_name(
    tmp_path, method, capsys
):
    """In step 7, after the trial's six; and a mistake that the trial finds starts no rank."""
    text = (tmp_path / "mine.py").read_text()
    broken = text.replace("return [i for", "return [99] if step == 1 else [i for")
    (tmp_path / "mine.py").write_text(broken)
    assert train(tmp_path / "run", *SHORT, f"selection.method={method}") == 2
    err = capsys.readouterr().err
    assert f"selection.method={method}: choose, in step 1, returned the position 99" in err
    assert not (tmp_path / "run").exists()
    late = text.replace("return [i for", "return [99] * 8 if step == 6 else [i for")
    (tmp_path / "mine.py").write_text(late)
    settings = [*SHORT, "train.total_steps=7", "eval.every=0", f"selection.method={method}"]
    assert train(tmp_path / "run", *settings, "rollout.max_new_tokens=4") == 2
    err = capsys.readouterr().err
    assert f"selection.method={method}: choose, in step 6, returned the position 99" in err
    assert len(metrics(tmp_path / "run")) == 6
    shutil.rmtree(tmp_path / "run")
