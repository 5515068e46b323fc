"""Servers that a run starts itself: how they are started, and that no process of them remains."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import fake_sglang_package
import pytest
import tiny_models
import torch
from fake_sglang import FakeSGLang
from fake_sglang_package import alive, processes, wait_for, wait_until_gone

from megatron_prepo.config import to_tree
from megatron_prepo.errors import UserError
from megatron_prepo.process import ports
from megatron_prepo.rollout.engine import EngineError
from megatron_prepo.rollout.sglang import launch
from megatron_prepo.rollout.sglang.engine import SGLangEngine
from megatron_prepo.rollout.sglang.launch import STAND_INS, OwnServer, arguments, environment
from megatron_prepo.rollout.weight_sync import sync_weights
from tests.unit.rollout.test_sglang_engine import PROBE, FakeActor, rollouts


def config_of(hf="a model", **sections):
    rollout = {"engine": "sglang", "max_new_tokens": 12}
    sections["rollout"] = rollout | sections.get("rollout", {})
    return tiny_models.actor_config(str(hf), **sections)


def option(words: list[str], name: str) -> str | None:
    """Return the word after an option; None if it is a bare flag or missing."""
    value = words[words.index(name) + 1] if name in words[:-1] else "--"
    return None if value.startswith("--") else value


def test_arguments_on_a_cpu():
    assert arguments(config_of(), 0, port=4711, cuda=False) == [
        *("--model-path", "a model", "--host", "127.0.0.1", "--port", "4711", "--tp-size", "1"),
        *("--dtype", "float32", "--load-format", "dummy", "--random-seed", "1"),
        *("--skip-tokenizer-init", "--skip-server-warmup", "--device", "cpu"),
        *("--attention-backend", "torch_native", "--disable-cuda-graph"),
        *("--enable-deterministic-inference", "--max-total-tokens", "65536", "--sleep-on-idle"),
    ]


def test_arguments_on_gpus():
    servers = {"tensor": 4, "count": 2, "release_memory": True, "host": "10.0.0.1"}
    words = arguments(config_of(servers=servers), 1, port=1, cuda=True)
    assert (option(words, "--tp-size"), option(words, "--random-seed")) == ("4", "2")
    assert option(words, "--host") == "10.0.0.1" and "--enable-memory-saver" in words
    assert "--device" not in words and "--enable-deterministic-inference" not in words
    servers["release_memory"] = False
    words = arguments(config_of(servers=servers), 1, port=1, cuda=True)
    assert "--enable-memory-saver" not in words


@pytest.mark.parametrize("asked", [False, True])
def test_our_servers_tell_their_experts_if_they_are_to_be_replayed(asked):
    words = arguments(config_of(rollout={"router_replay": asked}), 0, port=1, cuda=True)
    assert ("--enable-return-routed-experts" in words) is asked


def test_arguments_of_sglang_pass_through():
    own = {
        "mem_fraction_static": 0.8,
        "enable-metrics": True,
        "disable_radix_cache": False,
        "cuda_graph_bs": [1, 2],
        "load_format": "auto",
        "skip_server_warmup": None,
    }
    words = arguments(config_of(sglang=own), 0, port=1, cuda=True)
    assert option(words, "--mem-fraction-static") == "0.8" and "--enable-metrics" in words
    assert "--disable-radix-cache" not in words and "--skip-server-warmup" not in words
    assert words[words.index("--cuda-graph-bs") :][:3] == ["--cuda-graph-bs", "1", "2"]
    assert words.count("--load-format") == 1 and option(words, "--load-format") == "auto"


@pytest.mark.parametrize(
    ("model", "sglang", "flag", "engine"),
    [
        ({"dtype": "float32"}, {}, False, None),
        ({"dtype": "bfloat16"}, {}, True, True),
        ({"dtype": "bfloat16", "fp32_lm_head": False}, {}, False, False),
        ({"dtype": "bfloat16"}, {"enable-fp32-lm-head": False}, False, False),
    ],
)
def test_a_servers_logits_are_as_the_actors(model, sglang, flag, engine):
    config = config_of(model={"hf": "a model"} | model, sglang=sglang)
    words = arguments(config, 0, port=1, cuda=True)
    assert ("--enable-fp32-lm-head" in words) is flag
    assert launch.fp32_lm_head(config) is engine


@pytest.mark.parametrize(
    ("tensor", "first", "index", "visible", "devices"),
    [
        (1, 0, 0, None, "0"),
        (1, 0, 3, None, "3"),
        (2, 4, 1, None, "6,7"),
        (2, 0, 1, "4,5,6,7", "6,7"),
        (1, 2, 0, "GPU-a,GPU-b,GPU-c", "GPU-c"),
    ],
)
def test_each_server_has_its_devices(tensor, first, index, visible, devices):
    config = config_of(servers={"tensor": tensor, "first_device": first, "count": index + 1})
    base = {"RANK": "0", "MASTER_PORT": "1", "PATH": "p"}
    base |= {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    own = environment(config.servers, index, cuda=True, base=base)
    assert own == {"PATH": "p", "CUDA_VISIBLE_DEVICES": devices}


def test_too_few_devices():
    config = config_of(servers={"tensor": 2, "first_device": 1})
    with pytest.raises(UserError, match="needs 2 devices from number 1 on"):
        environment(config.servers, 0, cuda=True, base={"CUDA_VISIBLE_DEVICES": "0,1"})


def test_the_stand_ins_are_for_servers_on_a_cpu():
    config = config_of(servers={"tensor": 2})
    own = environment(config.servers, 0, cuda=False, base={"PYTHONPATH": "mine", "WORLD_SIZE": "2"})
    assert own["PYTHONPATH"] == f"{STAND_INS}{os.pathsep}mine" and "WORLD_SIZE" not in own
    assert own["SGLANG_USE_CPU_ENGINE"] == "1" and "|" in own["SGLANG_CPU_OMP_THREADS_BIND"]
    assert (STAND_INS / "sitecustomize.py").is_file()


def test_what_a_user_can_get_wrong_is_said_before_anything_starts(tmp_path):
    for wrong, named in (
        ({"sglang": {"tp-size": 2}}, "sglang.tp-size"),
        ({"sglang": {"port": 1}}, "sglang.port"),
        ({"servers": {"python": str(tmp_path / "absent")}}, "absent does not run"),
        ({"servers": {"python": sys.executable}}, "has no SGLang"),
    ):
        with pytest.raises(UserError, match=named):
            launch.check(config_of(**wrong))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mem_fraction_static": "0.8x"}, r"--mem-fraction-static: invalid float value: '0\.8x'"),
        ({"chunked_prefill_size": 1.5}, r"--chunked-prefill-size: invalid int value: '1\.5'"),
        ({"mem_fraction": 0.8}, r"sglang\.mem_fraction: SGLang has no option --mem-fraction$"),
        ({"mem-fraction-static": True}, r"mem-fraction-static=true: .* takes a value"),
        ({"mem_fraction_static": False}, r"mem_fraction_static=false: .* takes a value"),
        ({"enable_metrics": "off"}, r'enable_metrics="off": .* is true or false'),
        ({"enable_metrics": 1}, "enable_metrics=1: .* is true or false"),
        ({"overlap": False}, r"sglang\.overlap=false: write sglang\.no_overlap=true"),
        ({"cuda_graph_bs": [1, "x"]}, "--cuda-graph-bs: invalid int value: 'x'"),
        ({"log_level": "loud"}, "--log-level: invalid choice: 'loud'"),
    ],
)
def test_a_setting_that_sglang_would_not_take_is_said_by_its_own_parser(
    tmp_path, monkeypatch, setting, message
):
    fake_sglang_package.install(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=message) as caught:
        launch.check(config_of(sglang=setting))
    assert str(caught.value).isprintable()


def test_settings_that_sglang_takes(tmp_path, monkeypatch):
    fake_sglang_package.install(tmp_path, monkeypatch)
    taken = {"mem_fraction_static": 1e-5, "enable_metrics": False, "no_overlap": True}
    taken |= {"cuda_graph_bs": [1, 2], "json_model_override_args": {"rope": {"factor": 8.0}}}
    launch.check(config_of(sglang=taken | {"load_format": None, "log-level": "error"}))


def test_what_is_no_text_reaches_sglang_as_json():
    own = {
        "json_model_override_args": {"a": [1, None, True]},
        "a_number": 1e-05,
        "many": [0.5, "x"],
    }
    words = arguments(config_of(sglang=own), 0, port=1, cuda=True)
    assert option(words, "--json-model-override-args") == '{"a": [1, null, true]}'
    assert option(words, "--a-number") == "1e-05"
    assert words[words.index("--many") :][:3] == ["--many", "0.5", "x"]


def test_an_sglang_that_cannot_be_imported_is_said(tmp_path, monkeypatch):
    fake_sglang_package.install(tmp_path, monkeypatch)
    (tmp_path / "sglang" / "srt" / "server_args.py").write_text("import no_such_kernel")
    with pytest.raises(UserError, match=r"cannot be imported: .*no_such_kernel"):
        launch.check(config_of(sglang={"enable_metrics": True}))


def test_given_servers_have_to_be_there():
    with FakeSGLang() as fake:
        launch.check_given(config_of(servers={"urls": [fake.url]}).servers)
        fake.fault = lambda path, body: "500"
        with pytest.raises(UserError, match=f"{fake.url}/health answers 500"):
            launch.check_given(config_of(servers={"urls": [fake.url]}).servers)
        fake.fault = lambda path, body: "reset"
        with pytest.raises(UserError, match=f"no answer from {fake.url}/health"):
            launch.check_given(config_of(servers={"urls": [fake.url]}).servers)


@pytest.fixture
def pids(tmp_path, monkeypatch):
    return fake_sglang_package.install(tmp_path / "package", monkeypatch)


def test_stopping_a_server_ends_all_its_processes(tmp_path, pids):
    server = OwnServer(config_of(), 0, tmp_path / "logs", cuda=False)
    ids = processes(pids)
    assert server.ended() is None
    server.stop()
    server.stop()
    wait_until_gone(ids, seconds=1.0)
    assert "ended with SIGTERM" in server.ended() and "the fake is starting" in server.ended()


TRAINER = """
import json, sys, time
from pathlib import Path
from megatron_prepo.config import from_tree
from megatron_prepo.rollout.sglang.launch import OwnServer
config = from_tree(json.loads(sys.argv[2]))
servers = [OwnServer(config, i, Path(sys.argv[1]), cuda=False) for i in range(2)]
sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT", "an exception", "the end"])
def test_servers_end_with_the_trainer_however_that_ends(tmp_path, pids, how):
    last = {"an exception": "raise ValueError", "the end": ""}.get(how, "time.sleep(600)")
    path = [os.environ["PYTHONPATH"], *filter(None, sys.path)]
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER + last, str(tmp_path), json.dumps(to_tree(config_of()))],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )
    ids = processes(pids, servers=2)
    trainer.stdin.write(b"go on\n")
    trainer.stdin.flush()
    if how.startswith("SIG"):
        trainer.send_signal(signal.Signals[how])
    trainer.wait(timeout=60)
    wait_until_gone(ids)


