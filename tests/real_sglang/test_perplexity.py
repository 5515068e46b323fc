"""Prompts scored by a real server: the actor's perplexities, and a cache that the rollouts hit."""

import pytest
import tiny_models
from ranks import join, on_ranks

from megatron_prepo.records import Prompt
from megatron_prepo.rollout.engine import Request
from megatron_prepo.rollout.weight_sync import TOLERANCE
from tests.real_sglang.test_weights import PROMPTS, TEMPERATURE, config_of, engine_of

pytestmark = pytest.mark.slow
LAST_TOKEN = tiny_models.VOCAB - 1
SCORED = [
    *PROMPTS,
    Prompt("last token", "", "", (5, LAST_TOKEN, 7, LAST_TOKEN, 9), (1, 4)),
]


def measure(hf: str, directory: str, python: str) -> dict:
    """Return, on one rank, perplexities of both, and cached tokens of rollouts in some cases."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor
    from megatron_prepo.rollout.weight_sync import sync_weights
    from megatron_prepo.trainer.prompt_scores import engine_perplexities, prompt_scores

    assert join(1)
    config = config_of(hf, directory, python, "qwen3")
    parallel.initialize(config.parallel, seed=1)
    actor, engine = Actor(config), engine_of(config)
    sync_weights(actor, engine, config.model, config.weight_sync, PROMPTS[0].tokens)
    answers, call = [], engine.fleet.call

    async def watched(server, path, *arguments, **options):
        answer = await call(server, path, *arguments, **options)
        if path == "/generate":
            answers.append(answer["meta_info"])
        return answer

    engine.fleet.call = watched

    def of_rollouts() -> list[tuple[int, int]]:
        answers.clear()
        engine.generate(
            Request(
                prompts=PROMPTS,
                samples_per_prompt=2,
                temperature=TEMPERATURE,
                max_new_tokens=4,
                seed="1/x",
            )
        )
        return [(meta["prompt_tokens"], meta["cached_tokens"]) for meta in answers]

    def flush() -> None:
        engine.fleet.run(engine.fleet.call_all("/flush_cache", lambda _: {}, seconds=60)).result()

    found: dict = {}
    for tokens in ("all", "content"):
        prompts = SCORED if tokens == "all" else SCORED[-1:]
        found[tokens] = (
            engine_perplexities(engine, prompts, tokens).tolist(),
            prompt_scores(actor, prompts, tokens)[0].tolist(),
        )
    flush()
    found["alone"] = of_rollouts()
    flush()
    engine_perplexities(engine, PROMPTS)
    found["behind probes"] = of_rollouts()
    engine_perplexities(engine, PROMPTS)
    found["probes again"] = [meta["cached_tokens"] for meta in answers[-len(PROMPTS) :]]
    engine.close()
    parallel.shut_down()
    return found


@pytest.fixture(scope="module")
def found(sglang_python, tmp_path_factory):
    directory = tmp_path_factory.mktemp("perplexity")
    hf = tiny_models.save(tiny_models.qwen3(tied=False), directory / "hf")
    [answer] = on_ranks(1, measure, hf, str(directory), sglang_python, deadline_s=1500.0)
    return answer


@pytest.mark.parametrize("tokens", ["all", "content"])
def test_the_servers_perplexities_are_the_actors(found, tokens):
    """This includes the last token of the vocabulary, whose number SGLang gives as 0."""
    engines, actors = found[tokens]
    # their logarithms are means of log-probabilities
    assert engines == pytest.approx(actors, rel=TOLERANCE["float32"])


def test_rollouts_find_their_prompt_in_the_cache_of_the_probe(found):
    """All prompt tokens are cached but the last, which has to be computed to continue from."""
    assert all(cached == length - 1 for length, cached in found["behind probes"])
    assert sum(cached == 0 for _, cached in found["alone"]) >= len(PROMPTS), "the control"


def test_a_probe_itself_reuses_nothing(found):
    assert found["probes again"] == [0] * len(PROMPTS)
