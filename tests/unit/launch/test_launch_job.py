"""Recipes, jobs and Slurm's variables, without NeMo-Run: an impossible layout is refused here."""

import json
import os
import signal
import socket
import subprocess
import sys
from typing import ClassVar

import pytest
import yaml

from megatron_prepo import config as configuration
from megatron_prepo.errors import NoSuchPath, Stopped, UserError
from megatron_prepo.launch import executors, peers, rank, recipes, servers, slurm_time, start
from megatron_prepo.launch.__main__ import main
from megatron_prepo.launch.job import make_job
from megatron_prepo.process import slurm as nodes
from megatron_prepo.process.local_ranks import STOPPED_EXIT_CODE
from megatron_prepo.rollout.sglang import launch as sglang_launch
from tests.e2e.laptop import REPOSITORY


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    # this process is not a rank, and its signals must not change
    monkeypatch.setattr(rank.stop, "leave_when_asked", lambda code: None)


def test_every_example_for_a_cluster_is_a_recipe():
    known = recipes.recipes()
    assert len(known) == 16 + 5 and all(path.is_file() for path in known.values())
    assert recipes.find("qwen2.5_7b") == REPOSITORY / "examples/paper/qwen2.5-7b/prepo.yaml"
    assert recipes.find("llama-3.1-8b/random").name == "random.yaml"
    assert recipes.find("examples/laptop/prepo.yaml").is_file()
    with pytest.raises(NoSuchPath, match=r"'qwen2.5-8b'.*did you mean qwen2.5-7b"):
        recipes.find("qwen2.5-8b")


EMBEDDED = ["rollout.engine=embedded", "servers.nodes=0"]


@pytest.mark.parametrize("name", sorted(recipes.recipes()))
def test_a_recipe_has_the_nodes_that_its_layout_needs(name):
    job = make_job(name)
    parallel = job.config.parallel
    assert job.place.ranks == parallel.tensor * parallel.pipeline * parallel.data
    assert job.place.gpus_per_node == 8


def test_data_parallelism_follows_from_the_nodes_unless_it_is_said():
    disk = "weight_sync.transport=disk"
    job = make_job("qwen2.5-7b", [disk], nodes=4)
    assert (job.place.ranks, job.config.parallel.data) == (32, 8)
    assert job.train_words() == [
        "megatron_prepo",
        "train",
        "examples/paper/qwen2.5-7b/prepo.yaml",
        "parallel.data=8",
        disk,
    ]
    with pytest.raises(UserError, match="32 ranks do not fit parallel"):
        make_job("qwen2.5-7b", [disk, "parallel.data=2"], nodes=4)
    embedded = [*EMBEDDED, "parallel.pipeline=1"]
    with pytest.raises(UserError, match="12 ranks do not fit parallel"):
        make_job("qwen2.5-72b", embedded, nodes=3, gpus_per_node=4)


def test_servers_are_of_the_run_on_one_node_and_of_the_job_on_more():
    beside_ranks = ["servers.nodes=0", "servers.tensor=2", "weight_sync.transport=value"]
    assert not make_job("qwen2.5-7b", beside_ranks).starts_servers
    assert not make_job("qwen2.5-72b", EMBEDDED).starts_servers, "the embedded engine has none"
    given = ["servers.nodes=0", "servers.urls=[http://10.0.0.7:30000]"]
    assert not make_job("qwen2.5-72b", given).starts_servers
    beside = make_job("qwen2.5-72b", beside_ranks)
    assert beside.starts_servers and beside.place.servers_per_node == 4
    assert beside.rank_words()[1:3] == ["--servers-a-node=4", "--server-nodes=0"]
    own_nodes = make_job("qwen2.5-7b", beside_ranks, server_nodes=2)
    assert own_nodes.starts_servers
    assert own_nodes.server_words()[:3] == [
        "megatron_prepo.launch.servers",
        "--servers-a-node=4",
        "--server-nodes=2",
    ]


