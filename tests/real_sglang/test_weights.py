"""Real SGLang servers have the actor's weights after each kind of sync, from each layout.

One server per family starts with random weights (`load_format: dummy`); each case gives it others.
`make test` does this with one family, `make test-sglang` with all.
"""

import contextlib
import itertools
import os
import signal
import time
import urllib.request
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from fake_sglang_package import wait_until_gone
from ranks import join, on_ranks
from transformers_scores import judged

from megatron_prepo.config import Config
from megatron_prepo.records import Prompt, ScoredSequence
from megatron_prepo.rollout.engine import Request
from megatron_prepo.rollout.sglang.launch import OwnServer
from megatron_prepo.rollout.weight_sync import TOLERANCE

MODELS = {
    "qwen2": tiny_models.qwen2,
    "qwen3": lambda: tiny_models.qwen3(tied=False),
    "qwen3_moe": tiny_models.qwen3_moe,
    "llama3": tiny_models.llama3,
    "mistral": tiny_models.mistral,
    "qwen3 on a server of two ranks": lambda: tiny_models.qwen3(tied=True),
}
LAYOUTS = {"tp1": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}
TRANSPORTS = ("value", "ipc", "disk", "distributed")
CASES = list(itertools.product(LAYOUTS, TRANSPORTS))
SCALES = {case: 1 + 0.02 * i for i, case in enumerate(CASES)}
"""Factors on the weights, so that no two cases have the same."""
TEMPERATURE = 0.8
PROMPTS = [
    Prompt(f"p{i}", "", "", tuple(3 + (7 * i + j * j) % 250 for j in range(9 + 4 * i)), (0, 0))
    for i in range(6)
]


def config_of(hf: str, directory, python: str, name: str, **sections) -> Config:
    servers = {"python": python, "start_seconds": 600.0, "connect_seconds": 120.0}
    servers["tensor"] = 2 if "two ranks" in name else 1
    return tiny_models.actor_config(
        hf,
        run={"dir": str(directory)},
        rollout={"engine": "sglang", "max_new_tokens": 16, "temperature": TEMPERATURE},
        servers=servers | sections.pop("servers", {}),
        **sections,
    )


def every_sync(hf: str, directory: str, url: str, name: str) -> dict:
    """Return, on each rank, {(layout, transport): result of the sync and of rollouts after it}."""
    return {
        (layout, transport): one_sync(
            config_of(
                hf,
                directory,
                "unused",
                name,
                parallel=LAYOUTS[layout],
                servers={"urls": [url]},
                weight_sync={"transport": transport, "bucket_mb": 1},
            ),
            scale,
        )
        for (layout, transport), scale in SCALES.items()
    }


def one_sync(config: Config, scale: float) -> dict | None:
    """Sync the weights, scaled, of an actor."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor
    from megatron_prepo.records import scored_sequence
    from megatron_prepo.rollout.weight_sync import sync_weights, verify

    # a rank that takes no part in a case waits in the next one, and for the server's start
    if not join(config.parallel.num_ranks, timeout_s=1200.0):
        return None
    parallel.initialize(config.parallel, seed=1)
    actor = Actor(config)
    with torch.no_grad():
        for parameter in actor.chunks[0].parameters():
            parameter.mul_(scale)
    engine = engine_of(config, rank=torch.distributed.get_rank())
    sync_weights(actor, engine, config.model, config.weight_sync, PROMPTS[0].tokens)
    prompt_difference = verify(actor, engine, PROMPTS[-1].tokens, tolerance=TOLERANCE["float32"])
    rollouts = generate(engine)
    scores = actor.score([scored_sequence(r) for r in rollouts], temperature=TEMPERATURE)
    difference_T = torch.cat(
        [
            (s.logprobs_T - torch.tensor(r.engine_logprobs)).abs()
            for s, r in zip(scores, rollouts, strict=True)
        ]
    )
    tokens = [r.tokens for r in rollouts]
    repeated = [r.tokens for r in generate(engine)] == tokens
    engine.close()
    parallel.shut_down()
    return {
        "prompt": prompt_difference,
        "rollouts at most": float(difference_T.max()),
        "repeated": repeated,
        "tokens": tokens,
    }


def engine_of(config: Config, rank: int = 0):
    from megatron_prepo.actor import parallel
    from megatron_prepo.rollout.sglang.engine import SGLangEngine

    return SGLangEngine(
        config,
        SimpleNamespace(eos_token_id=2, decode=lambda tokens, **_: ""),
        device=torch.device("cpu"),
        rank=rank,
        share=parallel.from_rank_zero_when_done,
        gather=parallel.gather_to_all,
    )


def generate(engine):
    request = Request(
        prompts=PROMPTS,
        samples_per_prompt=4,
        temperature=TEMPERATURE,
        max_new_tokens=16,
        seed="1/x",
    )
    return engine.generate(request)


def wait_until_healthy(server: OwnServer, seconds: float = 1200.0) -> None:
    """Wait until the server that the ranks use is healthy."""
    deadline = time.monotonic() + seconds
    while True:
        assert server.ended() is None and time.monotonic() < deadline, server.last_lines()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{server.url}/health", timeout=60)
            return
        time.sleep(1)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name == "qwen2" else pytest.mark.slow) for name in MODELS
    ],
)
def results(request, sglang_python, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sglang")
    hf = tiny_models.save(MODELS[request.param](), directory / "hf")
    config = config_of(hf, directory, sglang_python, request.param)
    server = OwnServer(config, 0, directory / "logs", cuda=False)
    try:
        wait_until_healthy(server)
        answers = on_ranks(
            2, every_sync, hf, str(directory), server.url, request.param, deadline_s=1500.0
        )
        assert server.ended() is None
        return answers, rounding(MODELS[request.param](), answers[0], directory / "scaled")
    finally:
        server.stop()


def rounding(model, answers: dict, directory) -> float:
    """Return a log-probability's error in float32, by the largest weights and their rollouts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(max(SCALES.values()))
    texts = [prompt.tokens for prompt in PROMPTS for _ in range(4)]
    sequences = [
        ScoredSequence(text + tokens, 1)
        for text, tokens in zip(texts, answers[CASES[-1]]["tokens"], strict=True)
    ]
    [(_, allowed)] = judged(tiny_models.save(model, directory), sequences, (TEMPERATURE,))
    return allowed


