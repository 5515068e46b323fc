"""Measure the cost of the candidates' perplexity: the actor's pass, or the engine's probes.

    python tools/bench/perplexity.py CONFIG [key=value ...] --out result.json

For one step, with the settings of a run and a server started for it: the agreement of both, and
medians of seconds, CPU seconds (of this process and the server's) and prompt tokens, for both and
for the rollouts of the first K prompts, alone and after the probes.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo import config as configuration
from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.files.existing import existing
from megatron_prepo.inputs import hub, preflight
from megatron_prepo.process import machine
from megatron_prepo.process.command import in_one_line
from megatron_prepo.trainer.prompt_scores import engine_perplexities, prompt_scores
from megatron_prepo.trainer.step_metrics import spearman
from tools.inspect.compare_logprobs import actor_and_engine, one_rank

REPEATS = 3
PARTS = ("actor", "engine", "rollouts_alone", "rollouts_behind_probes")


@in_one_line
def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=existing("configuration file"))
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument(
        "--out", type=ownership.new_file(), required=True, help="JSON file to write"
    )
    options = parser.parse_args()
    overrides = ["rollout.engine=sglang", *one_rank(), *options.overrides]
    config = hub.resolved(configuration.load(options.config, overrides))
    inputs = preflight.check(config)
    with actor_and_engine(config, inputs) as (actor, engine):
        result = measure(config, inputs.train_prompts, actor, engine)
    elsewhere = ("run.", "servers.python")  # paths do not affect the numbers
    settings = [override for override in overrides if not override.startswith(elsewhere)]
    result |= {"machine": machine.describe(), "config": str(options.config), "overrides": settings}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(options.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


def measure(config, prompts, actor, engine) -> dict:
    """Return the measurements of one step."""
    from megatron_prepo.trainer.stages import rollout_request

    candidates = prompts[: config.selection.num_candidates]
    selected = candidates[: config.selection.num_selected]
    answers = watch(engine)
    processes = [psutil.Process(server.own.process.pid) for server in engine.fleet.servers]

    def cost(function, *, flushed: bool) -> dict:
        """Return wall-clock seconds, CPU seconds, and tokens."""
        if flushed:
            engine.fleet.run(
                engine.fleet.call_all("/flush_cache", lambda _: {}, seconds=60)
            ).result()
        before, start, cpu = len(answers), time.perf_counter(), cpu_seconds(processes)
        function()
        metas = [answer["meta_info"] for answer in answers[before:]]
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": cpu_seconds(processes) - cpu,
            "prompt_tokens": sum(meta["prompt_tokens"] for meta in metas),
            "of_these_from_the_cache": sum(meta["cached_tokens"] for meta in metas),
        }

    def by_actor() -> torch.Tensor:
        return prompt_scores(actor, candidates, config.selection.ppl_tokens)[0]

    def by_engine() -> torch.Tensor:
        return engine_perplexities(engine, candidates, config.selection.ppl_tokens)

    def roll_out() -> None:
        settings, seed = config.rollout, config.train.seed
        engine.generate(rollout_request(selected, "bench", settings, seed))

    roll_out()  # warm-up of the server
    actor_ppl_P, engine_ppl_P = by_actor(), by_engine()
    runs: dict[str, list[dict]] = {name: [] for name in PARTS}
    for _ in range(REPEATS):
        runs["actor"].append(cost(by_actor, flushed=False))
        runs["rollouts_alone"].append(cost(roll_out, flushed=True))
        runs["engine"].append(cost(by_engine, flushed=True))
        runs["rollouts_behind_probes"].append(cost(roll_out, flushed=False))
    return {
        "candidates": len(candidates),
        "candidate_tokens": sum(len(prompt.tokens) for prompt in candidates),
        "selected": len(selected),
        "samples_per_prompt": config.rollout.samples_per_prompt,
        "spearman": spearman(engine_ppl_P, actor_ppl_P),
        "relative_max": float((engine_ppl_P / actor_ppl_P - 1).abs().max()),
        **{
            name: {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
            for name in PARTS
        },
    }


def cpu_seconds(roots: list[psutil.Process]) -> float:
    """Return CPU seconds of this process and the servers so far, unaffected by other processes."""
    everyone = [psutil.Process(), *(p for root in roots for p in root.children(recursive=True))]
    return sum(sum(process.cpu_times()[:2]) for process in everyone)


def watch(engine) -> list[dict]:
    """Record all responses of `/generate` from now on."""
    answers, call = [], engine.fleet.call

    async def watched(server, path, *arguments, **options):
        answer = await call(server, path, *arguments, **options)
        if path == "/generate":
            answers.append(answer)
        return answer

    engine.fleet.call = watched
    return answers


if __name__ == "__main__":
    sys.exit(main())
