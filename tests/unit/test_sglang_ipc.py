"""Which rank gives which server rank its handle on GPUs; on a CPU: `test_sglang_engine.py`."""

import base64
import pickle
from types import SimpleNamespace

import pytest
import tiny_models
import torch

from megatron_prepo.errors import UserError
from megatron_prepo.rollout.sglang import ipc
from megatron_prepo.rollout.sglang.ipc import ByIPC

CUDA = "cuda"


def config_of(**servers):
    return tiny_models.actor_config(
        "a model",
        rollout={"engine": "sglang", "max_new_tokens": 4},
        servers=servers,
        weight_sync={"transport": "ipc"},
    )


def opened(*arguments):
    """Stands for torch's `rebuild_cuda_tensor`."""
    return SimpleNamespace(by_device=arguments[6], given_by=arguments[7])


def rank_of(config, rank, fleet=None):
    """A trainer rank on GPU `rank`; `gather` gives it rank 0's word that all servers serve."""
    devices = [d for i in range(config.servers.count) for d in ipc._devices_of(config.servers, i)]
    transport = ByIPC(
        fleet,
        config,
        device=torch.device(CUDA, rank),
        rank=rank,
        share=None,
        gather=lambda value: [(None, devices)],
    )
    transport.start({})
    return transport


@pytest.mark.parametrize(
    ("servers", "num_ranks"),
    [({"count": 4}, 4), ({"count": 2, "tensor": 2}, 4), ({"tensor": 2, "first_device": 1}, 4)],
)
def test_each_server_rank_opens_memory_of_its_own_device(monkeypatch, servers, num_ranks):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_ranks))
    config = config_of(**servers)
    part, given = [("a", torch.ones(3))], []
    own = [SimpleNamespace(own=SimpleNamespace(index=i)) for i in range(config.servers.count)]
    fleet = SimpleNamespace(living=lambda: own)
    ipc.check(config, torch.device(CUDA, 0))
    for rank in range(num_ranks + 2):  # the last two on another machine
        monkeypatch.setattr(
            ipc.reductions, "reduce_tensor", lambda flat, r=rank: (opened, (0,) * 6 + (r, r))
        )
        transport = rank_of(config, rank % num_ranks, fleet if rank == 0 else None)
        if rank >= num_ranks:
            transport = ByIPC(
                None,
                config,
                device=torch.device(CUDA, rank % num_ranks),
                rank=rank,
                share=None,
                gather=transport.gather,
            )
            transport.start({})
        given.append(transport._give(part) if transport.gives else None)
    for server in own:
        for rank, string in enumerate(rank_of(config, 0, fleet)._payloads(server, given)):
            handle = pickle.loads(base64.b64decode(string))["flattened_tensor"]
            device = config.servers.first_device + server.own.index * config.servers.tensor + rank
            assert (handle.by_device, handle.given_by) == (rank, device)


def test_a_lost_server_is_given_nothing(monkeypatch):
    """What nobody lets go of would stay in the device's memory."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fleet = SimpleNamespace(living=lambda: [SimpleNamespace(own=SimpleNamespace(index=1))])
    words = []
    transport = ByIPC(
        fleet,
        config_of(count=2),
        device=torch.device(CUDA, 0),
        rank=0,
        share=None,
        gather=lambda value: words.append(value) or [value],
    )
    transport.start({})
    assert words == [(None, [1])] and not transport.gives


@pytest.mark.parametrize(
    ("servers", "named"),
    [
        ({"count": 3}, r"devices \[2\]"),
        ({"first_device": 2, "tensor": 2}, r"devices \[2, 3\]"),
        ({"urls": ["http://127.0.0.1:1"]}, "servers.urls"),
    ],
)
def test_servers_on_devices_that_no_rank_has(monkeypatch, servers, named):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=named):
        ipc.check(config_of(**servers), torch.device(CUDA, 0))
    ipc.check(config_of(**servers), torch.device("cpu"))
