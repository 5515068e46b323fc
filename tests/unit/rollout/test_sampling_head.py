"""Engine and actor turn the same hidden states into the same log-probabilities, or do not start."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from rounding import Reference, allowance, bound
from tiny_models import actor_config

from megatron_prepo.actor import actor as policy
from megatron_prepo.actor.actor import Actor
from megatron_prepo.actor.lm_head import vocab_parallel_logprobs_and_entropy
from megatron_prepo.actor.model import describe
from megatron_prepo.errors import UserError
from megatron_prepo.inputs.preflight import check_engine
from megatron_prepo.models.fp32_matmul import add_product, product
from megatron_prepo.rollout.stopping import Stops
from megatron_prepo.rollout.transformers_engine import EmbeddedEngine
from megatron_prepo.trainer import setup as job
from tests.unit.actor.test_lm_head import full_softmax

TEMPERATURE = 0.8


def bfloat16_engine(model, directory, fp32_lm_head):
    engine = EmbeddedEngine(
        tiny_models.save(model, directory),
        SimpleNamespace(eos_token_id=0),
        stops=Stops(frozenset([0])),
        dtype=torch.bfloat16,
        fp32_lm_head=fp32_lm_head,
        device=torch.device("cpu"),
        batch_size=8,
    )
    engine.load_weights([list(model.named_parameters())], 1)
    return engine


@pytest.mark.parametrize("model", [tiny_models.qwen2, lambda: tiny_models.qwen3(tied=False)])
def test_equal_heads_agree_and_different_ones_do_not(model, tmp_path):
    """Log-probabilities are of the same bfloat16 hidden states, so that only the head is compared;
    tied and untied.

    The head is scaled up to logits of up to 30, as a trained model's.  Those of 16 and more are 1/8
    apart in bfloat16: rounding moves them by up to 1/16.  Two orders of addition may round a few of
    them differently, by 1/8 per token; on average that is less than a tenth of what rounding itself
    does.  In float32 both err as a log-softmax in float32 does.
    """
    model = model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6)
    hidden_TH = torch.randn(200, 32, generator=torch.Generator().manual_seed(5)).bfloat16()
    targets_T = torch.arange(200)
    mean_difference = {}
    for engine_fp32 in (True, False):
        engine = bfloat16_engine(model, tmp_path, engine_fp32)
        assert engine.fp32_lm_head == engine_fp32
        head = engine.model.get_output_embeddings()
        with torch.no_grad():
            logits_TV = head(hidden_TH[None])[0]
        assert logits_TV.dtype == (torch.float32 if engine_fp32 else torch.bfloat16)
        logp_TV = (logits_TV.float() / TEMPERATURE).log_softmax(-1)
        engine_T = logp_TV.gather(1, targets_T[:, None])[:, 0]
        for actor_fp32 in (True, False):
            actor_T, _ = vocab_parallel_logprobs_and_entropy(
                hidden_TH,
                head.weight.detach(),
                targets_T,
                vocab_size=tiny_models.VOCAB,
                temperature=TEMPERATURE,
                fp32_logits=actor_fp32,
            )
            mean_difference[engine_fp32, actor_fp32] = (engine_T - actor_T).abs().mean()
    rounding = min(mean_difference[True, False], mean_difference[False, True])
    assert rounding > 2**-8
    assert mean_difference[False, False] < rounding / 10
    weight_VH = model.get_output_embeddings().weight.bfloat16()
    args = (full_softmax, hidden_TH, weight_VH, targets_T, tiny_models.VOCAB, TEMPERATURE)
    reference = Reference(*args)
    assert mean_difference[True, True] <= 2 * allowance(reference.errors[0], rounding)


@pytest.mark.parametrize("actor", [True, False])
@pytest.mark.parametrize("engine", [True, False])
def test_an_engine_with_another_precision_is_refused(actor, engine):
    config = actor_config("unused", model={"dtype": "bfloat16", "fp32_lm_head": actor})
    reports = SimpleNamespace(fp32_lm_head=engine)
    if actor == engine:
        check_engine(config.model, config.rollout, reports)
        return
    types = ("float32", "bfloat16") if actor else ("bfloat16", "float32")
    with pytest.raises(
        UserError,
        match=rf"model\.fp32_lm_head={str(actor).lower()}: the actor's logits are {types[0]}, but "
        rf"those of rollout\.engine=embedded are {types[1]}; set "
        rf"model\.fp32_lm_head={str(engine).lower()}",
    ):
        check_engine(config.model, config.rollout, reports)


def test_training_asks_the_engine_before_it_loads_the_actor(monkeypatch):
    config = actor_config("unused", model={"dtype": "bfloat16"})
    prompts = [SimpleNamespace(tokens=(1, 2))] * config.selection.num_candidates
    inputs = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_token_id=2),
        stop_tokens={2},
        train_prompts=prompts,
        eval_sets={"": []},
        digests=None,
        dropped={},
    )
    monkeypatch.setattr(job.preflight, "check", lambda config, **_: inputs)
    monkeypatch.setattr(job.parallel, "initialize", lambda *_: None)
    monkeypatch.setattr(job.prompt_digests, "check_ranks", lambda *_: None)
    monkeypatch.setattr(job, "StopRequests", lambda *_, **__: None)
    monkeypatch.setattr(job, "begin", lambda config: config)
    monkeypatch.setattr(job.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(job, "Journal", lambda *_, **__: None)
    grader = SimpleNamespace(check_answers=lambda prompts: None)
    monkeypatch.setattr(job, "build_grader", lambda *_: grader)
    run = SimpleNamespace(
        log=print, directory=Path(), writes=False, seconds=lambda name: contextlib.nullcontext()
    )
    monkeypatch.setattr(job, "Run", lambda *_, **__: run)
    monkeypatch.setattr(job, "Actor", lambda *_, **__: pytest.fail("the actor was built"))
    monkeypatch.setattr(job, "ranks", lambda: None)
    monkeypatch.setattr(job, "newest_checkpoint", lambda run: None)
    monkeypatch.setattr(job, "on_rank_zero", lambda call: None)
    fake = SimpleNamespace(fp32_lm_head=False)
    monkeypatch.setattr(job, "build_engine", lambda *_, **__: fake)
    with pytest.raises(UserError, match=r"model\.fp32_lm_head=true"):
        job.set_up(config)


def test_in_float32_there_is_nothing_to_round():
    config = actor_config("unused", model={"dtype": "float32", "fp32_lm_head": True})
    check_engine(config.model, config.rollout, SimpleNamespace(fp32_lm_head=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_keep_float32(dtype):
    """Products of bfloat16 inputs are exact, and added in float32: 64 terms, whose sizes add up."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20, 64, generator=generator).to(dtype)
    b = torch.randn(64, 30, generator=generator).to(dtype)
    exact = a.double() @ b.double()
    result = product(a, b)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    allowed = bound(64, result.dtype) * (a.double().abs() @ b.double().abs())
    assert allowed.max() < exact.abs().mean() / 1000
    assert ((result - exact).abs() <= allowed).all()
    out = torch.empty_like(result)
    assert product(a, b, out=out) is out and torch.equal(out, result)
    add_product(out, a, b)
    assert ((out - 2 * exact).abs() <= 2 * allowed).all()


