"""SGLang servers on the ranks' nodes and on a separate node: fake ones, and once real ones."""

import sys
from pathlib import Path

import fake_sglang_package
import pytest

from megatron_prepo.debug import resume_check as prove
from megatron_prepo.rollout.weight_sync import TOLERANCE
from tests.e2e import launcher
from tests.e2e.laptop import LAPTOP, REPOSITORY, metrics, summary
from tests.real_slurm.cluster import TRAIN, Cluster

pytestmark = pytest.mark.slow
SGLANG = ["rollout.engine=sglang", "weight_sync.verify=never", "eval.every=0"]
TP2 = ["--nodes", "2", "--gpus-per-node", "1", "parallel.tensor=2"]
SERVERS = REPOSITORY / ".venv-sglang" / "bin" / "python"
STEPS = 12


@pytest.fixture
def fake(cluster):
    """Variables with which the servers' interpreter finds the fake package."""
    directory = cluster.home / "package"
    if not directory.exists():
        fake_sglang_package.environment(directory)
    variables = {
        "PYTHONPATH": f"{directory}:{cluster.environment['PYTHONPATH']}",
        "FAKE_PIDS": str(cluster.home / "fake_pids"),
    }
    return variables


def exactly_once(run: Path) -> None:
    """Assert that no step is missing, none was made twice, and no rollout counted twice."""
    assert [step["step"] for step in metrics(run)] == list(range(STEPS))
    ledger = (run / "ledger.jsonl").read_text().splitlines()
    assert len(ledger) == len(set(ledger)) == STEPS * 8 * 4


def processes_of_servers(cluster: Cluster, node: str) -> str:
    """Return the ids of a node's servers; the brackets keep the shell itself out."""
    return cluster.on(node, "bash", "-c", "pgrep -f [s]glang.launch_server || true")


@launcher.NEEDED
@pytest.mark.parametrize("server_nodes", [0, 1])
def test_a_chain_with_servers_of_the_job(cluster, fake, server_nodes):
    """Servers run on both nodes of the ranks, or on the third; the first job is asked to save."""
    run = cluster.runs / f"servers_{server_nodes}"
    where = ["--server-nodes", "1"] if server_nodes else ["servers.release_memory=false"]
    first, second = cluster.launched(
        *[*TP2, *where, "--chain", "2", "--with", "monitor_group_job_wait_time=1"],
        *[f"run.dir={run}", *TRAIN, *SGLANG, f"servers.python={sys.executable}"],
        **fake,
    )
    cluster.wait_for_steps(run, 2, first)
    cluster.signal(first)
    cluster.ends(first)
    cluster.ends(second)
    exactly_once(run)
    nodes = ["node3"] if server_nodes else ["node1", "node2"]
    assert not any(processes_of_servers(cluster, node) for node in nodes), "they end with the job"
    assert len(list((run / "logs").glob("node_*"))) == len(nodes)


def submit(cluster: Cluster, run: Path, *settings: str, **environment: str) -> str:
    """Queue two ranks and a server on a third node."""
    words = [str(run), str(LAPTOP / "prepo.yaml"), "parallel.tensor=2", *TRAIN, *SGLANG, *settings]
    shape = {"SERVER_NODES": "1", "SERVERS": "1", **environment}
    return cluster.sbatch("servers.sbatch", *words, options=["--nodes=3"], **shape)


def test_servers_that_do_not_start_end_the_job(cluster):
    """The ranks would otherwise hold all nodes for servers.start_seconds."""
    job = submit(cluster, cluster.runs / "no_servers", "servers.python=/bin/false")
    said = cluster.ends(job, "FAILED")
    assert f"error: the servers have ended with 2: see slurm-{job}-servers.out" in said
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "has no SGLang" in (cluster.home / f"slurm-{job}-servers.out").read_text()


def test_slurm_queues_a_job_again_whose_node_of_servers_is_lost(cluster, fake):
    """There is no other node: the job waits until this one is back."""
    run = cluster.runs / "lost_server"
    job = submit(cluster, run, f"servers.python={sys.executable}", **fake)
    cluster.wait_for_steps(run, 3, job)
    cluster.power_off("node3")
    cluster.wait_for("another start", lambda: cluster.job(job)["Restarts"] == "1", job)
    cluster.boot("node3")
    cluster.ends(job)
    exactly_once(run)


def test_ranks_that_notice_a_lost_node_of_servers_first_name_it(cluster, fake):
    run = cluster.runs / "lost_server_late"
    quick = ["servers.request_seconds=15", "weight_sync.request_seconds=15"]
    with cluster.slurm_notices_late():
        job = submit(cluster, run, f"servers.python={sys.executable}", *quick, **fake)
        cluster.wait_for_steps(run, 3, job)
        cluster.power_off("node3")
        try:
            named = "on node3 does not answer; machine or network lost"
            cluster.wait_for("the name of the node", lambda: named in cluster.logs(job), job)
        finally:
            cluster.boot("node3")
        cluster.wait_for("another start", lambda: cluster.job(job)["Restarts"] == "1", job)
        cluster.ends(job)
    exactly_once(run)


@pytest.mark.skipif(not SERVERS.is_file(), reason="no SGLang (make sglang-cpu)")
def test_real_sglang_on_a_node_of_its_own_has_weights_by_broadcast(cluster, uninterrupted):
    run = cluster.runs / "real_sglang"
    job = submit(
        cluster,
        run,
        f"servers.python={SERVERS}",
        "weight_sync.transport=distributed",
        "weight_sync.verify=always",
        "train.total_steps=3",
    )
    cluster.ends(job, seconds=900)
    assert [step["step"] for step in metrics(run)] == [0, 1, 2]
    assert summary(run)["ranks"] == 2
    assert all(step["mismatch/logprob_abs/mean"] < TOLERANCE["float32"] for step in metrics(run))
    assert prove.num_lines(run / "ledger.jsonl") == 3 * 8 * 4
