"""Sample of a real Slurm for `make test`: a chain by NeMo-Run, a job that requeues itself."""

import os
import subprocess

import fake_slurm

from megatron_prepo.debug import resume_check as prove
from megatron_prepo.process import slurm as nodes
from tests.e2e import launcher
from tests.e2e.laptop import LAPTOP, summary
from tests.real_slurm.cluster import TRAIN, wait_for

TWO_NODES = ["--nodes", "2", "--gpus-per-node", "1", "parallel.tensor=2"]


@launcher.NEEDED
def test_a_chain_over_two_nodes_resumes_bit_equal(cluster, uninterrupted):
    """Slurm asks the first job to save, as before its time limit; the second one finishes."""
    run = cluster.runs / "chain"
    first, second = cluster.launched(*TWO_NODES, "--chain", "2", f"run.dir={run}", *TRAIN)
    assert int(second) == int(first) + 1
    cluster.wait_for_steps(run, 2, first)
    cluster.signal(first)
    assert "stopped as asked" in cluster.ends(first)
    assert "megatron-core" in cluster.ends(second)
    assert summary(run)["ranks"] == 2
    checks = prove.compare(uninterrupted("parallel.tensor=2", *TRAIN), run)
    assert all(check.equal for check in checks), prove.text(checks)


def test_a_job_that_is_asked_before_its_ranks_listen_queues_itself_again(cluster, uninterrupted):
    """The signal's default action would kill the ranks, and the job would fail."""
    run = cluster.runs / "requeued"
    words = [str(run), str(LAPTOP / "prepo.yaml"), "parallel.tensor=2", *TRAIN]
    job = cluster.sbatch("train.sbatch", *words)
    cluster.wait_for_ranks(run, 2, job)
    cluster.signal(job)
    cluster.wait_for("another start", lambda: cluster.job(job)["Restarts"] == "1", job)
    assert not run.exists(), "the ranks had not met"
    cluster.ends(job)
    checks = prove.compare(uninterrupted("parallel.tensor=2", *TRAIN), run)
    assert all(check.equal for check in checks), prove.text(checks)


LISTS = ["n[1-3]", "gpu[08-10,12],head", "a,b[7],c[099-101]", "x[1-2,5],y0", "login"]


def test_node_lists_are_read_as_slurm_reads_them(cluster):
    for node_list in LISTS:
        expected = cluster.run("scontrol", "show", "hostnames", node_list).split()
        assert nodes.hosts(node_list) == expected


TASKS = """#!/bin/bash
#SBATCH --ntasks-per-node=2
srun --overlap --relative=1 --nodes=2 --ntasks=4 --ntasks-per-node=2 --output={out} \
    bash -c 'echo "$SLURM_PROCID $SLURM_LOCALID $SLURM_NODEID $SLURM_NTASKS $SLURM_JOB_NODELIST" \
        "$SLURM_STEP_NODELIST $SLURMD_NODENAME $SLURM_NNODES $SLURM_NTASKS_PER_NODE"'
srun --kill-on-bad-exit=1 --output=/dev/null bash -c '[ $SLURM_PROCID != 3 ] || exit 7; sleep 60'
echo "$?" >{code}
"""
"""A step on the last two of three nodes, and one in which a task fails."""


def tasks(text: str) -> list[list]:
    """Return the environment of each task, in order; nodes by their numbers."""
    told = []
    for line in sorted(text.splitlines()):
        *numbers, job, step, mine, all_nodes, a_node = line.split()
        names = [*nodes.hosts(job), "", *nodes.hosts(step), "", mine]
        told.append([*numbers, [name[-1:] for name in names], all_nodes, a_node])
    return told


def test_the_slurm_that_tests_play_tells_tasks_what_this_one_does(cluster, tmp_path):
    """The simulation is `tests/fake_slurm.py`, used where there is no real Slurm."""
    played = fake_slurm.install(tmp_path / "fake")
    files = {}
    for kind, place in (("played", tmp_path), ("real", cluster.home / "tasks")):
        place.mkdir(exist_ok=True)
        files[kind] = place / "tasks.out", place / "code"
        out, code = files[kind]
        (place / "script").write_text(TASKS.format(out=out, code=code))
    script = str(cluster.home / "tasks" / "script")
    cluster.ends(
        cluster.run("sbatch", "--parsable", "--nodes=3", "--output=/dev/null", script).strip()
    )
    words = ["sbatch", "--nodes=3", str(tmp_path / "script")]
    subprocess.run(words, env=os.environ | played, check=True, timeout=60)
    wait_for(
        "the played job", lambda: files["played"][1].is_file() and files["played"][1].read_text()
    )
    fake_slurm.end(played)
    told = {kind: tasks(out.read_text()) for kind, (out, _) in files.items()}
    assert told["played"] == told["real"] and len(told["real"]) == 4
    # of the tasks that it stops, the real one reports 143 where a command does not catch SIGTERM
    assert files["real"][1].read_text().strip() in ("7", "143")


@launcher.NEEDED
def test_a_job_that_slurm_refuses_is_one_line(cluster):
    words = ["--partition", "absent", f"run.dir={cluster.runs / 'none'}"]
    done = cluster.launch(*TWO_NODES, *words, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error: sbatch rejected the job: invalid partition specified: absent; ")
    assert not cluster.run("squeue", "--noheader")
