"""The SGLang engine with fake servers: what a weight sync does, and what stops it."""

import threading
from types import SimpleNamespace

import fake_sglang
import megatron.core  # noqa: F401  changes what torch pickles, and every actor imports it
import pytest
import tiny_models
import torch
from fake_sglang import FakeSGLang
from safetensors.torch import load_file

from megatron_prepo.records import Prompt
from megatron_prepo.rollout import weight_sync
from megatron_prepo.rollout.engine import EngineError, Request
from megatron_prepo.rollout.sglang import ipc
from megatron_prepo.rollout.sglang.engine import SGLangEngine, shares_gpus
from megatron_prepo.rollout.weight_sync import check_names, sync_weights

ARCHITECTURES = ("Qwen3ForCausalLM",)
PROBE = (5, 6, 7, 8)
PROMPTS = [Prompt(f"p{i}", "", "", (5, 6, 7 + i), (0, 0)) for i in range(4)]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return tiny_models.save(tiny_models.qwen3(tied=False), tmp_path_factory.mktemp("hf"))


@pytest.fixture
def fakes():
    with FakeSGLang() as one, FakeSGLang(sessions=False, num_ranks=2) as two:
        yield one, two


class FakeActor:
    """Weights under Hugging Face names, and the log-probability that the fakes derive from them."""

    def __init__(self, hf: str, updates: int = 0):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(hf)
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        self.updates = updates

    def update(self) -> None:
        self.weights = {name: tensor + 0.5 for name, tensor in self.weights.items()}
        self.updates += 1

    def hf_weights(self):
        yield from self.weights.items()

    def hf_shapes(self):
        return {name: (t.dtype, tuple(t.shape)) for name, t in self.weights.items()}

    def score(self, sequences, *, temperature):
        assert temperature == 1.0
        value = fake_sglang.prompt_logprob(self.weights)
        return [SimpleNamespace(logprobs_T=torch.full((s.num_scored,), value)) for s in sequences]


@pytest.fixture
def build(hf, tmp_path):
    """Build an engine for some fakes, closed at the end, and its configuration."""
    engines = []

    def build(fakes, servers=None, model=None, router_replay=False, **sync):
        config = tiny_models.actor_config(
            hf,
            model={"hf": hf, "dtype": "float32"} | (model or {}),
            run={"dir": str(tmp_path / "run")},
            rollout={
                "engine": "sglang",
                "max_new_tokens": 12,
                "router_replay": router_replay,
            },
            servers={
                "urls": [fake.url for fake in fakes],
                "request_seconds": 20.0,
                "connect_seconds": 10.0,
                "start_seconds": 2.0,
            }
            | (servers or {}),
            weight_sync={"bucket_mb": 1, "request_seconds": 20.0} | sync,
        )
        said = []
        engine = SGLangEngine(
            config,
            SimpleNamespace(eos_token_id=2, decode=lambda tokens, **_: " ".join(map(str, tokens))),
            device=torch.device("cpu"),
            log=said.append,
        )
        engine.said = said
        engines.append(engine)
        return engine, config

    yield build
    for engine in engines:
        engine.close()


def request(prompts=PROMPTS, **options) -> Request:
    return Request(
        prompts=prompts,
        temperature=1.0,
        max_new_tokens=12,
        seed="1/x",
        **{"samples_per_prompt": 3} | options,
    )


def rollouts(engine, **options):
    return engine.generate(request(**options))


def test_only_what_is_not_paid_is_asked_for_and_all_is_kept_as_it_comes(build, hf, fakes):
    engine, config = build(fakes[:1], verify="never")
    sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
    kept = {}
    whole = rollouts(engine, on_rollouts=kept.update)
    keys = [(prompt.id, sample) for prompt in PROMPTS for sample in range(3)]
    assert [kept[key] for key in keys] == whole and len(fakes[0].requests) == 12
    paid, came = {key: kept[key] for key in keys[1:6]}, []
    assert rollouts(engine, cached=paid, on_rollouts=came.append) == whole
    assert {key for kept in came for key in kept} == set(keys) - paid.keys()
    assert len(came) == 7 and set(fakes[0].answered.values()) == {1, 2}
    assert sorted(fakes[0].answered.values()).count(2) == 7
    asked = list(fakes[0].calls)
    assert rollouts(engine, cached=kept) == whole
    assert fakes[0].calls == asked, "all rollouts are reused: no request to a server"


