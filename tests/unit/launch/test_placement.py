"""What runs where: `plan`, `launch`, `doctor` and `train` say the same of every recipe."""

import dataclasses

import pytest

from megatron_prepo import config as configuration
from megatron_prepo.errors import UserError
from megatron_prepo.launch import doctor, rank, recipes
from megatron_prepo.launch.job import make_job
from megatron_prepo.plan import planner as plan
from megatron_prepo.rollout import placement
from megatron_prepo.rollout.placement import Placement, place
from megatron_prepo.rollout.sglang import launch as sglang
from tests.e2e.laptop import REPOSITORY

SHARED = ("rollout.engine=sglang", "servers.urls=[]", "servers.nodes=0")
VARIANTS = {
    "as it is": (),
    "embedded": ("rollout.engine=embedded", "servers.nodes=0"),
    "shared": (*SHARED, "servers.tensor=4", "weight_sync.transport=value"),
    "two of four": (*SHARED, "servers.tensor=2", "servers.count=2", "weight_sync.transport=disk"),
    "own nodes": (
        "rollout.engine=sglang",
        "servers.nodes=2",
        "servers.tensor=8",
        "weight_sync.transport=distributed",
    ),
    "given": (
        "rollout.engine=sglang",
        "servers.nodes=0",
        "servers.urls=[http://10.0.0.7:30000]",
        "weight_sync.transport=value",
    ),
}