@pytest.mark.parametrize(("layout", "transport"), CASES)
def test_the_servers_log_probabilities_are_the_actors(results, layout, transport):
    """Log-probabilities of a prompt, on average, and of the server's own rollouts at the sampling
    temperature, one by one; both sides may err."""
    answers, allowed = results
    for rank in answers:
        if (answer := rank[layout, transport]) is not None:
            assert max(answer["prompt"], answer["rollouts at most"]) <= 2 * allowed
            assert answer["tokens"] == answers[0][layout, transport]["tokens"]


def test_seeds_repeat_a_rollout_and_samples_differ(results):
    for answer in results[0][0].values():
        assert answer["repeated"]
        assert len(set(answer["tokens"])) > len(PROMPTS)


def faults(hf: str, directory: str, python: str) -> dict:
    """Return messages of an engine whose own server is tampered with."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor
    from megatron_prepo.rollout.engine import EngineError
    from megatron_prepo.rollout.weight_sync import sync_weights

    def message(function) -> str:
        try:
            function()
        except EngineError as error:
            return str(error)
        return "no error"

    config = config_of(hf, directory, python, "qwen3", weight_sync={"transport": "distributed"})
    parallel.initialize(config.parallel, seed=1)
    actor, engine, found = Actor(config), engine_of(config), {}
    sync_weights(actor, engine, config.model, config.weight_sync, PROMPTS[0].tokens)
    [server] = engine.fleet.servers
    request = urllib.request.Request(
        f"{server.url}/update_weight_version",
        b'{"new_version": "another"}',
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=60)
    found["stale"] = message(lambda: generate(engine))
    sync_weights(
        actor, engine, config.model, config.weight_sync, PROMPTS[0].tokens
    )  # the server is restarted
    found["after a restart"] = message(lambda: generate(engine))
    os.killpg(next(iter(children(server.own.process.pid))), signal.SIGSTOP)
    engine.fleet.settings = config_of(
        hf, directory, python, "qwen3", servers={"request_seconds": 3.0}
    ).servers
    found["frozen"] = message(lambda: generate(engine))
    processes = group(next(iter(children(server.own.process.pid))))
    engine.close()
    wait_until_gone(processes)
    found["processes"] = len(processes)
    return found


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def group(leader: int) -> list[int]:
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and group_of(pid) == leader]


def group_of(pid: str) -> int | None:
    try:
        return os.getpgid(int(pid))
    except ProcessLookupError:
        return None


@pytest.mark.slow
def test_a_tampered_server_is_refused_started_anew_and_a_frozen_one_ended(sglang_python, tmp_path):
    hf = tiny_models.save(tiny_models.qwen3(tied=False), tmp_path / "hf")
    [found] = on_ranks(1, faults, hf, str(tmp_path), sglang_python, deadline_s=1500.0)
    assert "by weights another" in found["stale"]
    assert found["after a restart"] == "no error"
    assert "no answer from" in found["frozen"]
    assert found["processes"] >= 3