def test_groups_may_differ_in_size_and_begin_later(build, hf, fakes):
    engine, config = build(fakes, verify="never")
    sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
    whole, numbers = rollouts(engine), [range(1), range(1, 3), range(3), range(2, 3)]
    found = rollouts(engine, samples_per_prompt=numbers)
    same = [whole[3 * k + n] for k, of_prompt in enumerate(numbers) for n in of_prompt]
    assert [r.prompt.id for r in found] == [r.prompt.id for r in same]
    assert [r.tokens for r in found] == [r.tokens for r in same]


def test_what_keeps_a_rollout_from_being_kept_ends_the_generation(build, hf, fakes):
    engine, config = build(fakes, verify="never")
    sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)

    def keep(_):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        rollouts(engine, on_rollouts=keep)
    assert len(rollouts(engine)) == 12


def test_rollouts_go_where_their_prompt_was_scored(build, hf, fakes):
    """Requests come in another order, which would spread them differently."""
    engine, config = build(fakes, verify="never")
    sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
    fakes[0].prompt_logprobs = fakes[1].prompt_logprobs = lambda ids: [-t / 100 for t in ids[1:]]
    assert engine.score_prompts(PROMPTS) == [[-0.06, -(7 + i) / 100] for i in range(4)]
    scored = [{tuple(body["input_ids"]) for body in fake.requests} for fake in fakes]
    assert all(len(prompts) == 2 for prompts in scored)
    rollouts(engine, prompts=[PROMPTS[i] for i in (1, 0, 3, 2)])
    assert scored == [{tuple(body["input_ids"]) for body in fake.requests} for fake in fakes]


def test_scores_of_other_weights_are_refused(build, hf, fakes):
    engine, config = build(fakes[:1], verify="never")
    sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
    fakes[0].version = "another"
    with pytest.raises(EngineError, match="by weights another"):
        engine.score_prompts(PROMPTS)


def test_generation_in_the_background_is_waited_for_and_the_engine_kept_from_all_else(
    build, hf, fakes
):
    engine, config = build(fakes, verify="never")
    actor, open_gate = FakeActor(hf), threading.Event()
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    expected = rollouts(engine)
    for fake in fakes:
        fake.fault = lambda path, body: path == "/generate" and not open_gate.wait(60)
    under_way = engine.start_generate(request())
    for call in (
        lambda: sync_weights(actor, engine, config.model, config.weight_sync, PROBE),
        lambda: rollouts(engine),
        lambda: engine.score_prompts(PROMPTS),
        lambda: engine.prompt_logprobs(PROBE),
    ):
        with pytest.raises(AssertionError, match="still generating"):
            call()
    actor.update()
    open_gate.set()
    assert under_way.result() == expected and under_way.seconds > 0
    assert {rollout.weight_version for rollout in expected} == {0}
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    assert {rollout.weight_version for rollout in rollouts(engine)} == {1}


def assert_has_weights(fake, actor) -> None:
    assert fake.weights.keys() == actor.weights.keys()
    for name, tensor in actor.weights.items():
        assert torch.equal(fake.weights[name], tensor), name


@pytest.mark.parametrize("transport", ["value", "disk", "ipc"])
def test_a_sync_brings_every_tensor_bit_for_bit(build, hf, fakes, transport, monkeypatch):
    engine, config = build(fakes, transport=transport)
    monkeypatch.setattr(weight_sync, "buckets", lambda weights, limit: small_buckets(weights))
    actor = FakeActor(hf)
    for _ in range(2):
        sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
        for fake in fakes:
            assert_has_weights(fake, actor)
        assert engine.weight_version == actor.updates
        assert {r.weight_version for r in rollouts(engine)} == {actor.updates}
        actor.update()


