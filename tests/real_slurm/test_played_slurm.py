"""What `tests/fake_slurm.py` plays is what a real Slurm does: the same scripts run on both.

Each test covers one kind of thing that the tests with the played one rely on.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_slurm
import pytest

from megatron_prepo.process import slurm as nodes
from tests.real_slurm.cluster import ENDED, Cluster, wait_for


class Played:
    """The simulation, used as a cluster is."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.environment = os.environ | fake_slurm.install(directory / "commands")

    def run(self, *words: str) -> str:
        """Run a command; return what it prints."""
        done = subprocess.run(
            words, env=self.environment, check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    def state(self, job: str) -> str:
        return fake_slurm.state_of(self.environment, job)

    def signal(self, job: str) -> None:
        """Signal the steps of all jobs; there is one."""
        fake_slurm.signal_steps(self.environment, signal.SIGUSR1)


class Real:
    """The cluster, with a directory that its nodes share."""

    def __init__(self, cluster: Cluster, directory: Path):
        self.cluster, self.directory = cluster, directory
        self.run, self.state, self.signal = cluster.run, cluster.state, cluster.signal


@pytest.fixture
def both(cluster, tmp_path, request):
    """The played Slurm and the real one."""
    shared = cluster.home / request.node.name
    shared.mkdir()
    played = Played(tmp_path)
    yield played, Real(cluster, shared)
    fake_slurm.end(played.environment)


def submit(slurm: Played | Real, script: str, *options: str) -> str:
    """Queue a script that notes things in the file `$OUT`; returns the job's number."""
    file = slurm.directory / f"script_{len(list(slurm.directory.glob('script_*')))}"
    head = "#SBATCH --ntasks-per-node=2"
    file.write_text(f"#!/bin/bash\n{head}\nOUT={slurm.directory / 'out'}\n{script}\n")
    output = "--output=/dev/null"
    return slurm.run("sbatch", "--parsable", output, "--nodes=3", *options, str(file)).strip()


def end(slurm: Played | Real, *jobs: str) -> list[str]:
    """Wait for the end of jobs; return their states."""
    wait_for("the jobs", lambda: all(slurm.state(job) in ENDED for job in jobs))
    return [slurm.state(job) for job in jobs]


def out(slurm: Played | Real) -> str:
    """Return what scripts have noted so far."""
    file = slurm.directory / "out"
    return file.read_text() if file.exists() else ""


def numbered(text: str) -> list[list[str]]:
    """Return sorted lines in which nodes have their number in place of their name."""
    lines = [
        [
            ",".join(name[-1] for name in nodes.hosts(word)) if re.match("node|127", word) else word
            for word in line.split()
        ]
        for line in text.splitlines()
    ]
    return sorted(lines)


def equal(both: tuple[Played, Real], seen: Callable[[Played | Real], object]) -> object:
    """Return what is seen on both, which must be the same."""
    played, real = (seen(slurm) for slurm in both)
    assert played == real
    return real


VARIABLES = """
    SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_NNODES
    SLURM_JOB_NODELIST SLURM_STEP_NODELIST SLURMD_NODENAME
"""


def test_tasks_have_the_same_variables(both):
    """A step on all nodes, and one on the last two of three; a job knows its hosts."""
    echo = " ".join(f"${name}" for name in VARIABLES.split())

    def seen(slurm):
        step = f"--output={slurm.directory}/step bash -c 'echo {echo}'"
        script = f"""
            srun --nodes=1 --ntasks=1 --overlap {step}
            srun --overlap --relative=1 --nodes=2 --ntasks=4 --open-mode=append \\
                --ntasks-per-node=2 {step}
            scontrol show hostnames >$OUT
            echo $SLURM_NNODES $SLURM_NTASKS_PER_NODE $SLURM_JOB_NODELIST >>$OUT
        """
        assert end(slurm, submit(slurm, script)) == ["COMPLETED"]
        return numbered((slurm.directory / "step").read_text()), numbered(out(slurm))

    tasks, _ = equal(both, seen)
    assert len(tasks) == 5


FAILING = """
    srun --kill-on-bad-exit=1 --output=/dev/null bash -c '
        case $SLURM_PROCID in
            3) sleep 1; exit {code} ;;
            *) trap "{on_term}" TERM; while :; do sleep 0.2; done ;;
        esac' || code=$?
    echo $code >$OUT
    exit $code
"""
"""One of six tasks fails, and Slurm ends the remaining five."""


SLOW = pytest.mark.slow


@pytest.mark.parametrize("code", [7, *(pytest.param(code, marks=SLOW) for code in (69, 138))])
def test_a_task_that_fails_ends_the_step_with_its_code(both, code):
    """The remaining ones catch SIGTERM and end with 0; the job's state is that of its script."""

    def seen(slurm):
        job = submit(slurm, FAILING.format(code=code, on_term="exit 0"))
        return end(slurm, job), out(slurm).split()

    assert equal(both, seen) == (["FAILED"], [str(code)])


@SLOW
def test_tasks_that_ignore_sigterm_are_killed_and_hide_the_code(both):
    """After KillWait; the largest code of all tasks is the step's."""

    def seen(slurm):
        end(slurm, submit(slurm, FAILING.format(code=7, on_term="")))
        return out(slurm).split()

    assert equal(both, seen) == ["137"]


def test_a_signal_reaches_all_processes_of_the_steps_and_not_the_script(both):
    """Also those that a task has started; nothing of the step outlives it."""
    code = (
        "import signal, subprocess, sys, time\n"
        "def note(*_):\n    open(sys.argv[1], 'a').write('child\\n'); sys.exit()\n"
        "signal.signal(signal.SIGUSR1, note)\n"
        "open(sys.argv[1], 'a').write('listens\\n')\n"
        "time.sleep(60)"
    )

    def seen(slurm):
        (slurm.directory / "child.py").write_text(code)
        child = f"{sys.executable} {slurm.directory}/child.py $OUT"
        script = f"""
            export OUT
            srun --output=/dev/null bash -c '
                trap "echo task >>$OUT" USR1
                {child} & wait; wait; exit 0'
            echo script continues >>$OUT
        """
        job = submit(slurm, script)
        wait_for("6 children", lambda: out(slurm).count("listens") == 6)
        slurm.signal(job)
        return end(slurm, job), sorted(out(slurm).splitlines())

    state, lines = equal(both, seen)
    assert state == ["COMPLETED"]
    assert lines == sorted(["listens", "child", "task"] * 6 + ["script continues"])


@SLOW
def test_a_job_starts_after_another_however_that_ended(both):
    def seen(slurm):
        first = submit(slurm, "sleep 2; echo first >>$OUT; exit 3")
        second = submit(slurm, "echo second >>$OUT", f"--dependency=afterany:{first}")
        waiting = slurm.state(second)
        return waiting, end(slurm, first, second), out(slurm).split()

    assert equal(both, seen) == ("PENDING", ["FAILED", "COMPLETED"], ["first", "second"])


@SLOW
def test_the_start_and_end_of_a_job_have_the_same_form(both):
    """Scripts subtract the two, by `date`."""
    ask = 'squeue --noheader --jobs="$SLURM_JOB_ID" --format="%S %e" >$OUT'

    def seen(slurm):
        end(slurm, submit(slurm, ask, "--time=04:00:00"))
        return re.sub(r"\d", "9", out(slurm)).split()

    assert equal(both, seen) == ["9999-99-99T99:99:99"] * 2
    real = both[1]
    end(real, submit(real, ask, "--time=UNLIMITED"))
    assert out(real).split()[1] in ("N/A", "NONE")


@SLOW
def test_accounting_has_the_columns_that_nemo_run_reads(accounted, both):
    """For a moment the real one shows a job that it has not recorded yet as `allocation`."""

    def row(slurm, job) -> dict[str, str]:
        header, *lines = slurm.run("sacct", "--parsable2", "-j", job).splitlines()
        return dict(zip(header.split("|"), lines[0].split("|"), strict=True)) if lines else {}

    def seen(slurm):
        job = submit(slurm, "exit 0", "--job-name=megatron-prepo.train")
        end(slurm, job)
        wait_for("its record", lambda: row(slurm, job).get("JobName") not in (None, "allocation"))
        wait_for("its end", lambda: row(slurm, job)["State"] == "COMPLETED")
        return row(slurm, job)["JobID"] == job, row(slurm, job)["JobName"]

    assert equal(both, seen) == (True, "megatron-prepo.train")
