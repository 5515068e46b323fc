"""Compare log-probabilities of engine, actor and `transformers` on the same completions.

    python tools/inspect/compare_logprobs.py CONFIG [key=value ...] --out runs/compare_logprobs
    python tools/inspect/compare_logprobs.py --hf DIR --url URL --prompts FILE.jsonl --out ...

The engine gets the actor's weights (also a server given by URL: do not use one of an active run)
and completes a few training prompts, and all three score its completions.  Prints the differences
of each pair and the worst tokens with their context, and draws a histogram.  Exit code 1 if engine
and actor differ by more than `--tolerance` nats per token on average.

One process; under torchrun, the ranks of the configuration's layout.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo import config as configuration
from megatron_prepo.config import Config
from megatron_prepo.files import ownership
from megatron_prepo.files.existing import existing
from megatron_prepo.inputs import hub, preflight
from megatron_prepo.process.command import in_one_line
from megatron_prepo.records import Rollout
from megatron_prepo.rollout.weight_sync import TOLERANCE
from megatron_prepo.trainer.mismatch_metrics import mismatch_metrics

WORST = 10
CONTEXT = 12
"""Number of context tokens shown before each of the worst tokens."""


@in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and draw; returns 0 if engine and actor agree, 1 if they differ."""
    options = parse(arguments)
    config = hub.resolved(config_of(options))
    if os.environ.get("RANK", "0") == "0":
        ownership.claim(options.out, "comparison of log-probabilities", "--out")
    inputs = preflight.check(config)
    from megatron_prepo.trainer.stages import rollout_request

    with actor_and_engine(config, inputs) as (actor, engine):
        prompts = inputs.train_prompts[: options.num_prompts]
        rollouts = engine.generate(
            rollout_request(prompts, "compare_logprobs", config.rollout, config.train.seed)
        )
        directory = reference_directory(config, actor, options.out)
        comparison = compare(config, actor, rollouts, directory)
    if os.environ.get("RANK", "0") != "0":
        return 0
    print(text(comparison, inputs.tokenizer))
    picture = draw(comparison, options.out / "compare_logprobs.png")
    difference = float(comparison.difference_T("engine", "actor").abs().mean())
    tolerance = options.tolerance or TOLERANCE[config.model.dtype]
    agree = difference <= tolerance
    verdict = "agree" if agree else "DIFFER"
    print(f"{picture}\nengine and actor {verdict}: {difference:.2g} nats/token, {tolerance:g} pass")
    return int(not agree)


@contextmanager
def actor_and_engine(config: Config, inputs: preflight.Inputs) -> Iterator[tuple]:
    """Build actor and engine with the same weights, as at the start of a run."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor
    from megatron_prepo.rollout.build import build_engine
    from megatron_prepo.rollout.weight_sync import sync_weights
    from megatron_prepo.trainer.setup import ranks

    parallel.initialize(config.parallel, config.train.seed)
    engine = build_engine(
        config,
        inputs.tokenizer,
        device=parallel.device(),
        ranks=ranks(),
        log=lambda line: print(line, file=sys.stderr),
    )
    try:
        preflight.check_engine(config.model, config.rollout, engine)
        actor = Actor(config)
        sync_weights(
            actor, engine, config.model, config.weight_sync, inputs.train_prompts[0].tokens
        )
        yield actor, engine
    finally:
        engine.close()
        parallel.shut_down()


@dataclass(frozen=True)
class Comparison:
    """Score the same completions with each; returns a tensor of log-probabilities per rollout."""

    rollouts: list[Rollout]
    logprobs_N: dict[str, list[torch.Tensor]]

    def difference_T(self, one: str, other: str) -> torch.Tensor:
        """Concatenate the values of all rollouts' tokens, in order."""
        return torch.cat(self.logprobs_N[one]) - torch.cat(self.logprobs_N[other])


def compare(config: Config, actor, rollouts: list[Rollout], directory: str) -> Comparison:
    """Score with `transformers`, which reads the weights of `directory` in float32; collective."""
    from megatron_prepo.records import scored_sequence

    temperature = config.rollout.temperature
    scores = actor.score([scored_sequence(r) for r in rollouts], temperature=temperature)
    return Comparison(
        rollouts,
        {
            "engine": [torch.tensor(rollout.engine_logprobs) for rollout in rollouts],
            "actor": [score.logprobs_T for score in scores],
            "transformers": transformers_logprobs(directory, rollouts, temperature),
        },
    )


def reference_directory(config: Config, actor, out: Path) -> str:
    """Return Hugging Face files of the actor's weights: those it was loaded from, or an export."""
    if not config.model.megatron:
        return config.model.hf
    actor.export(out / "hf", write=os.environ.get("RANK", "0") == "0")
    return str(out / "hf")