def test_a_server_whose_logits_are_rounded_otherwise_is_refused(build, hf):
    with FakeSGLang(fp32_lm_head=True) as fake:
        equal, config = build([fake], model={"dtype": "bfloat16"}, verify="never")
        sync_weights(FakeActor(hf), equal, config.model, config.weight_sync, PROBE)
        engine, config = build([fake], model={"dtype": "bfloat16", "fp32_lm_head": False})
        with pytest.raises(EngineError, match=rf"{fake.url} has enable_fp32_lm_head=true"):
            sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)


def test_a_server_that_does_not_tell_its_experts_is_refused_if_they_are_to_be_replayed(build, hf):
    with FakeSGLang(routing=(2, 2)) as tells, FakeSGLang() as silent:
        engine, config = build([tells], router_replay=True, verify="never")
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
        engine, config = build([silent], verify="never")
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
        engine, config = build([silent], router_replay=True, verify="never")
        words = rf"{silent.url} does not tell .*rollout\.router_replay=.*--enable-return-routed"
        with pytest.raises(EngineError, match=words):
            sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)


def test_a_server_that_would_normalize_probabilities_is_refused_if_the_model_does_not(
    build, hf, tmp_path
):
    with FakeSGLang() as fake:
        fake.moe_runner = "flashinfer_trtllm"
        engine, config = build([fake], verify="never")
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
    moe = tiny_models.save(tiny_models.qwen3_moe(normalized=False), tmp_path / "moe")
    with FakeSGLang(architectures=["Qwen3MoeForCausalLM"]) as fake:
        fake.moe_runner = "flashinfer_trtllm"
        engine, config = build([fake], model={"hf": moe})
        actor = FakeActor(hf)
        actor.weights = load_file(f"{moe}/model.safetensors")
        with pytest.raises(EngineError, match=r"norm_topk_prob=false: .*--moe-runner-backend trit"):
            sync_weights(actor, engine, config.model, config.weight_sync, PROBE)


def small_buckets(weights):
    from megatron_prepo.models.hf_files import buckets

    return buckets(weights, 4096)


def test_bfloat16_and_float32_travel_together(build, hf, fakes):
    engine, config = build(fakes, verify="never")
    actor = FakeActor(hf)
    for name in list(actor.weights)[::3]:
        actor.weights[name] = actor.weights[name].bfloat16()
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    for fake in fakes:
        assert_has_weights(fake, actor)


def test_the_order_of_a_sync(build, hf, fakes):
    with_sessions, without = fakes
    engine, config = build(fakes, verify="never")
    sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
    steps = [call for call in with_sessions.calls if call not in DESCRIPTION]
    bare = [call for call in without.calls if call not in DESCRIPTION]
    assert steps == [
        "/pause_generation",
        "/update_weight_version",
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/end_weight_update",
        "/flush_cache",
        "/update_weight_version",
        "/continue_generation",
    ]
    assert bare == [s for s in steps if not s.endswith("_weight_update")]
    assert not with_sessions.paused and with_sessions.version == without.version


DESCRIPTION = ("/health", "/server_info", "/model_info", "/openapi.json")


@pytest.mark.parametrize(
    ("path", "transport", "culprit"),
    [
        ("/update_weights_from_tensor", "value", "model.embed_tokens.weight ... "),
        ("/update_weights_from_disk", "disk", "weight_sync"),
        ("/begin_weight_update", "value", "begin_weight_update"),
        ("/end_weight_update", "value", "end_weight_update"),
        ("/flush_cache", "value", "flush_cache"),
        ("/update_weight_version", "value", "update_weight_version"),
    ],
)
def test_a_refusal_names_server_and_culprit(build, hf, fakes, path, transport, culprit):
    engine, config = build(fakes, transport=transport)
    fakes[0].fault = lambda called, body: "refuse" if called == path else None
    with pytest.raises(EngineError) as error:
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
    assert fakes[0].url in str(error.value) and culprit in str(error.value)
    assert "the fake will not" in str(error.value)
    if path == "/update_weights_from_tensor":
        assert not fakes[0].in_session and not fakes[0].paused, "the next run can use it"
    with pytest.raises(AssertionError, match="sync first"):
        rollouts(engine)