@pytest.mark.parametrize(
    ("head", "called"),
    [
        ("known-gradient", "vocab_parallel_loss"),
        ("recompute", "vocab_parallel_logprobs_and_entropy"),
    ],
)
def test_the_actor_uses_the_head_that_is_set(monkeypatch, head, called):
    names = []

    def stand_in(name):
        def function(hidden_TH, weight_VH, targets_T, *args, **settings):
            names.append((name, settings))
            zeros_T = torch.zeros(targets_T.shape)
            return (zeros_T.sum(), {}) if name == "vocab_parallel_loss" else (zeros_T, zeros_T)

        return function

    for name in ("vocab_parallel_loss", "vocab_parallel_logprobs_and_entropy"):
        monkeypatch.setattr(policy, name, stand_in(name))
    monkeypatch.setattr(policy, "output_weight", lambda model: None)
    actor = SimpleNamespace(
        config=actor_config("unused", loss={"head": head}),
        chunks=[None],
        _hidden_TH=lambda hidden: hidden,
        _head_settings=lambda: {"fp32_logits": True},
    )
    actor._scores = lambda *args: Actor._scores(actor, *args)
    batch = SimpleNamespace(targets_T=torch.tensor([1, 2, -100]))
    Actor._loss(actor, torch.zeros(3, 4), batch, 0.7, lambda a, b, s: (a.sum(), {}), 2.0)
    ((name, settings),) = names
    assert name == called and settings["temperature"] == 0.7
    assert settings.get("loss_scale") == (2.0 if head == "known-gradient" else None)


def test_a_run_says_how_its_head_computes():
    said = describe(actor_config("unused", model={"dtype": "bfloat16", "fp32_lm_head": False}))
    if not torch.cuda.is_available():
        assert said.endswith("known-gradient head with bfloat16 logits, rows in torch")