@pytest.mark.parametrize(
    ("overrides", "server_nodes", "expected"),
    [
        (["rollout.engine=embedded"], 1, r"servers.nodes=1 \(--server-nodes\) is for SGLang"),
        (["servers.urls=[http://a:1]"], 1, "servers.urls names existing ones"),
        (["servers.tensor=3"], 1, "servers.tensor=3 does not divide"),
        (["servers.tensor=16"], 0, "servers.tensor=16 does not divide"),
        (["servers.count=9"], 0, "servers.count=9 .* do not fit a node"),
        (["servers.first_device=8"], 0, "is for a job of one node"),
        (["weight_sync.transport=ipc"], 0, "set weight_sync.transport=disk"),
        ([], 0, "weight_sync.transport=distributed needs servers on separate GPUs"),
        ([], -1, "--server-nodes -1 must be at least 0"),
    ],
)
def test_servers_that_cannot_be_are_refused(overrides, server_nodes, expected):
    with pytest.raises(UserError, match=expected):
        make_job("qwen2.5-72b", ["servers.nodes=0", *overrides], server_nodes=server_nodes)


SLURM = {
    "SLURM_JOB_ID": "4217",
    "SLURM_JOB_NODELIST": "gpu[08-10,12]",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURMD_NODENAME": "gpu09",
}


def test_ranks_are_numbered_along_the_nodes_of_their_step_and_meet_at_its_first():
    assert nodes.rank_environment(SLURM) == {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu08",
        "MASTER_PORT": str(20000 + 17 * 32),
    }


def test_a_rank_outside_of_slurm_is_a_sentence(monkeypatch, capsys):
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    assert rank.main(["examples/laptop/prepo.yaml"]) == 2
    assert "error: SLURM_STEP_NODELIST is not set" in capsys.readouterr().err


