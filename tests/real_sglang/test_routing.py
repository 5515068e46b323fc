"""Real SGLang servers tell which experts they chose, and the actor that follows them agrees better.

A server of a tiny Qwen3-MoE in float32, where the two hardly ever differ by themselves, and one in
bfloat16, where they do.
"""

import pytest
import tiny_models
import torch
from ranks import on_ranks

from tests.real_sglang.test_weights import PROMPTS, TEMPERATURE, config_of, engine_of

SAMPLES, NEW_TOKENS = 4, 48
DTYPES = ("float32", "bfloat16")


def compared(hf: str, directory: str, python: str) -> dict:
    """How far the actor is from the engine, routed by itself and by it."""
    from dataclasses import replace

    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.policy import Actor
    from megatron_prepo.actor.rows import pieces_of
    from megatron_prepo.train import scored_sequence
    from megatron_prepo.weight_sync import sync_weights

    found = {}
    parallel.initialize(config_of(hf, directory, python, "qwen3_moe").parallel, seed=1)
    for dtype in DTYPES:
        rollout = {"engine": "sglang", "max_new_tokens": NEW_TOKENS, "router_replay": True}
        config = config_of(hf, f"{directory}/{dtype}", python, "qwen3_moe", model={"dtype": dtype})
        config = replace(config, rollout=replace(config.rollout, **rollout))
        actor, engine = Actor(config), engine_of(config)
        try:
            sync_weights(actor, engine, config, PROMPTS[0].tokens)
            rollouts = engine.generate(
                PROMPTS,
                samples_per_prompt=SAMPLES,
                temperature=TEMPERATURE,
                max_new_tokens=NEW_TOKENS,
                seed="1/x",
                routing=True,
            )
        finally:
            engine.close()
        routed = [scored_sequence(r) for r in rollouts]
        own = [replace(sequence, routing=None) for sequence in routed]
        engine_T = torch.cat([torch.tensor(r.engine_logprobs) for r in rollouts])
        for name, sequences in (("own", own), ("replayed", routed)):
            scores = actor.score(sequences, temperature=TEMPERATURE)
            difference_T = torch.cat([s.logprobs_T for s in scores]) - engine_T
            found[dtype, name] = float(difference_T.abs().mean())
        found[dtype, "routed differently"] = actor.routed_differently()
        found[dtype, "shared"] = len(pieces_of(routed, most=10**4))
        found[dtype, "tokens"] = len(engine_T)
    return found


@pytest.mark.slow
def test_the_actor_that_is_routed_as_the_engine_agrees_better(sglang_python, tmp_path):
    hf = tiny_models.save(tiny_models.qwen3_moe(), tmp_path / "hf")
    [found] = on_ranks(1, compared, hf, str(tmp_path), sglang_python, deadline_s=1500.0)
    assert found["float32", "replayed"] < 1e-5
    assert found["float32", "routed differently"] < 0.002
    assert 0.002 < found["bfloat16", "routed differently"] < 0.2
    assert found["bfloat16", "replayed"] < found["bfloat16", "own"]
    for dtype in DTYPES:
        assert found[dtype, "tokens"] > 500
        assert found[dtype, "shared"] == len(PROMPTS), "prompts are cached, with their routing"
