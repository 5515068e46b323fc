"""Real SGLang servers return the experts they chose, and an actor that follows them agrees better.

A server of a tiny Qwen3-MoE in float32, where actor and engine hardly ever choose differently, and
one in bfloat16, where they do.
"""

from dataclasses import replace

import pytest
import tiny_models
import torch
from ranks import on_ranks

from megatron_prepo.rollout.engine import Request
from megatron_prepo.rollout.weight_sync import TOLERANCE
from tests.real_sglang.test_weights import PROMPTS, TEMPERATURE, config_of, engine_of

NEW_TOKENS, MANY_TOKENS, STRAGGLER_SECONDS = 48, 200, 0.25
DTYPES = ("float32", "bfloat16")


def compared(hf: str, directory: str, python: str) -> dict:
    """Return how far the actor is from the engine, with its own routing and with the engine's."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor
    from megatron_prepo.actor.packing import make_pieces
    from megatron_prepo.records import scored_sequence
    from megatron_prepo.rollout.weight_sync import sync_weights

    found = {}
    parallel.initialize(config_of(hf, directory, python, "qwen3_moe").parallel, seed=1)
    for dtype in DTYPES:
        rollout = {"engine": "sglang", "max_new_tokens": MANY_TOKENS, "router_replay": True}
        config = config_of(hf, f"{directory}/{dtype}", python, "qwen3_moe", model={"dtype": dtype})
        config = replace(config, rollout=replace(config.rollout, **rollout))
        actor, engine = Actor(config), engine_of(config)
        try:
            sync_weights(actor, engine, config.model, config.weight_sync, PROMPTS[0].tokens)
            rollouts = generate(engine, NEW_TOKENS)
            engine.fleet.settings = replace(
                engine.fleet.settings, straggler_seconds=STRAGGLER_SECONDS
            )
            cut = [r for r in generate(engine, MANY_TOKENS) if r.aborted]
        finally:
            engine.close()
        routed = [scored_sequence(r) for r in rollouts]
        found[dtype, "own"] = difference(actor, [replace(r, routing=None) for r in rollouts])
        found[dtype, "replayed"] = difference(actor, rollouts)
        found[dtype, "routed differently"] = actor.routed_differently()
        found[dtype, "cut"] = difference(actor, cut) if cut else None
        found[dtype, "shared"] = len(make_pieces(routed, most=10**4))
        found[dtype, "tokens"] = sum(len(r.tokens) for r in rollouts)
    return found


def generate(engine, max_new_tokens: int) -> list:
    request = Request(
        prompts=PROMPTS,
        samples_per_prompt=4,
        temperature=TEMPERATURE,
        max_new_tokens=max_new_tokens,
        seed="1/x",
        routing=True,
    )
    return engine.generate(request)


def difference(actor, rollouts) -> float:
    """Return the mean difference of a token's log-probability, in nats."""
    from megatron_prepo.records import scored_sequence

    scores = actor.score([scored_sequence(r) for r in rollouts], temperature=TEMPERATURE)
    engine_T = torch.cat([torch.tensor(r.engine_logprobs) for r in rollouts])
    return float((torch.cat([s.logprobs_T for s in scores]) - engine_T).abs().mean())


@pytest.mark.slow
@pytest.mark.parametrize("normalized", [True, False])
def test_the_actor_that_is_routed_as_the_engine_agrees_better(sglang_python, tmp_path, normalized):
    hf = tiny_models.save(tiny_models.qwen3_moe(normalized=normalized), tmp_path / "hf")
    [found] = on_ranks(1, compared, hf, str(tmp_path), sglang_python, deadline_s=1500.0)
    within = TOLERANCE["float32"]
    assert found["float32", "replayed"] < within
    assert found["float32", "cut"] < within, "what was cut has a routing as long as it is"
    assert found["float32", "routed differently"] < 0.002
    assert 0.002 < found["bfloat16", "routed differently"] < 0.2
    assert found["bfloat16", "replayed"] < found["bfloat16", "own"]
    for dtype in DTYPES:
        assert found[dtype, "tokens"] > 500
        assert found[dtype, "shared"] == len(PROMPTS), "prompts are cached, with their routing"