def test_servers_are_on_the_last_nodes_or_on_all(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    first = 20000 + 17 * 32 + 1
    assert rank.server_urls(2, 2) == [
        f"http://gpu10:{first}",
        f"http://gpu10:{first + 1}",
        f"http://gpu12:{first}",
        f"http://gpu12:{first + 1}",
    ]
    assert len(rank.server_urls(0, 1)) == 4


def finish(directory) -> None:
    """Create what a finished run of the laptop's configuration leaves, as far as a job reads it."""
    config = configuration.load("examples/laptop/prepo.yaml", [f"run.dir={directory}"])
    (directory / "config.yaml").write_text(yaml.safe_dump(configuration.to_tree(config)))
    (directory / "summary.json").write_text(json.dumps({"steps": 80, "rollouts": 20480}))


def test_a_finished_run_is_left_alone_and_a_saved_one_is_no_failure(tmp_path, monkeypatch, capsys):
    """Chains of jobs rely on this."""
    for name, value in (SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(name, value)
    for name in [*nodes.rank_environment(SLURM), "OMP_NUM_THREADS"]:
        monkeypatch.setenv(name, "")  # so that the test's end restores it
    monkeypatch.setattr(peers, "listen", lambda: None)
    codes = iter([75, 3, 0])
    trained = []
    monkeypatch.setattr(
        start, "train_rank", lambda *words: trained.append(list(words)) or next(codes)
    )
    words = ["examples/laptop/prepo.yaml", f"run.dir={tmp_path}"]
    assert rank.main(words) == 0, "saved, and not ended"
    assert rank.main(words) == 3
    assert trained == [[words[0], words[1:]]] * 2
    finish(tmp_path)
    assert rank.main(words) == 0 and len(trained) == 2
    assert "finished run" in capsys.readouterr().out
    assert rank.main([*words, "train.total_steps=81"]) == 0 and len(trained) == 3, "extended"
    assert rank.main(["absent.yaml"]) == 2
    assert "error: no such configuration file: absent.yaml" in capsys.readouterr().err


def test_servers_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr(rank, "POLL_SECONDS", 0.01)
    config = make_job("qwen2.5-7b", ["servers.start_seconds=0.1"]).config
    with pytest.raises(UserError, match=r"no SGLang server at http://127\.0\.0\.1:1 within"):
        rank.wait_for(["http://127.0.0.1:1"], config)


def test_where_servers_log_is_said_only_if_they_have_logged(tmp_path):
    config = make_job("qwen2.5-7b", [f"run.dir={tmp_path}"]).config
    assert "output of the job's server step" in rank.where_they_log(config)
    (tmp_path / "logs" / "node_1").mkdir(parents=True)
    (tmp_path / "logs" / "node_1" / "server_0.log").touch()
    assert rank.where_they_log(config) == f"see {tmp_path}/logs/node_*"


@pytest.mark.parametrize(("overdue", "expected"), [(False, 1), (True, 0)])
def test_what_fails_when_the_time_to_save_is_over_is_a_stop(overdue, expected, monkeypatch):
    """Another rank has left at its deadline, shortly before this one's."""
    monkeypatch.setattr(start, "train_rank", lambda *words: 1)
    monkeypatch.setattr(rank.stop, "overdue", lambda: overdue)
    assert rank.train("prepo.yaml", []) == expected


def test_a_failed_rank_names_those_that_are_not_there(monkeypatch, capsys):
    """Ranks on this machine: one lives, one has ended; and another machine does not answer."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    with socket.create_server(("127.0.0.1", 0)) as lives:
        port = lives.getsockname()[1]
        ended = peers.Peer("rank 1", "127.0.0.2", port)  # its listener is of another address
        known = [peers.Peer("rank 0", "127.0.0.1", port), ended]
        assert rank.name_the_lost(known) == 1
        assert "rank 0: rank 1 on 127.0.0.2 has ended (" in capsys.readouterr().err

        def connect(address, timeout):
            raise TimeoutError("timed out")

        monkeypatch.setattr(socket, "create_connection", connect)
        silent = peers.Peer("rank 2", "node3", port)
        assert rank.name_the_lost([silent]) == peers.UNREACHABLE_EXIT_CODE
    said = capsys.readouterr().err
    assert said == "rank 0: rank 2 on node3 does not answer; machine or network lost (timed out)\n"


def test_each_rank_of_a_node_has_a_port_to_show_that_it_lives(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    known = peers.ranks()
    assert [peer.name for peer in known] == [f"rank {i}" for i in range(16)]
    assert [peer.host for peer in known] == ["gpu08"] * 8 + ["gpu09"] * 8
    used = {nodes.ports(SLURM)[0], *(nodes.server_port(SLURM, i) for i in range(8))}
    assert len({peer.port for peer in known[:8]} - used) == 8
    assert {peer.port for peer in known} <= set(nodes.ports(SLURM))


@pytest.mark.parametrize(
    ("interface", "before", "after"),
    [
        ("eth0", {}, "eth0"),
        ("eth0", {"GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        ("lo", {}, None),
        (None, {}, None),
    ],
)
def test_gloo_takes_the_interface_to_another_node(interface, before, after, monkeypatch):
    asked = []
    monkeypatch.setattr(nodes, "interface_to", lambda host: asked.append(host) or interface)
    environment = SLURM | {"SLURMD_NODENAME": "gpu08"} | before
    nodes.choose_interface(environment)
    assert environment.get("GLOO_SOCKET_IFNAME") == after
    assert asked == ([] if before else ["gpu09"])


def test_the_interface_is_that_of_the_route():
    assert nodes.interface_to("127.0.0.1") == "lo"
    assert nodes.interface_to("no-such-host.invalid") is None


def test_a_rank_that_waits_for_servers_leaves_when_asked(tmp_path):
    """The rank does not train yet: by default the signal would kill it, and fail the job."""
    slurm = SLURM | {"SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "localhost"}
    slurm |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    words = ["--servers-a-node=1", "examples/laptop/prepo.yaml", f"run.dir={tmp_path}"]
    with socket.create_server(("127.0.0.1", nodes.server_port(slurm, 0))) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_prepo.launch.rank", *words],
            env=os.environ | slurm,
            stderr=subprocess.PIPE,
        )
        server.settimeout(60)
        server.accept()  # it asks whether the server is healthy
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()


def test_the_doctor_comes_before_a_cluster(capsys):
    """The examples have no weights here; NeMo-Run is not needed to find that out."""
    words = ["qwen2.5-7b", "--executor", "slurm", "--account", "acct"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "no tokenizer" in said and "nothing was submitted" in said
    assert "ok  " not in said, "only what has to be fixed"


def test_a_plan_that_does_not_fit_comes_before_a_cluster(capsys):
    words = ["qwen2.5-72b", "--executor", "slurm", "--account", "acct", "--no-doctor"]
    small = [*words, "--nodes", "1", "parallel.pipeline=1", "servers.nodes=0"]
    assert main([*small, "weight_sync.transport=value"]) == 1
    said = capsys.readouterr().err
    assert "DOES NOT FIT" in said and "planned for --gpu h100" in said
    assert "nothing was submitted" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--executor", "local", "--chain", "2"], "--chain 2 needs --executor slurm"),
        (["--executor", "slurm", "--chain", "0"], "--chain 0 must be at least 1"),
        (
            ["--executor", "slurm", "--chain", "2", "run.overwrite=true"],
            "each job would delete the results of the previous one",
        ),
        (["--executor", "slurm", "--time", "4hours"], "--time 4hours is not a time limit of Slurm"),
        (
            ["--executor", "slurm", "--chain", "2", "--time", "00:05:00"],
            "--time 00:05:00 leaves no time to train: the job gets the signal to save 360 s before",
        ),
        (["--executor", "slurm", "--time", "8"], "set --time above 480 s"),
        (
            ["--executor", "slurm", "--time", "30", "checkpoint.grace_seconds=1800"],
            "set --time above 1980 s",
        ),
        (["--executor", "slurm", "--time", "10", "--with", "signal=USR1@600"], "above 720 s"),
        (["--executor", "slurm", "--with", "time=08:00:00"], "--with time=...: use --time"),
        (["--executor", "slurm", "--env", "NCCL_DEBUG"], "--env 'NCCL_DEBUG' must have the form"),
        (["--executor", "slurm", "--mount", "/a:/a"], "--mount is for containers: add --image"),
        (
            ["--executor", "kubeflow", "--mount", "/a:/a"],
            "--mount has no effect with --executor",
        ),
        (
            ["--executor", "skypilot", "--time", "08:00:00"],
            "--time has no effect with --executor",
        ),
        (
            ["--executor", "docker", "--account", "a"],
            "--account has no effect with --executor",
        ),
        (["--executor", "local", "--image", "x"], "--image has no effect with --executor local"),
        (
            ["--executor", "local", "--server-nodes", "1", "rollout.engine=sglang"],
            "(--server-nodes) has no effect with --executor local",
        ),
    ],
)
def test_options_that_cannot_go_together_are_refused(words, expected, capsys):
    assert main(["examples/laptop/prepo.yaml", *words]) == 2
    assert expected in capsys.readouterr().err


def commands(directory, **scripts: str) -> str:
    """Write shell scripts as the only commands on PATH."""
    for name, text in scripts.items():
        (directory / name).write_text(f"#!/bin/sh\n{text}\n")
        (directory / name).chmod(0o755)
    return str(directory)


def test_a_launcher_without_slurm_or_accounting_is_told_before_it_submits(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", commands(tmp_path))
    with pytest.raises(UserError, match="needs sbatch, which is not on PATH"):
        executors._check_slurm(wait=False)
    commands(tmp_path, sbatch="exit 0")
    executors._check_slurm(wait=False)
    with pytest.raises(UserError, match="--wait needs sacct"):
        executors._check_slurm(wait=True)
    commands(tmp_path, sacct="echo Slurm accounting storage is disabled >&2; exit 1")
    with pytest.raises(UserError, match="which reports 'Slurm accounting storage is disabled'"):
        executors._check_slurm(wait=True)
    commands(tmp_path, sacct="exit 0")
    executors._check_slurm(wait=True)
    monkeypatch.setenv("NEMORUN_HOME", "/home/me/nemo_run")
    with pytest.raises(UserError, match="a path that contains /nemo_run: /home/me/nemo_run"):
        executors._check_slurm(wait=False)


def test_jobs_that_ended_well_are_no_finished_run(tmp_path):
    job = make_job("examples/laptop/prepo.yaml", [f"run.dir={tmp_path}"])
    with pytest.raises(Stopped, match="the same command resumes it") as stopped:
        executors._raise_if_unfinished(job)
    assert stopped.value.exit_code == STOPPED_EXIT_CODE
    (tmp_path / "summary.json").touch()
    executors._raise_if_unfinished(job)


@pytest.mark.parametrize(
    ("limit", "fits"),
    [("481", True), ("8", False), ("8:01", True), ("0:08:00", False), ("1-0", True), ("0", True)],
)
def test_a_job_must_be_longer_than_its_warning(limit, fits):
    """Limits are minutes, minutes:seconds, hours:minutes:seconds, days-hours; 0: no limit."""
    signal = slurm_time.warning(grace_seconds=300)
    assert signal == "USR1@360"
    if fits:
        return slurm_time.check(limit, signal)
    with pytest.raises(UserError, match="leaves no time to train"):
        slurm_time.check(limit, signal)


def test_without_nemo_run_there_is_a_sentence(capsys, monkeypatch):
    monkeypatch.setenv("NEMORUN_HOME", "unused")
    monkeypatch.setitem(sys.modules, "nemo_run", None)  # as if it were not installed
    assert main(["examples/laptop/prepo.yaml", "--executor", "local"]) == 2
    assert 'pip install -e ".[launch]"' in capsys.readouterr().err


class FakeServer:
    """Replacement for `OwnServer`: a server that ends whenever it is started, or never."""

    made: ClassVar[list] = []
    ends = True

    def __init__(self, config, index, logs, *, cuda, port):
        self.config, self.index, self.logs, self.port = config, index, logs, port
        self.url, self.starts, self.stopped = f"http://{config.servers.host}:{port}", 1, False
        self.made.append(self)

    def ended(self):
        if not self.ends:
            os.kill(os.getpid(), signal.SIGTERM)  # as srun does when the ranks have left
            return None
        return "ended with code 1" if self.index == 1 else None

    def start(self):
        self.starts += 1

    def stop(self):
        self.stopped = True


@pytest.fixture
def node(monkeypatch, tmp_path):
    """Run the servers of the second node of a step."""
    for name, value in (SLURM | {"SLURM_NODEID": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sglang_launch, "OwnServer", FakeServer)
    monkeypatch.setattr(sglang_launch, "check", lambda config: None)
    monkeypatch.setattr(servers, "POLL_SECONDS", 0.01)
    FakeServer.made.clear()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield lambda: servers.main(
        ["--servers-a-node=2", "examples/laptop/prepo.yaml", f"run.dir={tmp_path}"]
    )
    for number, handler in before.items():
        signal.signal(number, handler)


def test_servers_of_a_node_are_started_anew_but_not_for_ever(node, tmp_path, capsys):
    assert node() == 1
    first, second = FakeServer.made
    assert (first.starts, second.starts) == (1, servers.MAX_STARTS)
    assert second.port == first.port + 1 == 20000 + 17 * 32 + 2
    assert second.logs == tmp_path / "logs" / "node_1" and second.config.servers.host == "0.0.0.0"
    assert f":{second.port} ended with code 1" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def test_a_finished_run_gets_no_servers(node, tmp_path):
    finish(tmp_path)
    assert node() == 0 and not FakeServer.made


def test_servers_of_a_node_end_with_the_job(node, monkeypatch):
    monkeypatch.setattr(FakeServer, "ends", False)
    assert node() == 0 and all(server.stopped for server in FakeServer.made)
