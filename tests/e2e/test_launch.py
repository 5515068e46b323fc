"""NeMo-Run itself: what it would submit for every recipe, and runs on this machine and on a
simulated Slurm.  Skipped where NeMo-Run is not installed."""

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fake_sglang_package
import fake_slurm
import pytest

from megatron_prepo.cli import main
from megatron_prepo.launch import recipes
from megatron_prepo.launch.job import make_job
from tests.e2e import launcher
from tests.e2e.laptop import FILES, REPOSITORY, SHORT, metrics, summary
from tests.e2e.launcher import launch, python

pytestmark = launcher.NEEDED
LAPTOP = "examples/laptop/prepo.yaml"
ODD = 'data.train=/data/it\'s "$HOME" [1].jsonl'
"""A word that a shell would change."""
DRY_RUNS = """
import json, sys
from megatron_prepo.launch.__main__ import main
for words in json.load(sys.stdin):
    print("=====", " ".join(words))
    code = main([*words, "--dry-run", "--no-doctor", "--no-plan"])
    print(f"code {code}")
"""


SLURM = ["--executor", "slurm", "--account", "acct"]
SGLANG = "rollout.engine=sglang"
OWN_NODES = ["servers.tensor=4", "weight_sync.transport=distributed"]
CASES = {name: [name, *SLURM] for name in recipes.recipes()} | {
    "container": [
        *["qwen2.5-7b", *SLURM, "--nodes", "4", "--server-nodes", "2", "--chain", "2"],
        *["--partition", "h100", "--time", "08:00:00"],
        *["--image", "registry/prepo:1", "--mount", "/lustre:/lustre", "--with", "qos=high"],
        *[
            "--env",
            "NCCL_DEBUG=WARN INFO",
            *OWN_NODES,
            "checkpoint.grace_seconds=840",
            ODD,
        ],
    ],
    "docker": ["qwen2.5-7b", "--executor", "docker", "--image", "registry/prepo:1", ODD],
    "docker on two machines": ["qwen2.5-72b", "--executor", "docker", "--image", "x"],
    "no account": ["qwen2.5-7b", "--executor", "slurm"],
    "unknown field": ["qwen2.5-7b", *SLURM, "--with", "qso=high"],
}


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory) -> dict[str, str]:
    """Output of each of CASES; one process, since NeMo-Run takes seconds to import."""
    home = tmp_path_factory.mktemp("nemo_run")
    done = python("-c", DRY_RUNS, home=home, given=json.dumps(list(CASES.values())))
    assert done.returncode == 0, done.stderr[-3000:]
    errors = iter(re.findall(r"^error: .*", done.stderr, re.M))
    printed = re.split(r"^===== .*$", done.stdout, flags=re.M)[1:]
    return {
        name: text + (next(errors) if "code 2" in text else "")
        for name, text in zip(CASES, printed, strict=True)
    }


def flags(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.M))


def steps(script: str) -> list[list[str]]:
    """Return the words of each `srun`, as the shell splits them."""
    lines = [line for line in script.splitlines() if line.startswith("srun --output")]
    return [shlex.split(line.partition(" & pids")[0]) for line in lines]


@pytest.mark.parametrize("name", sorted(recipes.recipes()))
def test_a_recipe_asks_slurm_for_what_its_layout_needs(name, dry_runs):
    script = dry_runs[name]
    assert "code 0" in script
    assert (
        subprocess.run(["bash", "-n"], input=script.partition("code 0")[0], text=True).returncode
        == 0
    )
    job = make_job(name)
    asked = flags(script)
    assert asked["nodes"] == str(job.nodes) and asked["gpus-per-node"] == "8"
    assert asked["account"] == "acct" and "exclusive" in asked
    assert asked["signal"] == f"USR1@{job.config.checkpoint.grace_seconds + 60:.0f}"
    training, where = steps(script)[-1], job.place
    assert {f"--nodes={where.nodes}", f"--ntasks={where.ranks}", "--relative=0"} <= set(training)
    assert training[training.index("-m") + 1 :] == job.rank_words()
    assert len(steps(script)) == (2 if job.nodes > 1 else 1), "servers of many nodes"