def build(hf, tmp_path, transport="value", seconds=30.0, address="127.0.0.1", **servers):
    config = config_of(
        hf,
        run={"dir": str(tmp_path / "run")},
        servers={"python": sys.executable, "start_seconds": 60.0, "connect_seconds": 5.0} | servers,
        weight_sync={
            "verify": "always",
            "transport": transport,
            "request_seconds": seconds,
            "address": address,
        },
    )
    engine = SGLangEngine(
        config,
        SimpleNamespace(eos_token_id=2, decode=lambda tokens, **_: ""),
        device=torch.device("cpu"),
        log=lambda sentence: said.append(sentence),
    )
    said = engine.said = []
    return engine, config


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return tiny_models.save(tiny_models.qwen3(tied=False), tmp_path_factory.mktemp("hf"))


def test_a_server_that_does_not_start_is_shown_with_its_last_lines(tmp_path, pids, hf, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "1")
    engine, config = build(hf, tmp_path)
    with pytest.raises(EngineError) as error:
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
    engine.close()
    for part in ("ended with code 1", "sglang_0.log", "the fake cannot find its model"):
        assert part in str(error.value)


def test_slurms_warning_before_the_time_limit_is_not_for_servers(tmp_path, pids, hf):
    """Slurm sends it to all processes of a job."""
    engine, config = build(hf, tmp_path)
    try:
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
        guard = engine.fleet.servers[0].own.process.pid
        for pid in [guard, *processes(pids)]:
            os.kill(pid, signal.SIGUSR1)
        assert len(rollouts(engine)) == 12 and not engine.said
        assert all(alive(pid) for pid in [guard, *processes(pids)])
    finally:
        engine.close()