@pytest.fixture(autouse=True)
def a_node_of_eight_gpus(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", sorted(recipes.recipes()))
def test_all_four_agree(monkeypatch, name, variant):
    job = make_job(name, VARIANTS[variant])
    where, config = job.place, job.config
    request = plan.PlanRequest()
    assert plan.placed(plan.as_requested(config, request), request) == where
    assert place(config) == where
    words = job.rank_words()
    if where.started_by == "job":
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        hosts = ",".join(f"n{i}" for i in range(job.nodes))
        monkeypatch.setenv("SLURM_JOB_NODELIST", hosts)
        options = rank.parser().parse_args(words[1:])
        urls = rank.server_urls(options.server_nodes, options.servers_a_node)
        assert len(urls) == where.engines
        given = rank.given_servers(urls, "n0")
        inside = configuration.load(job.path, [*job.overrides, *given])
        assert inside.servers.urls == tuple(urls) and place(inside).started_by == "user"
        return
    assert not any(word.startswith("--servers-a-node") for word in words)
    if where.started_by == "run":
        assert started_here(monkeypatch, config, where) == where.engines


def started_here(monkeypatch, config, where: Placement) -> int:
    """Return the servers that rank 0 starts, after a look at the GPUs that each of them gets."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(where.ranks_per_node))
    count = placement.servers_here(config.servers, cuda=True)
    used = [
        sglang.environment(config.servers, i, cuda=True, base={})["CUDA_VISIBLE_DEVICES"].split(",")
        for i in range(count)
    ]
    devices = [int(device) for own in used for device in own]
    assert len(set(devices)) == len(devices) == where.engine_gpus
    assert max(devices) < where.gpus_per_node
    assert where.shared == (min(devices) < where.ranks_per_node)
    return count


def test_servers_beside_the_ranks_of_one_node_need_its_other_gpus():
    """Four ranks, and two servers of two GPUs on the other four: the job asks for eight."""
    config = configuration.load(
        "examples/paper/qwen2.5-7b/prepo.yaml",
        [
            *("parallel.tensor=4", "parallel.data=1", "rollout.engine=sglang", "servers.nodes=0"),
            *("servers.tensor=2", "servers.first_device=4", "servers.count="),
            "weight_sync.transport=distributed",
        ],
    )
    where = place(config)
    assert (where.ranks_per_node, where.gpus_per_node, where.engines) == (4, 8, 2)
    assert where.gpus == 8 and not where.shared
    job = make_job("qwen2.5-7b", ["parallel.data=1", "servers.first_device=4"][:1])
    assert job.place.gpus_per_node == 4, "without them, four are enough"


def test_an_option_takes_the_place_of_the_setting_for_the_job_and_its_ranks():
    """`--server-nodes`: the ranks and the doctor see the number that the job was placed with."""
    job = make_job("qwen2.5-72b", ["servers.nodes=0"], server_nodes=2)
    assert job.place.server_nodes == job.config.servers.nodes == 2
    assert doctor.examine_inputs(job.config, job.place)[1].what != "placement"
    none = make_job("qwen2.5-7b", VARIANTS["own nodes"][:1], server_nodes=0)
    assert none.place.started_by == "run" and "servers.nodes=0" in none.train_words()


def test_a_machine_without_gpus_refuses_no_transport(monkeypatch):
    """On a CPU gloo reaches servers wherever they are."""
    config = make_job("qwen2.5-7b").config
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    tree = configuration.to_tree(config)
    tree["weight_sync"]["transport"] = "distributed"
    distributed = configuration.from_tree(tree)
    assert doctor._place_here(distributed).shared
    with pytest.raises(UserError, match="needs servers on separate GPUs"):
        placement.check_transport("distributed", place(distributed))


@pytest.mark.parametrize(
    ("ranks", "gpus", "nodes"), [(12, 0, 1), (16, 8, 2), (16, 0, 2), (2, 4, 1)]
)
def test_ranks_of_this_machine_or_of_nodes_like_it(monkeypatch, ranks, gpus, nodes):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    parallel = ["parallel.tensor=1", "parallel.sequence=false", f"parallel.data={ranks}"]
    small = ["weight_sync.transport=value", *parallel]
    config = configuration.load(recipes.find("qwen2.5-7b"), small)
    assert placement.place_here(config).nodes == nodes


def test_a_run_starts_as_many_servers_as_its_ranks_gpus_hold(monkeypatch):
    """Four ranks on a machine of eight GPUs; without GPUs, one server."""
    servers = make_job("qwen2.5-7b").config.servers
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert placement.servers_here(servers, cuda=True) == 4
    assert placement.servers_here(servers, cuda=True, ranks=2) == 2
    assert placement.servers_here(servers, cuda=False) == 1


def test_servers_must_fit_behind_their_first_gpu():
    """Ranks have four of eight GPUs: two servers of two fit on the remaining four, three do not."""
    beside = ["parallel.data=1", "servers.first_device=4", "servers.tensor=2"]
    beside.append("weight_sync.transport=distributed")
    job = make_job("qwen2.5-7b", [*beside, "servers.count=2"])
    assert (job.place.engines, job.place.gpus_per_node) == (2, 8)
    with pytest.raises(UserError, match=r"servers\.count=3 .* do not fit a node of 8 GPUs"):
        make_job("qwen2.5-7b", [*beside, "servers.count=3"])


def test_the_doctor_says_what_runs_where(monkeypatch):
    where = make_job("qwen2.5-7b", VARIANTS["two of four"]).place
    said = doctor._describe_placement(where)
    assert said.startswith("8 ranks on 1 node; engines: 2 of 2 GPUs each on the ranks' GPUs")
    assert said.endswith("started by the run")
    given = dataclasses.replace(where, started_by="user")
    assert "servers.urls" in doctor._describe_placement(given)


def test_a_machine_with_fewer_gpus_than_a_node_needs_is_noted(monkeypatch):
    where = make_job("qwen2.5-7b", VARIANTS["shared"]).place
    assert doctor._enough_gpus(where) == []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    (finding,) = doctor._enough_gpus(where)
    assert finding.state == "note" and "4 here, and 8 are needed" in finding.found


def test_ranks_that_do_not_fill_their_nodes_are_refused():
    config = make_job("qwen2.5-7b", VARIANTS["shared"]).config
    with pytest.raises(
        UserError, match=r"8 ranks of the layout .or --gpus. do not fill nodes of 3 GPUs"
    ):
        place(config, gpus_per_node=3)
