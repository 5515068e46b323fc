"""Jobs that are signalled, cancelled, preempted, or lose a machine all reach the same end.

Every interrupted run equals the uninterrupted one bit for bit, so no step is missing, and none was
made or generated twice (`prove.compare`).
"""

import random
import shutil
import subprocess
import sys
import time

import pytest

from megatron_prepo.debug import resume_check as prove
from tests.e2e import launcher
from tests.e2e.laptop import LAPTOP, metrics, summary
from tests.e2e.test_machine_faults import JUMPING
from tests.real_slurm.cluster import TRAIN, Cluster

pytestmark = pytest.mark.slow
TP2 = "parallel.tensor=2"
DP2 = ("parallel.tensor=1", "parallel.data=2")
STEPS = 12
LONG = 120


@pytest.fixture
def run(cluster, request):
    """Directory of a run on the file system that all nodes share."""
    return cluster.runs / request.node.name.replace("/", "_")


def submit(cluster: Cluster, run, *settings: str, train=TRAIN, options=(), environment=None) -> str:
    """Queue the run on two nodes; returns the job's number."""
    settings = settings or (TP2,)
    words = [str(run), str(LAPTOP / "prepo.yaml"), *settings, *train]
    return cluster.sbatch("train.sbatch", *words, options=options, **(environment or {}))


def restarted(cluster: Cluster, job: str, times: int) -> bool:
    """Return whether the job has been restarted this many times."""
    return cluster.job(job)["Restarts"] == str(times)


def done(cluster: Cluster, job: str) -> bool:
    """Return whether the job has completed."""
    return cluster.state(job) == "COMPLETED"


@pytest.fixture
def equals(uninterrupted):
    """Check of a run against the uninterrupted one with the same settings."""

    def check(run, *settings: str) -> None:
        checks = prove.compare(uninterrupted(*(settings or (TP2,)), *TRAIN), run)
        assert all(check.equal for check in checks), prove.text(checks)
        assert prove.num_lines(run / "metrics.jsonl") == STEPS

    return check


def test_data_parallel_over_two_nodes(cluster, run, equals):
    cluster.ends(submit(cluster, run, *DP2))
    equals(run, *DP2)


def test_two_ranks_on_each_of_two_nodes(cluster, run, equals):
    layout = ("parallel.tensor=2", "parallel.data=2")
    cluster.ends(submit(cluster, run, *layout, options=["--ntasks-per-node=2"]))
    assert summary(run)["ranks"] == 4
    equals(run, *layout)


@launcher.NEEDED
def test_a_chain_past_a_real_time_limit(cluster, run):
    """Slurm itself sends the signal; the second job continues from the step of the first."""
    settings = [TP2, f"run.dir={run}", *TRAIN, "train.total_steps=100000", "eval.every=0"]
    words = ["--nodes", "2", "--gpus-per-node", "1", "--chain", "2", "--time", "00:04:00"]
    first, second = cluster.launched(*words, *settings, "checkpoint.grace_seconds=10")
    assert "stopped as asked" in cluster.ends(first)
    assert cluster.job(first)["ExitCode"] == "0:0"
    saved = prove.num_lines(run / "metrics.jsonl")
    assert saved > STEPS
    cluster.wait_for_steps(run, saved + 5, second)
    cluster.run("scancel", second)
    cluster.ends(second, "CANCELLED")
    assert [step["step"] for step in metrics(run)[: saved + 5]] == list(range(saved + 5))


def test_asked_to_save_at_any_moment_the_job_never_fails(cluster, run, equals):
    """The request comes while ranks start, connect, load, train or save; and at the end."""
    job = submit(cluster, run)
    drawn = random.Random(20)
    for restart in range(1, 6):
        cluster.wait_for("the job to run", lambda: cluster.state(job) == "RUNNING", job)
        time.sleep(drawn.uniform(0.5, 6))
        if cluster.state(job) != "RUNNING":
            break
        cluster.signal(job)
        cluster.wait_for(
            "another start, or the end",
            lambda restart=restart: restarted(cluster, job, restart) or done(cluster, job),
            job,
        )
    cluster.ends(job)
    equals(run)