def test_servers_and_rank_0_may_have_ipv6_addresses(tmp_path, pids, hf):
    engine, config = build(hf, tmp_path, "distributed", address="::1", host="::1")
    try:
        launch.check_host(config.servers)
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
        assert len(rollouts(engine)) == 12
        assert engine.fleet.servers[0].url.startswith("http://[::1]:2")
    finally:
        engine.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(host):
    with pytest.raises(UserError, match=f"^servers.host={host} is no address to listen at here: "):
        launch.check_host(config_of(servers={"host": host}).servers)


def test_a_killed_server_is_started_anew_and_brought_to_the_current_weights(tmp_path, pids, hf):
    engine, config = build(hf, tmp_path, count=2)
    actor = FakeActor(hf)
    try:
        sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
        victim, child = processes(pids, servers=2)[:2]
        os.kill(victim, signal.SIGKILL)
        wait_until_gone([victim, child])
        guards = [server.own for server in engine.fleet.servers]
        wait_for("the guard's end", lambda: any(guard.ended() for guard in guards))
        assert len(rollouts(engine)) == 12
        assert "is given up" in engine.said[0] and "ended with SIGKILL" in engine.said[0]
        actor.update()
        sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
        assert "serves again" in engine.said[-1] and len(engine.fleet.alive()) == 2
        assert {r.weight_version for r in rollouts(engine)} == {1}
    finally:
        engine.close()
    wait_until_gone(processes(pids, servers=3))


