"""Sample of a real Slurm for `make test`: a chain by NeMo-Run, a job that requeues itself."""

from megatron_prepo.debug import resume_check as prove
from megatron_prepo.process import slurm as nodes
from tests.e2e import launcher
from tests.e2e.laptop import LAPTOP, summary
from tests.real_slurm.cluster import TRAIN

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


@launcher.NEEDED
def test_a_job_that_slurm_refuses_is_one_line(cluster):
    words = ["--partition", "absent", f"run.dir={cluster.runs / 'none'}"]
    done = cluster.launch(*TWO_NODES, *words, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error: sbatch rejected the job: invalid partition specified: absent; ")
    assert not cluster.run("squeue", "--noheader")