def test_a_step_that_takes_longer_than_the_time_to_save_is_made_again(cluster, run, moment, equals):
    """The ranks leave in the middle of the step; the job is requeued and has not failed."""
    job = submit(cluster, run, TP2, "checkpoint.grace_seconds=0.01")
    cluster.wait_for_steps(run, moment, job)
    cluster.signal(job)
    cluster.wait_for("another start", lambda: restarted(cluster, job, 1), job)
    cluster.ends(job)
    equals(run)


def test_a_second_job_in_the_same_directory_is_refused_and_names_the_first(cluster, run, moment):
    """The second job runs on the third node; the first, which has steps for a minute, continues."""
    first = submit(cluster, run, TP2, train=(*TRAIN, f"train.total_steps={LONG}"))
    cluster.wait_for_steps(run, moment, first)
    words = [str(run), str(LAPTOP / "prepo.yaml"), "parallel.tensor=1", *TRAIN]
    second = cluster.sbatch("train.sbatch", *words, options=["--nodes=1"])
    said = cluster.ends(second, "FAILED")
    assert "is in use by process" in said and f"Slurm job {first} on node node1" in said
    assert cluster.job(second)["ExitCode"] == "2:0"
    cluster.ends(first)
    assert [step["step"] for step in metrics(run)] == list(range(LONG))


def test_cancelled_and_submitted_again(cluster, run, moment, equals):
    job = submit(cluster, run)
    cluster.wait_for_steps(run, moment, job)
    cluster.run("scancel", job)
    cluster.ends(job, "CANCELLED")
    cluster.ends(submit(cluster, run))
    equals(run)


def test_requeued_by_an_operator(cluster, run, moment, equals):
    job = submit(cluster, run)
    cluster.wait_for_steps(run, moment, job)
    cluster.run("scontrol", "requeue", job)
    cluster.ends(job)
    assert cluster.job(job)["Restarts"] == "1"
    equals(run)


def test_preempted_by_an_urgent_job(cluster, run, moment, equals):
    """Slurm sends SIGTERM, then SIGKILL after KillWait."""
    job = submit(cluster, run)
    cluster.wait_for_steps(run, moment, job)
    cluster.run(
        "sbatch",
        "--partition=urgent",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    )
    cluster.ends(job)
    assert cluster.job(job)["Restarts"] == "1"
    equals(run)


def test_a_cable_that_is_out_for_seconds_is_not_noticed(cluster, run, moment, equals):
    job = submit(cluster, run)
    cluster.wait_for_steps(run, moment, job)
    cluster.cut("node2")
    time.sleep(5)
    cluster.join("node2")
    cluster.ends(job)
    assert cluster.job(job)["Restarts"] == "0"
    equals(run)


@pytest.mark.parametrize(
    ("how", "node"), [("power_off", "node1"), ("power_off", "node2"), ("cut", "node2")]
)
def test_slurm_queues_a_job_again_whose_node_is_lost(cluster, run, moment, equals, how, node):
    """The first node has rank 0 and the job's script.

    Its cable is not cut: the nodes here share a kernel, in which rank 0 would keep the run's lock.
    """
    job = submit(cluster, run)
    cluster.wait_for_steps(run, moment, job)
    getattr(cluster, how)(node)
    try:
        cluster.wait_for("another start", lambda: restarted(cluster, job, 1), job)
        cluster.ends(job)
    finally:
        (cluster.boot if how == "power_off" else cluster.join)(node)
    assert node not in cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"])
    equals(run)