@pytest.mark.parametrize(
    ("transport", "path", "left"),
    [
        ("value", "update_weights_from_tensor", 1),
        ("ipc", "update_weights_from_tensor", 1),
        ("disk", "update_weights_from_disk", 1),
        ("distributed", "update_weights_from_distributed", 2),
    ],
)
def test_a_server_killed_in_the_middle_of_a_sync(
    tmp_path, pids, hf, monkeypatch, transport, path, left
):
    """All other servers continue without it; a broadcast, which needs all of them, is repeated."""
    monkeypatch.setenv("FAKE_DIES_AT", str(tmp_path / path))
    engine, config = build(hf, tmp_path, transport, count=2)
    actor = FakeActor(hf)
    try:
        sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
        assert "is given up" in engine.said[0] and path in engine.said[0]
        assert "ended with SIGKILL" in engine.said[0] and "sglang_" in engine.said[0]
        assert len(engine.fleet.alive()) == left and len(rollouts(engine)) == 12
        actor.update()
        sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
        assert len(engine.fleet.alive()) == 2
        assert {r.weight_version for r in rollouts(engine)} == {1}
    finally:
        engine.close()
    wait_until_gone(processes(pids, servers=3))


@pytest.mark.parametrize(("count", "victim"), [(2, 0), (2, 1), (1, 0)])
def test_a_server_gone_before_a_broadcast_takes_nothing_along(
    tmp_path, pids, hf, monkeypatch, count, victim
):
    """gloo sends nothing to the second without the first: it would wait for its own deadline."""
    engine, config = build(hf, tmp_path, "distributed", count=count)
    broadcast, gone = torch.distributed.broadcast, []

    def late(*arguments, **options):
        if not gone:
            gone.append(engine.fleet.servers[victim])
            gone[0].own.stop()
        return broadcast(*arguments, **options)

    monkeypatch.setattr(torch.distributed, "broadcast", late)
    try:
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
        assert sum("is given up" in sentence for sentence in engine.said) == 1
        assert len(engine.fleet.alive()) == count and len(rollouts(engine)) == 12
    finally:
        engine.close()
    wait_until_gone(processes(pids, servers=count + 1))


def test_a_server_that_dies_while_a_group_is_founded(tmp_path, pids, hf, monkeypatch):
    """The other server, which waits for it, gets an error; the dead one is restarted, and the run
    continues."""
    monkeypatch.setenv("FAKE_DIES_AT", str(tmp_path / "init_weights_update_group"))
    monkeypatch.setenv("FAKE_DIES_AFTER_OTHERS", "1")
    deadline = 60.0
    engine, config = build(hf, tmp_path, "distributed", count=2, seconds=deadline)
    started = time.monotonic()
    try:
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
        assert time.monotonic() - started < deadline
        assert "init_weights_update_group" in engine.said[0]
        assert len(engine.fleet.alive()) == 2 and len(rollouts(engine)) == 12
    finally:
        engine.close()
    wait_until_gone(processes(pids, servers=3))


@pytest.mark.parametrize(("own", "given"), [({}, None), ({"nccl_port": 23456}, "23456")])
def test_ranks_of_a_server_meet_at_a_port_that_linux_gives_to_no_connection(
    monkeypatch, tmp_path, own, given
):
    """SGLang's own choice is one of Linux's, which a connection may get before its ranks listen."""
    started = []
    monkeypatch.setattr(launch.subprocess, "Popen", lambda words, **_: started.append(words))
    monkeypatch.setattr(launch, "_end", lambda process: None)
    launch.OwnServer(config_of(sglang=own), 0, tmp_path, cuda=False)
    [words] = started
    assert words.count("--nccl-port") == 1
    port = words[words.index("--nccl-port") + 1]
    assert port == given if given else ports.FIRST <= int(port) <= ports.LAST
