"""The plain scripts: valid shell, and what they start on a simulated Slurm on this machine."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest

from tests.e2e.laptop import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "examples" / "launch").glob("*.*h"))
PYTHON = """#!/bin/bash
# a program that notes how it was called, and ends the run if it is to
echo "$SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME: $*" >> "$CALLS"
[ -z "${FAILS:-}" ] || exit "$FAILS"
[ "$2" = megatron_prepo.launch.rank ] || { [ -z "${SERVERS_FAIL:-}" ] || exit 3; exec sleep 60; }
[ -z "${SERVERS_FAIL:-}" ] || exec sleep 60
until [ -z "${SERVERS:-}" ] || grep -q launch.servers "$CALLS"; do sleep 0.05; done
[ -z "${ENDS:-}" ] || touch "$RUN_DIR/summary.json"
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_is_sound(script):
    assert len(SCRIPTS) == 3
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    # next to this Python, where the extra `dev` has it, which need not be on the path
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip('shellcheck is not installed (pip install -e ".[dev]")')
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


class Cluster:
    """Slurm whose `python` is PYTHON."""

    def __init__(self, directory):
        self.run_dir, self.calls = directory / "run", directory / "calls"
        self.run_dir.mkdir()
        self.environment = os.environ | fake_slurm.install(directory)
        self.environment |= {"CALLS": str(self.calls), "RUN_DIR": str(self.run_dir)}
        python = directory / "bin" / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)

    def sbatch(self, *words: str, **variables: str) -> str:
        """Submit, wait for the end; return the job's state."""
        environment = self.environment | variables
        done = subprocess.run(
            ["sbatch", *words], env=environment, capture_output=True, text=True, cwd=REPOSITORY
        )
        job = done.stdout.strip()
        deadline = time.monotonic() + 60
        while (state := fake_slurm.state_of(environment, job)) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return state

    def output(self) -> str:
        """Return the output of the scripts of all jobs."""
        return "".join(path.read_text() for path in self.calls.parent.glob("state/*.out"))

    def lines(self) -> list[str]:
        return sorted(self.calls.read_text().splitlines())

    def requeued(self) -> int:
        path = self.calls.parent / "state" / "requeued"
        return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def test_a_saved_run_is_queued_again_and_an_ended_or_failed_one_is_not(cluster):
    script = ["--nodes=2", "examples/launch/train.sbatch", str(cluster.run_dir)]
    words = [*script, "a b.yaml", "data.train=c d"]
    assert cluster.sbatch(*words) == "COMPLETED" and cluster.requeued() == 1
    called = f"-m megatron_prepo.launch.rank a b.yaml run.dir={cluster.run_dir} data.train=c d"
    assert cluster.lines() == sorted(
        f"{task} of 16 on 127.0.0.{1 + task // 8}: {called}" for task in range(16)
    )
    assert cluster.sbatch(*words, ENDS="yes") == "COMPLETED" and cluster.requeued() == 1
    (cluster.run_dir / "summary.json").unlink()
    assert cluster.sbatch(*words, FAILS="3") == "FAILED" and cluster.requeued() == 1


def test_a_job_that_lost_a_machine_is_queued_again(cluster):
    """The script does it before Slurm itself has noticed, which would do the same."""
    one = ["--nodes=1", "--ntasks-per-node=1"]
    words = [*one, "examples/launch/train.sbatch", str(cluster.run_dir), "run.yaml"]
    assert cluster.sbatch(*words, FAILS="69") == "FAILED" and cluster.requeued() == 1


@pytest.mark.parametrize("script", ["train.sbatch", "servers.sbatch"])
def test_a_job_that_is_shorter_than_its_warning_is_refused(cluster, script):
    """Slurm would warn it at its start, and it would requeue itself forever."""
    words = ["--nodes=2", f"examples/launch/{script}", str(cluster.run_dir), "run.yaml"]
    short = {"FAKE_END": "2026-01-01T12:08:00"}
    assert cluster.sbatch(*words, **short) == "FAILED"
    assert not cluster.requeued() and not cluster.calls.exists()
    assert "--time leaves no time to train" in cluster.output()
    enough = {"FAKE_END": "2026-01-01T12:08:01", "ENDS": "yes"}
    assert cluster.sbatch(*words, **enough) == "COMPLETED"
    (cluster.run_dir / "summary.json").unlink()
    unlimited = {"FAKE_END": "N/A", "ENDS": "yes"}
    assert cluster.sbatch(*words, **unlimited) == "COMPLETED"


def test_servers_that_fail_end_the_job(cluster):
    """The ranks would wait for them and hold all nodes for servers.start_seconds."""
    words = ["--nodes=3", "examples/launch/servers.sbatch", str(cluster.run_dir), "run.yaml"]
    before = time.monotonic()
    assert cluster.sbatch(*words, SERVERS_FAIL="yes") == "FAILED"
    assert time.monotonic() - before < 50, "the ranks would sleep for 60 s"
    assert not cluster.requeued()
    assert re.search(r"servers have ended with 3: see slurm-\d+-servers.out", cluster.output())


def test_servers_have_the_last_nodes_and_end_with_the_run(cluster):
    words = ["--nodes=3", "examples/launch/servers.sbatch", str(cluster.run_dir), "run.yaml"]
    before = time.monotonic()
    state = cluster.sbatch(*words, SERVER_NODES="1", SERVERS="4", ENDS="yes")
    assert state == "COMPLETED" and cluster.requeued() == 0
    assert time.monotonic() - before < 50, "the servers' task would sleep for 60 s"
    kinds = [re.sub(r"^\d+", "N", line).partition(" run.yaml")[0] for line in cluster.lines()]
    options = "--servers-a-node=4 --server-nodes=1"
    assert kinds.count(f"N of 1 on 127.0.0.3: -m megatron_prepo.launch.servers {options}") == 1
    for node in (1, 2):
        rank = f"N of 16 on 127.0.0.{node}: -m megatron_prepo.launch.rank {options}"
        assert kinds.count(rank) == 8
    assert len(kinds) == 17