def test_ranks_that_notice_a_lost_machine_before_slurm_name_it_and_queue_the_job_again(
    cluster, run, moment, equals
):
    with cluster.slurm_notices_late():
        job = submit(cluster, run, TP2, "parallel.timeout_minutes=0.2")
        cluster.wait_for_steps(run, moment, job)
        cluster.power_off("node2")
        try:
            named = "rank 0: rank 1 on node2 does not answer; machine or network lost"
            cluster.wait_for("the name of the node", lambda: named in cluster.logs(job), job)
        finally:
            cluster.boot("node2")
        cluster.wait_for("another start", lambda: restarted(cluster, job, 1), job)
        cluster.ends(job)
    equals(run)


def test_a_rank_that_is_killed_is_named_and_fails_the_job(cluster, run, moment, equals):
    job = submit(cluster, run)
    cluster.wait_for_steps(run, moment, job)
    cluster.on("node2", "pkill", "-KILL", "-f", "megatron_prepo.launch.rank")
    said = cluster.ends(job, "FAILED")
    assert "node2: task 1: Killed" in said or "rank 1 on node2 has ended" in said
    cluster.ends(submit(cluster, run))
    equals(run)


@pytest.mark.parametrize("host", ["node1", "node2", "login"])
def test_daemons_of_slurm_may_restart(cluster, run, moment, equals, host):
    job = submit(cluster, run)
    cluster.wait_for_steps(run, moment, job)
    cluster.restart(host)
    cluster.ends(job)
    assert cluster.job(job)["Restarts"] == "0"
    equals(run)


def test_a_shared_file_system_that_turns_read_only_fails_the_job(cluster, run, moment, equals):
    """Each node gets a read-only bind mount: Linux remounts nothing that is open for writing."""
    job = submit(cluster, run)
    cluster.wait_for_steps(run, moment, job)
    for node in ("node1", "node2"):
        mount = f"mount --bind {run} {run} && mount -o remount,bind,ro {run}"
        cluster.on(node, "bash", "-c", mount)
    try:
        assert "Read-only file system" in cluster.ends(job, "FAILED")
    finally:
        for node in ("node1", "node2"):
            cluster.on(node, "umount", "--lazy", str(run))
    cluster.ends(submit(cluster, run))
    equals(run)


def test_a_shared_file_system_that_is_full_fails_the_job(cluster, moment, equals):
    disk = cluster.home / "disk"
    run, filler = disk / "run", disk / "filler"
    try:
        job = submit(cluster, run)
        cluster.wait_for_steps(run, moment, job)
        with open(filler, "wb") as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"x" * 65536)
        assert "No space left" in cluster.ends(job, "FAILED")
        filler.unlink()
        cluster.ends(submit(cluster, run))
        equals(run)
    finally:
        filler.unlink(missing_ok=True)
        shutil.rmtree(run)  # the next one needs the room


def test_an_error_of_one_node_only_is_shown(cluster, run):
    """The file exists on the first node only."""
    cluster.on("node1", "cp", "-r", str(LAPTOP / "base"), "/tmp/base")
    job = submit(cluster, run, TP2, train=(*TRAIN, "model.hf=/tmp/base"))
    assert "error: no such file or folder: model.hf=/tmp/base" in cluster.ends(job, "FAILED")
    assert cluster.job(job)["ExitCode"] == "2:0"


def test_clocks_of_nodes_that_are_hours_apart_change_nothing(cluster, run, equals, tmp_path):
    """Clocks differ for the ranks on node2; Slurm refuses nodes whose clock is minutes off."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler to make the clock jump with")
    source, library = tmp_path / "jumping.c", cluster.home / "jumping.so"
    source.write_text(JUMPING)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    python = cluster.home / "bin" / "python"
    python.parent.mkdir()
    apart = f"[ $SLURMD_NODENAME != node2 ] || export LD_PRELOAD={library}"
    python.write_text(f'#!/bin/sh\n{apart}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = f"{python.parent}:{cluster.environment['PATH']}"
    cluster.ends(submit(cluster, run, environment={"PATH": path}))
    equals(run)
