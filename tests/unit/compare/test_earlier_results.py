"""Records of earlier versions count as done: all that are committed."""

import json
import shlex
from pathlib import Path

import pytest

import tiny_base
from megatron_prepo import config as configuration
from megatron_prepo.cli import main
from megatron_prepo.compare import planned_run, record, runner
from megatron_prepo.errors import UserError
from tests.tiny_tasks import load

REPOSITORY = Path(__file__).resolve().parents[3]
RESULTS = REPOSITORY / "benchmarks" / "results" / "compare"


@pytest.mark.parametrize(
    "name", ["lists", "lists_scarce", "story_sums", "story_sums_fresh", "traces"]
)
def test_the_commands_of_the_committed_results_run_nothing(name, tmp_path, monkeypatch, capsys):
    """The commands are those in the records, `--dir` and `--results` apart."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setitem(runner.compare.__kwdefaults__, "train", ["no", "such", "command"])
    committed = (RESULTS / f"{name}.jsonl").read_bytes()
    copy = tmp_path / "results.jsonl"
    copy.write_bytes(committed)
    places = ["--dir", str(tmp_path / "runs"), "--results", str(copy)]
    if name == "story_sums_fresh":
        task = load("laptop")
        tiny_base.write_fresh_prompts(task, tmp_path, task.seed, 12800)
        places.append(f"data.train={tmp_path / 'train.jsonl'}")
    if name == "lists_scarce":
        task = load("lists")
        tiny_base.write_scarce_prompts(task, tmp_path, task.seed, tiny_base.NUM_SCARCE_PROMPTS)
        places.append(f"data.train={tmp_path / 'train.jsonl'}")
    records = [json.loads(line) for line in committed.splitlines()]
    for command in {made["command"] for made in records}:
        assert main([*shlex.split(command)[1:], *places]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(records)
    assert copy.read_bytes() == committed and not (tmp_path / "runs").exists()


def differences(before, **now):
    now = {name.replace("__", "."): value for name, value in now.items()}
    return record.differences(before, now)


def test_only_what_changes_results_is_compared():
    before = {"train.micro_batch_size": 32, "rollout.max_new_tokens": 52, "optimizer.lr": 1e-4}
    now = {"train__micro_batch_tokens": 4096, "rollout__max_new_tokens": 52}
    assert differences(before, **now, optimizer__lr=1e-4) == []
    assert differences(before, **now) == ["optimizer.lr: 0.0001 -> (default)"]


def test_a_value_that_is_a_default_today_is_no_difference():
    """2 is the default of `loss.importance_high`, and records have no defaults."""
    before = {"loss.importance_cap": 2.0}
    assert differences(before, loss__importance="truncated") == []
    assert differences(before) == ["loss.importance: truncated -> (default)"]


def test_a_record_without_an_equivalent_is_refused():
    with pytest.raises(
        UserError,
        match=r"^r\.jsonl holds a run random/1 that cannot be compared: "
        r"setting loss\.importance_cap=0\.5 .*another --dir and --name$",
    ):
        planned_run.refuse_other_settings(
            {"loss.importance_cap": 0.5}, {}, "random/1", "r.jsonl holds"
        )


def test_a_list_in_the_settings_is_the_same_in_a_record():
    """A record is read from JSON, which has no tuples."""
    path = REPOSITORY / "examples" / "laptop" / "compare.yaml"
    settings = record.settings(configuration.load(path, ["debug.dump_steps=[1,2]"]))
    assert settings["debug.dump_steps"] == [1, 2]
    assert record.differences(json.loads(json.dumps(settings)), settings) == []


def test_settings_of_an_earlier_default_that_change_no_result_do_not_differ():
    """One server was the default, and records hold when a run saved."""
    before = {"servers.count": 1, "checkpoint.every": 5, "checkpoint.keep_last": 1, "run.dir": "a"}
    assert record.differences(before, {}) == []
    assert record.differences(before | {"train.seed": 2}, {}) == ["train.seed: 2 -> (default)"]
