"""Commands that wait for their jobs: `launch --wait`, and `compare --executor slurm`."""

import json
import subprocess
import sys
import threading

import pytest

from megatron_prepo.debug import resume_check as prove
from megatron_prepo.process.local_ranks import STOPPED_EXIT_CODE
from tests.e2e import launcher
from tests.e2e.laptop import LAPTOP, REPOSITORY
from tests.real_slurm.cluster import SCRIPT, SECONDS, TRAIN, wait_for

pytestmark = pytest.mark.slow
TP2 = ["--nodes", "2", "--gpus-per-node", "1", "parallel.tensor=2"]


@launcher.NEEDED
def test_waiting_for_a_run_that_is_stopped_is_not_waiting_for_its_end(accounted):
    """The job has completed; the same command resumes the run, which then finishes."""
    cluster, run = accounted, accounted.runs / "waited"

    def ask_to_save() -> None:
        wait_for("2 steps", lambda: prove.num_lines(run / "metrics.jsonl") >= 2)
        cluster.signal(cluster.run("squeue", "--noheader", "--format=%i").split()[0])

    asking = threading.Thread(target=ask_to_save)
    asking.start()
    words = [*TP2, "--wait", f"run.dir={run}", *TRAIN]
    done = cluster.launch(*words, check=False)
    asking.join()
    assert done.returncode == STOPPED_EXIT_CODE, done.stdout[-2000:] + done.stderr[-2000:]
    assert "the same command resumes it" in done.stderr
    done = cluster.launch(*words, check=False)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("finished")


@launcher.NEEDED
def test_waiting_for_a_job_that_fails_is_a_failure(accounted):
    run = accounted.runs / "waited_and_failed"
    words = [*TP2, "--wait", f"run.dir={run}", *TRAIN, "data.train=absent.jsonl"]
    done = accounted.launch(*words, check=False)
    assert done.returncode == 1 and "error: train ended as FAILED" in done.stderr


def test_a_comparison_is_an_array_of_jobs(cluster):
    """Two methods x two seeds run on three nodes; one job is asked to save, and requeues itself."""
    directory = cluster.home / "odd 'name" / "comparison"
    words = ["compare", str(LAPTOP / "prepo.yaml"), "--methods", "random,prepo", "--seeds", "1-2"]
    slurm = ["--executor", "slurm", "--account", "lab", "--time", "00:30:00"]
    command = [sys.executable, "-m", "megatron_prepo", *words, *slurm, "--dir", str(directory)]
    compare = subprocess.Popen(
        [SCRIPT, "run", *command, *TRAIN, "parallel.tensor=1"],
        cwd=REPOSITORY,
        env=cluster.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        running = directory / "random" / "1"
        wait_for("2 steps", lambda: prove.num_lines(running / "metrics.jsonl") >= 2)
        first = cluster.run("squeue", "--noheader", "--array", "--format=%F_%K").split()[0]
        cluster.signal(f"{first.partition('_')[0]}_0")
        out, err = compare.communicate(timeout=3 * SECONDS)
    finally:
        compare.kill()
        compare.wait()
    assert compare.returncode == 0, out + err
    assert "submitted: 4 runs as the tasks of job array" in err
    lines = (directory / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["arm"], r["seed"]) for r in records] == [
        *[("random", 1), ("random", 2), ("prepo", 1), ("prepo", 2)]
    ]
    assert all(r["evaluations"][-1]["rollouts"] == 12 * 8 * 4 for r in records)
    assert "stopped as asked" in (running / "train.log").read_text()