def test_servers_of_their_own_a_container_and_a_chain(dry_runs):
    assert "code 0" in dry_runs["container"]
    first, second = re.split(r"^# /.*_sbatch\.sh$", dry_runs["container"], flags=re.M)[1:]
    job = make_job(
        "qwen2.5-7b",
        [*OWN_NODES, "checkpoint.grace_seconds=840", ODD],
        nodes=4,
        server_nodes=2,
    )
    for script in (first, second):
        asked = flags(script)
        assert asked["nodes"] == "6" and asked["time"] == "08:00:00" and asked["qos"] == "high"
        assert asked["partition"] == "h100" and asked["signal"] == "USR1@900"
        assert "export NCCL_DEBUG='WARN INFO'" in script
        servers, ranks = steps(script)
        assert {"--nodes=2", "--ntasks=2", "--relative=4", "--overlap"} <= set(servers)
        assert {"--nodes=4", "--ntasks=32", "--relative=0", "--overlap"} <= set(ranks)
        assert servers[servers.index("-m") + 1 :] == job.server_words()
        assert ranks[ranks.index("-m") + 1 :] == job.rank_words() and ODD in ranks[-2:]
        for step in (servers, ranks):
            assert step[step.index("--container-image") + 1] == "registry/prepo:1"
            mounts = step[step.index("--container-mounts") + 1].split(",")
            assert {f"{REPOSITORY}:{REPOSITORY}", "/lustre:/lustre"} <= set(mounts)
            assert f"--container-workdir={REPOSITORY}" in step
    assert flags(first)["job-name"] != flags(second)["job-name"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "docker on two machines",
            "--executor docker supports one machine, but the job",
        ),
        ("no account", "--executor slurm needs --account"),
        ("unknown field", "SlurmExecutor has no such field (did you mean qos?)"),
    ],
)
def test_what_cannot_be_launched_is_said(name, expected, dry_runs):
    assert "code 2" in dry_runs[name] and expected in dry_runs[name]


def test_docker_starts_torchrun_where_the_checkout_is_mounted(dry_runs):
    words = " ".join(dry_runs["docker"].split())
    assert "code 0" in words
    for part in ("torchrun", "--nproc-per-node - '8'", f"{REPOSITORY}:/nemo_run/code"):
        assert part in words.replace("' '", "'"), dry_runs["docker"]


def test_ranks_of_the_local_executor_train(tmp_path):
    done = launch(
        *[LAPTOP, "--executor", "local", f"run.dir={tmp_path / 'run'}", *FILES, *SHORT],
        "train.total_steps=1",
        home=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert summary(tmp_path / "run")["ranks"] == 2


def test_a_job_that_fails_is_the_launchers_failure(tmp_path):
    """NeMo-Run's own launcher would exit with code 0."""
    done = launch(
        *[LAPTOP, "--executor", "local", f"run.dir={tmp_path / 'run'}", "data.train=absent.jsonl"],
        home=tmp_path,
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert "error: train ended as FAILED" in done.stderr


@pytest.fixture
def slurm(tmp_path):
    """Environment of a simulated Slurm."""
    environment = fake_slurm.install(tmp_path / "slurm")
    yield environment
    fake_slurm.end(environment)


def states(slurm: dict[str, str]) -> list[str]:
    """Return the states of all jobs, in the order of their submission."""
    jobs = sorted(path.stem for path in Path(slurm["FAKE_SLURM"]).glob("*.state"))
    return [fake_slurm.state_of(slurm, job) for job in jobs]


@pytest.mark.slow
def test_a_chain_of_jobs_with_servers_on_a_node_of_their_own(tmp_path, slurm, monkeypatch):
    """Two nodes have one rank each, a third has a server (the fake one).  Slurm asks the first job
    to save; the second resumes and finishes."""
    pids = fake_sglang_package.install(tmp_path / "package", monkeypatch)
    run = tmp_path / "run"

    def ask_to_save() -> None:
        written = run / "metrics.jsonl"
        seconds = 300.0  # imports take long on a busy machine
        fake_sglang_package.wait_for(
            "a step", lambda: written.is_file() and written.read_text(), seconds
        )
        fake_slurm.signal_steps(slurm, signal.SIGUSR1)

    asking = threading.Thread(target=ask_to_save)
    asking.start()
    done = launch(
        *[LAPTOP, *SLURM, "--nodes", "2", "--gpus-per-node", "1", "--server-nodes", "1"],
        *["--chain", "2", "--wait", "--python", sys.executable],
        *["--with", "monitor_group_job_wait_time=1", f"run.dir={run}", *FILES, *SHORT],
        *[SGLANG, f"servers.python={sys.executable}", "weight_sync.verify=never"],
        *["parallel.tensor=2", "train.total_steps=20"],
        home=tmp_path,
        **slurm,
    )
    asking.join()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert states(slurm) == ["COMPLETED"] * 2
    assert [step["step"] for step in metrics(run)] == list(range(20))
    assert summary(run)["ranks"] == 2
    logs = sorted(tmp_path.rglob("log-megatron-prepo*.out"))
    log = "".join(path.read_text() for path in logs)
    assert "\r" not in log and log.count("\ntrain ") == 20, "a line a step"
    assert log.count("stopped as asked") == 1
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    fake_sglang_package.wait_until_gone(fake_sglang_package.processes(pids))
