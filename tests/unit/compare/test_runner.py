"""`megatron-prepo compare` with a training command that takes milliseconds."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rounding import approx

from megatron_prepo import config as configuration
from megatron_prepo.cli import main
from megatron_prepo.compare import runner as comparing
from megatron_prepo.compare.arms import ARMS
from megatron_prepo.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
FAKE = [sys.executable, str(REPOSITORY / "tests" / "fake_train.py")]


@pytest.fixture
def config_path(tmp_path):
    for name in ("train.jsonl", "eval.jsonl", "model"):
        (tmp_path / name).write_text(name)
    tree = {
        "run": {"dir": "runs/none"},
        "model": {"hf": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "selection": {"num_candidates": 20, "num_selected": 4},
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 8},
        "train": {"total_steps": 3},
        "eval": {"every": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def run_compare(config_path, tmp_path):
    def run(methods="random,prepo", seeds="1-2", *overrides, **options):
        fakes = {"train": FAKE, "check": lambda config: None}
        options = {"directory": tmp_path / "runs", "jobs": 2, **fakes, **options}
        return comparing.compare(config_path, methods, seeds, overrides=overrides, **options)

    return run


def started(tmp_path: Path) -> list[str]:
    """Return the runs that the fake was asked for, in the order in which they started."""
    path = tmp_path / "started"
    return path.read_text().split() if path.exists() else []


@pytest.fixture(autouse=True)
def log_of_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_STARTED", str(tmp_path / "started"))


def test_every_arm_at_every_seed(run_compare, tmp_path):
    records = run_compare(jobs=1)
    expected = ["random/1", "prepo/1", "random/2", "prepo/2"]
    assert started(tmp_path) == expected, "seeds must be outermost"
    assert [f"{r['arm']}/{r['seed']}" for r in records] == expected
    lines = (tmp_path / "runs" / "results.jsonl").read_text().splitlines()
    assert [json.loads(x)["arm"] for x in lines] == ["random", "random", "prepo", "prepo"]
    assert all(r["comparison"] == "runs" for r in records)


def test_equal_terms(run_compare, tmp_path):
    run_compare("random,prepo,reverse", "4", "optimizer.lr=0.5")
    trees = [
        configuration.to_tree(configuration.from_tree(yaml.safe_load(path.read_text())))
        for path in sorted((tmp_path / "runs").glob("*/4/config.yaml"))
    ]
    assert len(trees) == 3
    for tree in trees:
        assert tree["train"]["rollout_budget"] == 3 * 4 * 2
        assert tree["train"]["seed"] == 4 and tree["optimizer"]["lr"] == 0.5
        for section in ("run", "selection", "weighting"):
            del tree[section]
    assert trees[0] == trees[1] == trees[2]


def test_each_known_arm_is_a_configuration(config_path, tmp_path):
    runs = comparing.plan(config_path, ARMS, [1], tmp_path, ["rollout.samples_per_prompt=8"])
    assert {"random", "prepo", "ppl_only", "clamp", "oracle", "dapo"} <= {r.arm for r in runs}
    of = {run.arm: run.config for run in runs}
    assert of["random"].weighting.method == "none" and of["random"].selection.method == "random"
    assert of["clamp"].weighting.clamp == 1.5 and of["reverse"].selection.direction == "high-to-low"


def test_the_oracles_probes_come_on_top(config_path, tmp_path):
    """The oracle counts 3 steps of 4 groups of 2, and of 20 probed candidates."""
    (run,) = comparing.plan(config_path, {"oracle": ARMS["oracle"]}, [1], tmp_path, [])
    assert run.config.train.rollout_budget == 3 * (4 + 20) * 2
    given = ["train.rollout_budget=16"]
    (run,) = comparing.plan(config_path, {"oracle": ARMS["oracle"]}, [1], tmp_path, given)
    assert run.config.train.rollout_budget == 16 / 8 * 48


def test_a_second_call_runs_nothing(run_compare, tmp_path):
    first = run_compare()
    assert len(started(tmp_path)) == 4
    assert run_compare() == first
    assert len(started(tmp_path)) == 4


def test_a_run_without_its_record_is_read_again(run_compare, tmp_path):
    first = run_compare()
    (tmp_path / "runs" / "results.jsonl").unlink()
    assert run_compare() == first
    assert len(started(tmp_path)) == 4


def test_a_record_without_its_run_is_enough(run_compare, tmp_path):
    """This is the case in a fresh clone, which has the committed results."""
    first = run_compare(results=tmp_path / "results.jsonl")
    second = run_compare(
        results=tmp_path / "results.jsonl", directory=tmp_path / "elsewhere", name="runs"
    )
    assert second == first and len(started(tmp_path)) == 4


def test_other_records_are_kept(run_compare, tmp_path):
    run_compare("random", "1")
    run_compare("prepo", "2")
    run_compare("random", "1", name="another", directory=tmp_path / "other")
    results = tmp_path / "runs" / "results.jsonl"
    run_compare("random", "1", name="another", directory=tmp_path / "other", results=results)
    records = map(json.loads, results.read_text().splitlines())
    keys = [(r["comparison"], r["arm"], r["seed"]) for r in records]
    assert keys == [("runs", "random", 1), ("runs", "prepo", 2), ("another", "random", 1)]


def test_a_half_finished_run_starts_anew(run_compare, tmp_path):
    run_compare()
    (tmp_path / "runs" / "prepo" / "1" / "summary.json").unlink()
    (tmp_path / "runs" / "results.jsonl").unlink()
    run_compare()
    assert started(tmp_path)[4:] == ["prepo/1"]


@pytest.mark.parametrize("keep_runs", [True, False])
def test_another_configuration_is_refused(run_compare, tmp_path, keep_runs):
    run_compare("random", "1")
    if keep_runs:
        (tmp_path / "runs" / "results.jsonl").unlink()
    with pytest.raises(UserError, match=r"optimizer\.lr: \(default\) -> 0\.5.*another --dir"):
        run_compare("random", "1", "optimizer.lr=0.5")
    assert len(started(tmp_path)) == 1


def test_other_data_under_the_same_name_is_refused(run_compare, tmp_path):
    run_compare("random", "1")
    comparing.run_record._content_hash.cache_clear()
    (tmp_path / "train.jsonl").write_text("changed")
    with pytest.raises(UserError, match=r"data\.train: sha256"):
        run_compare("random", "1")


def test_the_same_data_elsewhere_is_the_same(config_path, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_text((tmp_path / "train.jsonl").read_text())
    one = configuration.load(config_path)
    other = configuration.load(config_path, [f"data.train={moved}", "run.dir=elsewhere"])
    assert comparing.run_record.settings(one) == comparing.run_record.settings(other)


def test_a_failing_run_stops_no_other(run_compare, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "prepo/1")
    with pytest.raises(comparing.RunsFailed) as failed:
        run_compare()
    assert "1 of 4 runs failed" in str(failed.value)
    assert "prepo/1: exit code 3" in str(failed.value) and "the fake gives up" in str(failed.value)
    assert len(started(tmp_path)) == 4
    assert len((tmp_path / "runs" / "results.jsonl").read_text().splitlines()) == 3
    monkeypatch.delenv("FAKE_FAILS")
    assert len(run_compare()) == 4
    assert started(tmp_path)[4:] == ["prepo/1"]


def test_not_more_than_jobs_at_once(run_compare, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    began = time.monotonic()
    run_compare("random,prepo,reverse", "1", jobs=3)
    at_once = time.monotonic() - began
    run_compare("random,prepo,reverse", "2", jobs=1)
    assert time.monotonic() - began - at_once > 0.9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_runs(config_path, tmp_path, number):
    """The fake starts a child, as a run starts its ranks; the child must be stopped too."""
    code = (
        "import sys; from megatron_prepo import cli; from megatron_prepo.compare import runner; "
        f"fakes = dict(train={FAKE!r}, check=print); "
        "runner.compare.__kwdefaults__.update(fakes); sys.exit(cli.main(sys.argv[1:]))"
    )
    command = ["compare", str(config_path), "--methods=random,prepo", "--seeds=1", "--jobs=2"]
    environment = {**os.environ, "FAKE_SECONDS": "60", "FAKE_PIDS": str(tmp_path / "pids")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command, f"--dir={tmp_path / 'runs'}"],
        env=environment,
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    pids: list[int] = []
    while len(pids) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
        with_file = (tmp_path / "pids").exists()
        pids = [int(p) for p in (tmp_path / "pids").read_text().split()] if with_file else []
    assert len(pids) == 4
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("methods", "seeds", "expected"),
    [
        ("randm", "1", r"unknown method randm \(did you mean random\?\); known: random, prepo"),
        ("random,random", "1", "names the arm random twice"),
        ("prepo:weighting.clamp=2", "1", "prepo is a known arm"),
        ("../x:weighting.clamp=2", "1", "must consist of letters"),
        ("", "1", "names no arm"),
        ("random", "3-1", "runs backwards"),
        ("random", "one", "must be like 1,2,3 or 1-5"),
        ("mine:selection.methd=prepo", "1", "selection.methd"),
    ],
)
def test_what_can_be_wrong(run_compare, tmp_path, methods, seeds, expected):
    with pytest.raises(UserError, match=expected):
        run_compare(methods, seeds)
    assert started(tmp_path) == []


def test_an_arm_of_ones_own(run_compare, tmp_path):
    (record,) = run_compare("mine:selection.method=prepo;weighting.clamp=2", "1")
    assert record["arm"] == "mine" and "weighting.clamp=2" in record["overrides"]


def test_an_arm_may_have_a_custom_selector(run_compare, tmp_path):
    """Its record names the file without its directory, and has a digest of the content."""
    (tmp_path / "mine.py").write_text(
        "from megatron_prepo.selection import Selector\nclass Mine(Selector):\n"
        "    needs_pass_rates = True\n"
        "    def __init__(self, config, *, total_steps, seed, pass_reward): ...\n"
        "    def choose(self, candidates, step): ...\n"
    )
    checked = []
    mine = f"mine:selection.method={tmp_path}/mine.py:Mine"
    one, other = run_compare(f"random,{mine}", "1", check=checked.append)
    assert [c.selection.name for c in checked] == ["random", "mine.py:Mine"]
    assert "train.rollout_budget=24" in one["overrides"]
    assert "train.rollout_budget=144" in other["overrides"]  # probes on top: 24 * (20 + 4) / 4
    method = other["settings"]["selection.method"]
    assert re.fullmatch(r"sha256:[0-9a-f]+:Mine", method)


def test_no_results_file(run_compare, tmp_path):
    (tmp_path / "results.jsonl").write_text("hello\n")
    with pytest.raises(UserError, match="no results file"):
        run_compare(results=tmp_path / "results.jsonl")


def test_a_results_file_loses_no_line(run_compare, tmp_path):
    """Two records of a run: one of them would go when the file is written."""
    run_compare("random", "1")
    results = tmp_path / "runs" / "results.jsonl"
    text = 2 * results.read_text()
    results.write_text(text)
    with pytest.raises(UserError, match=r"has the run runs random/1 twice"):
        run_compare("random", "1-2")
    assert results.read_text() == text and len(started(tmp_path)) == 1


def compare_words(config_path, tmp_path, *words) -> list[str]:
    methods = ["--methods", "random", "--seeds", "1", "--dir", str(tmp_path / "runs")]
    return ["compare", str(config_path), *methods, *map(str, words)]


@pytest.mark.parametrize("content", ["a folder", "precious", '{"mine": 1}', "a link to nowhere"])
def test_results_that_are_none_are_refused_before_anything_is_beside_them(
    config_path, tmp_path, capsys, content
):
    place = tmp_path / "mine"
    place.mkdir()
    match content:
        case "a folder":
            (place / "results").mkdir()
        case "a link to nowhere":
            (place / "results").symlink_to("results")
        case _:
            (place / "results").write_text(content)
    assert main(compare_words(config_path, tmp_path, "--results", place / "results")) == 2
    said = capsys.readouterr().err
    assert str(place / "results") in said and len(said.strip().splitlines()) == 1
    assert [path.name for path in place.iterdir()] == ["results"]
    assert not (tmp_path / "runs").exists()


def test_a_link_to_results_stays_a_link(config_path, run_compare, tmp_path, monkeypatch):
    """And the file that it leads to gets the records."""
    run_compare("random", "1")
    (tmp_path / "kept").mkdir()
    results, link = tmp_path / "kept" / "results.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(results)
    results.touch()
    assert main(compare_words(config_path, tmp_path, "--results", link)) == 0
    assert link.is_symlink() and len(results.read_text().splitlines()) == 1
    assert not (tmp_path / ".link.jsonl.lock").exists()


def test_a_log_of_the_users_is_not_added_to(run_compare, tmp_path):
    directory = tmp_path / "runs" / "random" / "1"
    directory.mkdir(parents=True)
    (directory / "train.log").write_text("precious")
    with pytest.raises(UserError, match=r"train\.log exists, and no run of a comparison wrote it"):
        run_compare("prepo,random", "1")
    assert started(tmp_path) == [] and not (tmp_path / "runs" / "prepo").exists()
    assert (directory / "train.log").read_text() == "precious"


def test_its_own_log_of_a_run_that_failed_early_is_added_to(run_compare, tmp_path):
    failing = [sys.executable, "-c", "raise SystemExit('too early')"]
    for _ in range(2):
        with pytest.raises(comparing.RunsFailed):
            run_compare("random", "1", train=failing)
    run_compare("random", "1")
    log = (tmp_path / "runs" / "random" / "1" / "train.log").read_text()
    assert log.count("too early") == 2


def test_an_unfinished_run_of_other_settings_is_not_replaced(run_compare, tmp_path):
    """One that `train` began, say; without a step there is nothing to lose."""
    run_compare("random", "1", "optimizer.lr=0.5")
    directory = tmp_path / "runs" / "random" / "1"
    (directory / "summary.json").unlink()
    (tmp_path / "runs" / "results.jsonl").unlink()
    with pytest.raises(UserError, match=r"random/1 with other settings \(optimizer\.lr: 0\.5"):
        run_compare("random", "1")
    assert len(started(tmp_path)) == 1 and (directory / "metrics.jsonl").stat().st_size
    (directory / "metrics.jsonl").write_text("")
    run_compare("random", "1")
    assert len(started(tmp_path)) == 2


def test_on_the_command_line(config_path, tmp_path, capsys):
    code = main(["compare", str(config_path), "--methods", "nonsense", "--seeds", "1", "a.b=1"])
    assert code == 2 and "unknown method nonsense" in capsys.readouterr().err


def test_the_record(run_compare, tmp_path):
    """The record has the values that the fake wrote."""
    (record,) = run_compare("prepo", "1", command="megatron-prepo compare ...")
    assert record["summary"]["pass_rate_after"] == 0.6 and record["seconds"] == {"update": 1.0}
    assert record["machine"] == {"processor": "fake"}
    assert [e["rollouts"] for e in record["evaluations"]] == [0, 8, 16, 24]
    assert [e["pass_rate"] for e in record["evaluations"]] == [0.4, 0.4333, 0.5667, 0.6]
    steps = record["steps"]
    assert steps["step/every"] == 1
    assert steps["reward/zero_variance_ratio"] == [0.5, 0.25, 0.125]
    assert steps["rollout/paid"] == [8, 16, 24] and "loss/grad_norm" not in steps
    assert steps["ppl/spearman_with_reward"] == [None, 0.1235, None]
    # 4 groups of 2: the easiest always passes, the next one half of the time
    assert record["ppl_deciles"] == [1.0, None, 0.5, None, None, 0.0, None, 0.0, None, None]
    assert record["probes"] == 0 and "probes" not in record["evaluations"][0]
    assert len(json.dumps(record)) < 3000
    assert str(tmp_path) not in json.dumps({k: v for k, v in record.items() if k != "overrides"})


def test_the_record_of_an_oracle(run_compare):
    (record,) = run_compare("oracle", "1")
    probes = [e["probes"] for e in record["evaluations"]]
    assert probes == [0, 3, 6, 9] and record["probes"] == 9
    assert [e["probe_tokens"] for e in record["evaluations"]] == [0, 15, 30, 45]
    assert [e["probe_seconds"] for e in record["evaluations"]] == [0, 2.0, 4.0, 6.0]


def test_a_long_run_stays_small():
    steps = [
        {name: 0.123456 + i for name in comparing.run_record.SERIES} | {"rollout/paid": i}
        for i in range(801)
    ]
    series = comparing.run_record._series(steps)
    assert series["step/every"] == 21
    assert len(series["entropy/mean"]) == 39 and series["rollout/paid"][0] == 20
    assert series["entropy/mean"][0] == approx(10.123456)
    assert len(json.dumps(comparing.run_record._rounded(series))) < 8000


def test_inputs_are_looked_at_once_before_anything_is_started(run_compare, tmp_path):
    """Arms and seeds with the same inputs are checked once; an error stops the comparison."""
    looked_at = []
    run_compare("random,prepo", "1-2", check=looked_at.append)
    assert len(looked_at) == 1
    run_compare("random,prepo", "1-2", check=looked_at.append)
    assert len(looked_at) == 1  # no run remains

    def refuse(config):
        raise UserError("no such prompt file")

    before = started(tmp_path)
    with pytest.raises(UserError, match="no such prompt file"):
        run_compare("random,wide:selection.num_candidates=30", "3", check=refuse)
    assert started(tmp_path) == before
    run_compare("random,wide:selection.num_candidates=30", "3", check=looked_at.append)
    assert [c.selection.num_candidates for c in looked_at[1:]] == [20, 30]