def test_an_answer_that_says_no_is_a_refusal(build, hf, fakes):
    engine, config = build(fakes)
    answer = fakes[1].answer
    fakes[1].answer = lambda path, body: (
        (200, {"success": False, "message": "no"}) if "tensor" in path else answer(path, body)
    )
    with pytest.raises(EngineError, match=f"{fakes[1].url} answered .*'message': 'no'"):
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)


@pytest.mark.parametrize("path", ["/update_weights_from_tensor", "/flush_cache"])
def test_a_server_that_dies_in_a_sync_is_left_out_and_comes_back_at_the_next(
    build, hf, fakes, path
):
    engine, config = build(fakes)
    actor = FakeActor(hf)
    fakes[0].fault = lambda called, body: "die" if called == path else None
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    assert fakes[0].url in engine.said[0] and path in engine.said[0]
    assert len(rollouts(engine)) == 12 and not fakes[0].requests
    assert engine.verified
    fakes[0].restart()
    actor.update()
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    assert_has_weights(fakes[0], actor)
    assert "serves again" in engine.said[-1]
    assert "logprob_start_len" in fakes[0].requests[0], "a server that came back is verified"
    rollouts(engine)
    assert all(len(fake.requests) > 4 for fake in fakes)


@pytest.mark.parametrize(
    ("transport", "fault"),
    [
        ("ipc", "die"),
        ("ipc", "hang"),
        ("ipc", "garbage"),
        ("value", "drip"),
        ("value", "reset"),
        ("disk", "500"),
        ("disk", "text"),
    ],
)
def test_a_server_at_fault_in_a_sync_has_no_part_in_the_next_rollouts(
    build, hf, fakes, transport, fault
):
    engine, config = build(fakes, transport=transport, request_seconds=6.0)
    actor = FakeActor(hf)
    fakes[0].fault = lambda called, body: fault if "update_weights" in called else None
    if fault == "text":  # a response that is not a confirmation
        with pytest.raises(EngineError, match=f"{fakes[0].url} answered busy"):
            sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
        return
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    assert fakes[0].url in engine.said[0] and len(engine.said) == 1
    assert len(rollouts(engine)) == 12 and not fakes[0].requests
    assert_has_weights(fakes[1], actor)
    fakes[0].restart()
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    assert_has_weights(fakes[0], actor)


def test_a_disk_that_takes_nothing_is_an_error_of_the_engine(build, hf, fakes, tmp_path):
    (tmp_path / "file").touch()
    engine, config = build(fakes, transport="disk", directory=str(tmp_path / "file" / "weights"))
    with pytest.raises(EngineError, match=r"weights to the servers: .*file"):
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
    assert not fakes[0].paused and not fakes[1].paused


def test_shared_memory_that_does_not_suffice(build, hf, fakes, monkeypatch):
    engine, config = build(fakes, transport="ipc")
    monkeypatch.setattr(ipc.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(EngineError, match=r"0 are free: lower weight_sync.bucket_mb=1"):
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
    assert not fakes[0].paused


def test_a_server_that_comes_back_with_old_weights_gets_no_work_until_the_next_sync(
    build, hf, fakes
):
    engine, config = build(fakes)
    actor = FakeActor(hf)
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    fakes[0].restart()
    assert len(rollouts(engine)) == 12
    assert "by weights default" in engine.said[0]
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    assert_has_weights(fakes[0], actor)


def test_another_runs_weights_of_the_same_number_are_stale(build, hf, fakes):
    engine, config = build(fakes[:1])
    other, other_config = build(fakes[:1])
    actor = FakeActor(hf)
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    sync_weights(actor, other, other_config.model, other_config.weight_sync, PROBE)
    with pytest.raises(EngineError, match="by weights"):
        rollouts(engine)


def test_all_servers_gone_in_a_sync(build, hf, fakes):
    engine, config = build(fakes)
    fakes[0].dead = True
    fakes[1].fault = lambda path, body: "die" if "tensor" in path else None
    with pytest.raises(EngineError) as error:
        sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)
    assert "no SGLang server is left" in str(error.value)
    assert all(fake.url in str(error.value) for fake in fakes)


