"""What the candidates' perplexity costs: the actor's pass, or the engine's probes.

    python tools/bench_perplexity.py CONFIG [key=value ...] --out result.json

Of one step, with the settings of a run (`rollout.engine=sglang`): median seconds of both ways, how
well they agree, and what the rollouts of the first K prompts cost alone and behind the probes:
seconds, and how many of their prompt tokens the server took out of its cache, which is flushed
before each measurement.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_prepo import config as configuration
from megatron_prepo import durable, machine, preflight
from megatron_prepo.metrics import spearman
from megatron_prepo.perplexity import engine_perplexities, prompt_scores
from tools.compare_logprobs import actor_and_engine, one_rank

REPEATS = 3


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    overrides = ["rollout.engine=sglang", *one_rank(), *options.overrides]
    config = configuration.load(options.config, overrides)
    inputs = preflight.check(config)
    with actor_and_engine(config, inputs) as (actor, engine):
        result = measure(config, inputs.train_prompts, actor, engine)
    result |= {"machine": machine.describe(), "overrides": overrides}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(options.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


def measure(config, prompts, actor, engine) -> dict:
    """The numbers of one step."""
    from megatron_prepo.train import sampling

    candidates = prompts[: config.selection.num_candidates]
    selected = candidates[: config.selection.num_selected]
    answers = watch(engine)

    def scored_by_engine() -> torch.Tensor:
        return engine_perplexities(engine, candidates, config.selection.ppl_tokens)

    def scored_by_actor() -> torch.Tensor:
        return prompt_scores(actor, candidates, config.selection.ppl_tokens)[0]

    def rolled_out() -> dict:
        before = len(answers)
        seconds, _ = timed(lambda: engine.generate(selected, **sampling(config, "bench")))
        metas = [answer["meta_info"] for answer in answers[before:]]
        return {
            "seconds": seconds,
            "prompt_tokens": sum(meta["prompt_tokens"] for meta in metas),
            "of_these_from_the_cache": sum(meta["cached_tokens"] for meta in metas),
        }

    def flushed(function) -> tuple[float, object]:
        flush(engine)
        return timed(function)

    rolled_out()  # once for whatever the server does at first
    ppl = {"actor": scored_by_actor(), "engine": scored_by_engine()}
    actor_seconds = [timed(scored_by_actor)[0] for _ in range(REPEATS)]
    engine_seconds = [flushed(scored_by_engine)[0] for _ in range(REPEATS)]
    alone, behind = [], []
    for _ in range(REPEATS):
        alone.append(flushed(rolled_out)[1])
        flushed(scored_by_engine)
        behind.append(rolled_out())
    return {
        "candidates": len(candidates),
        "candidate_tokens": sum(len(prompt.tokens) for prompt in candidates),
        "selected": len(selected),
        "samples_per_prompt": config.rollout.samples_per_prompt,
        "actor_seconds": statistics.median(actor_seconds),
        "engine_seconds": statistics.median(engine_seconds),
        "spearman": spearman(ppl["engine"], ppl["actor"]),
        "relative_max": float((ppl["engine"] / ppl["actor"] - 1).abs().max()),
        "rollouts_without_probes": middle(alone),
        "rollouts_behind_probes": middle(behind),
    }


def watch(engine) -> list[dict]:
    """From now on, all answers of `/generate`."""
    answers, call = [], engine.fleet.call

    async def watched(server, path, *arguments, **options):
        answer = await call(server, path, *arguments, **options)
        if path == "/generate":
            answers.append(answer)
        return answer

    engine.fleet.call = watched
    return answers


def flush(engine) -> None:
    """Empty the servers' caches of prompts."""
    engine.fleet.run(engine.fleet.call_all("/flush_cache", lambda _: {}, seconds=60)).result()


def timed(function) -> tuple[float, object]:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def middle(runs: list[dict]) -> dict:
    """The one of median seconds."""
    return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]


if __name__ == "__main__":
    sys.exit(main())