@torch.inference_mode()
def transformers_logprobs(
    directory: str, rollouts: Sequence[Rollout], temperature: float
) -> list[torch.Tensor]:
    """Return log-probabilities of each completion's tokens, by the simplest implementation."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    logprobs_N = []
    for rollout in rollouts:
        tokens_S = torch.tensor(rollout.prompt.tokens + rollout.tokens, device=device)
        start = len(rollout.prompt.tokens)
        logits_TV = model(tokens_S[None]).logits[0, start - 1 : -1]
        logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
        logprobs_N.append(logprobs_TV.gather(1, tokens_S[start:, None])[:, 0].cpu())
    return logprobs_N


def text(comparison: Comparison, tokenizer) -> str:
    """Return one row per pair, then the tokens with the largest differences of engine and actor."""
    lines = [f"{'nats per token':26}{'mean':>10}{'99 %':>10}{'largest':>10}{'KL':>10}"]
    for one, other in combinations(comparison.logprobs_N, 2):
        found = mismatch_metrics(comparison.logprobs_N[other], comparison.logprobs_N[one])
        values = [found[f"mismatch/logprob_abs/{name}"] for name in ("mean", "q99", "max")]
        values.append(found["mismatch/kl"])
        lines.append(f"{one + ' - ' + other:26}" + "".join(f"{value:10.2g}" for value in values))
    names = list(comparison.logprobs_N)
    heads = [*names, "engine - actor"]
    lines += ["", "".join(f"{name:>15}" for name in heads) + "  token, and what stands before it"]
    difference_T = comparison.difference_T("engine", "actor")
    order = difference_T.abs().argsort(descending=True)[:WORST].tolist()
    places = [(n, t) for n, rollout in enumerate(comparison.rollouts) for t in range_of(rollout)]
    for i in order:
        n, t = places[i]
        rollout = comparison.rollouts[n]
        before = (rollout.prompt.tokens + rollout.tokens[:t])[-CONTEXT:]
        token, context = tokenizer.decode([rollout.tokens[t]]), tokenizer.decode(list(before))
        values = "".join(f"{comparison.logprobs_N[name][n][t]:15.5f}" for name in names)
        values += f"{difference_T[i]:15.2g}"
        lines.append(f"{values}  {token!r} after {context!r} ({rollout.prompt.id}, token {t})")
    return "\n".join(lines)


def range_of(rollout: Rollout) -> range:
    """Return the positions of the completion's tokens."""
    return range(len(rollout.tokens))


def draw(comparison: Comparison, path: Path) -> Path:
    """Draw histograms of the absolute differences, one axis per pair."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    sizes = {
        f"{one} - {other}": comparison.difference_T(one, other).abs().clamp(min=1e-9).log10()
        for one, other in combinations(comparison.logprobs_N, 2)
    }
    lowest = min(float(values_T.min()) for values_T in sizes.values())
    highest = max(float(values_T.max()) for values_T in sizes.values())
    for name, values_T in sizes.items():
        axes.hist(values_T.numpy(), bins=60, range=(lowest, highest), histtype="step", label=name)
    axes.set_xlabel("size of the difference in nats, log10 (equal: -9)")
    axes.set_ylabel("tokens")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def config_of(options: argparse.Namespace) -> Config:
    """Return the given configuration, or a minimal one for a model and a server, in this layout."""
    layout = [] if "RANK" in os.environ else one_rank()
    run = configuration.literal(options.out / "run")  # for the logs of servers
    overrides = [*options.overrides, f"run.dir={run}", *layout]
    if options.config:
        return configuration.load(options.config, overrides)
    tree = {
        "model": {"hf": str(options.hf)},
        "data": {"train": str(options.prompts), "eval": str(options.prompts)},
        "selection": {"num_candidates": 1, "num_selected": 1},
        "rollout": {"engine": "sglang", "max_new_tokens": 64, "samples_per_prompt": 2},
        "servers": {"urls": [options.url]},
        "train": {"total_steps": 1},
    }
    for override in overrides:
        configuration.apply(tree, override)
    return configuration.from_tree(tree)


def one_rank() -> list[str]:
    """Return settings for a layout of one rank."""
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "data")
    return [*(f"parallel.{name}=1" for name in names), "parallel.sequence=false"]


def _config(word: str) -> str:
    """Return a word that is an override, or the path of an existing configuration."""
    return word if "=" in word else str(existing("configuration file")(word))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=_config, nargs="?", help="configuration of a run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument(
        "--hf", type=existing(), help="without a configuration: directory of the model"
    )
    parser.add_argument("--url", help="without a configuration: server with this model")
    parser.add_argument(
        "--prompts", type=existing(), help="without a configuration: prompts (docs/data.md)"
    )
    parser.add_argument("--num-prompts", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--tolerance", type=float, help="in nats (default: 1e-4; 0.1 for bfloat16)")
    parser.add_argument("--out", type=Path, required=True, help="directory for logs and figure")
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides += rest
    if options.config and "=" in options.config:
        options.overrides.insert(0, options.config)
        options.config = None
    given = [options.hf, options.url, options.prompts]
    if any(given) == bool(options.config) or (any(given) and not all(given)):
        parser.error("give a configuration, or all of --hf, --url and --prompts")
    return options


if __name__ == "__main__":
    sys.exit(main())