@pytest.mark.parametrize("verify", ["first", "always", "never"])
def test_verification_finds_a_tensor_that_did_not_arrive(build, hf, fakes, verify):
    engine, config = build(fakes, verify=verify)
    actor = FakeActor(hf)
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    probes = sum("logprob_start_len" in body for fake in fakes for body in fake.requests)
    assert probes == (0 if verify == "never" else 2)
    actor.update()
    lose_a_tensor(fakes[1])
    if verify == "always":
        with pytest.raises(ValueError, match=rf"{fakes[1].url} differ .*weight_sync.tolerance"):
            sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    else:
        sync_weights(actor, engine, config.model, config.weight_sync, PROBE)


def lose_a_tensor(fake) -> None:
    """Skip a name silently and report success, as SGLang does with a name that it does not know."""
    take = fake._from_tensor

    def lossy(body):
        before = fake.weights["model.norm.weight"]
        result = take(body)
        fake.weights["model.norm.weight"] = before
        return result

    fake._from_tensor = lossy


def test_names_and_shapes_are_compared_before_anything_is_sent(build, hf, fakes):
    engine, config = build(fakes)
    actor = FakeActor(hf)
    weights = actor.weights
    norm, head = weights["model.norm.weight"], weights["lm_head.weight"]
    for wrong, named in (
        ({**weights, "model.norm.wait": norm}, "model.norm.wait"),
        ({n: t for n, t in weights.items() if n != "model.norm.weight"}, "model.norm.weight"),
        ({**weights, "lm_head.weight": head[1:]}, "lm_head.weight"),
    ):
        actor.weights = wrong
        with pytest.raises(ValueError, match=named):
            sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    assert not any(fake.calls for fake in fakes)
    check_names({}, "a directory without weights")


def test_a_server_of_another_model_is_refused(build, hf):
    with FakeSGLang(architectures=("LlamaForCausalLM",)) as fake:
        engine, config = build([fake])
        with pytest.raises(EngineError, match=f"{fake.url} serves .'LlamaForCausalLM'"):
            sync_weights(FakeActor(hf), engine, config.model, config.weight_sync, PROBE)


def test_memory_is_released_between_rollouts_and_resumed_before_use(build, hf, fakes):
    engine, config = build(fakes, servers={"release_memory": True})
    actor = FakeActor(hf)
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    rollouts(engine)
    rollouts(engine)
    sync_weights(actor, engine, config.model, config.weight_sync, PROBE)
    memory = [c for c in fakes[0].calls if "memory" in c or c in ("/generate", "/pause_generation")]
    first = memory.index("/release_memory_occupation")
    kept = [c for n, c in enumerate(memory[first:]) if c != memory[first:][n - 1]]
    assert kept == [
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/generate",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/pause_generation",
    ]


def test_servers_on_the_ranks_gpus_have_their_memory_before_the_actor_takes_any(
    build, fakes, monkeypatch
):
    """SGLang sizes its cache by the memory that is free before and after it loads its weights."""
    engine, _ = build(fakes)
    assert not any(server.described for server in engine.fleet.servers), "it does not wait"
    monkeypatch.setattr("megatron_prepo.rollout.sglang.engine.shares_gpus", lambda *_: True)
    engine, _ = build(fakes)
    assert all(server.described for server in engine.fleet.servers)


@pytest.mark.parametrize(
    ("device", "servers", "shared"),
    [
        ("cuda", {}, True),
        ("cpu", {}, False),
        ("cuda", {"first_device": 2}, False),
        ("cuda", {"first_device": 1}, True),
        ("cuda", {"urls": ["http://a:1"]}, False),
    ],
)
def test_which_servers_share_the_ranks_gpus(monkeypatch, device, servers, shared):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    settings = tiny_models.actor_config("unused", servers=servers).servers
    assert shares_gpus(settings, torch.device(device)) == shared
