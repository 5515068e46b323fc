"""Ranks and the server ranks that open their handles on GPUs; on a CPU: `test_sglang_engine.py`."""

import base64
import pickle
from types import SimpleNamespace

import pytest
import tiny_models
import torch

from megatron_prepo.errors import UserError
from megatron_prepo.rollout.sglang import ipc
from megatron_prepo.rollout.sglang.ipc import ByIPC


def config_of(**servers):
    return tiny_models.actor_config(
        "a model",
        rollout={"engine": "sglang", "max_new_tokens": 4},
        servers=servers,
        weight_sync={"transport": "ipc"},
    )


def opened(*arguments):
    """Stand-in for torch's `rebuild_cuda_tensor`."""
    return SimpleNamespace(by_device=arguments[6], given_by=arguments[7])


def rank_of(config, rank, *, device, fleet=None, alive=None):
    """A trainer rank on that GPU; rank 0's word on which servers serve reaches it."""
    devices = ipc._devices(config.servers) if alive is None else alive
    transport = ByIPC(
        fleet,
        config.servers,
        config.weight_sync,
        device=torch.device("cuda", device),
        rank=rank,
        share=None,
        gather=lambda value: [value if rank == 0 else (None, devices)],
    )
    transport.start({})
    return transport


def fleet_of(*indexes):
    servers = [SimpleNamespace(own=SimpleNamespace(index=index)) for index in indexes]
    return SimpleNamespace(alive=lambda: servers)


@pytest.mark.parametrize(
    "servers",
    [{"count": 4}, {"count": 2, "tensor": 2}, {"count": 1, "tensor": 2, "first_device": 1}],
)
def test_each_server_rank_opens_memory_of_its_own_device(monkeypatch, servers):
    """Eight ranks are on two machines with four GPUs each; those of the first give handles."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = config_of(**servers)
    ipc.check(config.servers, torch.device("cuda", 0))
    fleet, given = fleet_of(*range(config.servers.count)), []
    for rank in range(8):
        monkeypatch.setattr(
            ipc.reductions, "reduce_tensor", lambda flat, r=rank: (opened, (0,) * 6 + (r, r))
        )
        ours = rank_of(config, rank, device=rank % 4, fleet=fleet if rank == 0 else None)
        given.append(ours._give([("a", torch.ones(3))]) if ours.gives else None)
    assert given[4:] == [None] * 4
    for server in fleet.alive():
        for rank, string in enumerate(ours._payloads(server, given)):
            handle = pickle.loads(base64.b64decode(string))["flattened_tensor"]
            device = config.servers.first_device + server.own.index * config.servers.tensor + rank
            assert (handle.by_device, handle.given_by) == (rank, device)


def test_a_lost_server_is_given_nothing(monkeypatch):
    """Memory that no process releases would stay allocated on the device."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = config_of(count=2)
    assert not rank_of(config, 0, device=0, fleet=fleet_of(1)).gives
    assert rank_of(config, 1, device=1, alive=[1]).gives
    assert not rank_of(config, 1, device=1, alive=[0]).gives


@pytest.mark.parametrize(
    ("servers", "named"),
    [
        ({"count": 3}, r"devices \[2\]"),
        ({"count": 1, "first_device": 2, "tensor": 2}, r"devices \[2, 3\]"),
        ({"urls": ["http://127.0.0.1:1"]}, "servers.urls"),
    ],
)
def test_servers_on_devices_that_no_rank_has(monkeypatch, servers, named):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=named):
        ipc.check(config_of(**servers).servers, torch.device("cuda", 0))
    ipc.check(config_of(**servers).servers, torch.device("cpu"))
