"""Measure CPU seconds of scoring and of an update for different layouts of micro-batches.

    python tools/bench/packing.py --out benchmarks/results/packing_NAME.json

The same log-normal mix of rollouts, the same small random model and the same token budget, so that
all layouts have the same memory:

    in order    in the given order, each micro-batch padded to its longest sequence (not one of our
                settings: a trainer that neither sorts nor packs)
    padded      train.packing=false: the same, sorted by length
    packed      the default
    shared      train.share_prefixes=true

Losses and gradient norms are compared first.  Layouts alternate, and the fastest of `--rounds` is
reported.  Seconds are CPU time of one thread, which depends little on other work on the machine.
In addition, without a model: balance and padding of the plans for 1,024 rollouts on 8 ranks.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.actor import parallel
from megatron_prepo.actor.actor import Actor, TrainingSequence
from megatron_prepo.actor.packing import PackingPlan, Row, make_pieces, plan_rows
from megatron_prepo.config import from_tree
from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.models.shape import Shape
from megatron_prepo.process import machine
from megatron_prepo.records import ScoredSequence

MODEL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
}
LONGEST = 1024
WAYS = {
    "in order": {"packing": False},
    "padded": {"packing": False},
    "packed": {},
    "shared": {"share_prefixes": True},
}


def main() -> int:
    """Measure, write the result, print it."""
    options = _options()
    torch.set_num_threads(1)
    sequences = rollouts(groups=options.groups, group_size=8, longest=LONGEST, seed=1)
    result = {
        "machine": machine.describe(),
        "threads": 1,
        "model": MODEL,
        "rollouts": len(sequences),
        "budget": options.budget,
        "mean_tokens": sum(len(s.tokens) for s in sequences) / len(sequences),
        "longest_tokens": max(len(s.tokens) for s in sequences),
        "ways": measure(sequences, options.budget, options.rounds),
        "plans": {f"{ranks} ranks": plans(ranks, budget=16384, longest=8192) for ranks in (8, 32)},
    }
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    durable.write_text(options.out, text)
    print(text, end="")
    return 0


def rollouts(*, groups: int, group_size: int, longest: int, seed: int) -> list[ScoredSequence]:
    """Return groups of completions; lengths are log-normal around the typical length per prompt.

    The typical length is also log-normal, with a median of an eighth of the maximum; lengths are
    truncated at the maximum.
    """
    draw, sequences = random.Random(seed), []
    for _ in range(groups):
        prompt = tuple(draw.choices(range(256), k=draw.randint(longest // 64, longest // 12)))
        typical = draw.lognormvariate(0, 0.6) * longest / 8
        for _ in range(group_size):
            length = min(longest - len(prompt), round(typical * draw.lognormvariate(0, 0.5)))
            completion = tuple(draw.choices(range(256), k=max(1, length)))
            sequences.append(ScoredSequence(prompt + completion, len(prompt)))
    return sequences


def in_order(sequences: list[ScoredSequence], budget: int, shape: Shape) -> PackingPlan:
    """Plan micro-batches in the given order; one ends where the next sequence would not fit."""
    rows: list[list] = [[]]
    for piece in make_pieces(sequences):
        width = max(other.tokens for other in (*rows[-1], piece))
        if rows[-1] and (len(rows[-1]) + 1) * width > budget:
            rows.append([])
        rows[-1].append(piece)
    return PackingPlan((tuple(map(_padded, rows)),), shape)


def _padded(pieces: list) -> Row:
    width = max(piece.tokens for piece in pieces)
    return Row(tuple(pieces), tuple(width - piece.tokens for piece in pieces))


def measure(sequences: list[ScoredSequence], budget: int, rounds: int) -> dict:
    """Return, per layout, seconds of both passes, their results, and statistics of the plan."""
    with tempfile.TemporaryDirectory() as directory:
        hf = save_random_model(directory)
        actors = {way: make_actor(hf, budget, settings) for way, settings in WAYS.items()}
    order = actors["in order"]
    order.plan = lambda sequences: in_order(sequences, budget, order.shape)
    scores = order.score(sequences, temperature=1.0)
    batch = [
        TrainingSequence(sequence, score.logprobs_T, (-1.0) ** i, 1 / len(sequences))
        for i, (sequence, score) in enumerate(zip(sequences, scores, strict=True))
    ]
    seconds = {way: {"score": [], "update": []} for way in WAYS}
    first = {}
    for turn in range(rounds + 1):  # the first warms up
        for way, actor in actors.items():
            start = time.process_time()
            actor.score(sequences, temperature=1.0)
            middle = time.process_time()
            update = actor.update(batch)
            end = time.process_time()
            first.setdefault(way, update)
            if turn:
                seconds[way]["score"].append(middle - start)
                seconds[way]["update"].append(end - middle)
    check_equal(first)
    made = {way: actor.plan(sequences) for way, actor in actors.items()}
    parallel.shut_down()
    return {way: summary(seconds[way], made[way], first[way]) for way in WAYS}


def summary(seconds: dict, plan: PackingPlan, update: dict) -> dict:
    """Measure one layout."""
    load = plan.load
    return {
        "score_cpu_seconds": min(seconds["score"]),
        "update_cpu_seconds": min(seconds["update"]),
        "micro_batches": len(plan.ranks[0]),
        "tokens": load.tokens,
        "padding_fraction": plan.padding_fraction,
        "pairs": load.pairs,
        "forward_flops": load.flops(plan.shape),
        "loss": update["loss/policy"],
        "grad_norm": update["loss/grad_norm"],
    }


def check_equal(updates: dict) -> None:
    """Check that all layouts compute the same values; otherwise their times are meaningless."""
    expected = updates["in order"]
    for way, update in updates.items():
        for name in ("loss/policy", "loss/grad_norm"):
            error = abs(update[name] - expected[name])
            assert error <= 1e-4 * abs(expected["loss/grad_norm"]), f"{way}: {name} off by {error}"


def plans(num_ranks: int, *, budget: int, longest: int) -> dict:
    """Plan 128 groups of 8 for a 7B model; returns balance of ranks, padding, and planning time."""
    shape = Shape(28, 3584, 28, 4, 128, 18944, 152064, 0, 0, False)
    sequences = rollouts(groups=128, group_size=8, longest=longest, seed=2)
    answers = {}
    for way in ("padded", "packed", "shared"):
        start = time.process_time()
        plan = plan_rows(sequences, num_ranks=num_ranks, budget=budget, shape=shape, **WAYS[way])
        answers[way] = {
            "milliseconds": 1e3 * (time.process_time() - start),
            "balance_ratio": plan.balance_ratio,
            "padding_fraction": plan.padding_fraction,
            "fill": plan.load.tokens / (num_ranks * len(plan.ranks[0]) * budget),
            "tokens": plan.load.tokens,
        }
    return answers


def save_random_model(directory: str) -> str:
    """Write a random Qwen2 as Hugging Face files."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**MODEL, tie_word_embeddings=True)).save_pretrained(directory)
    return directory


def make_actor(hf: str, budget: int, settings: dict) -> Actor:
    """Return an actor on one rank in float32."""
    config = from_tree(
        {
            "run": {"dir": "unused"},
            "model": {"hf": hf, "dtype": "float32"},
            "data": {"train": "unused", "eval": "unused", "max_prompt_tokens": LONGEST // 12},
            "selection": {"num_candidates": 4, "num_selected": 2},
            "rollout": {"max_new_tokens": LONGEST - LONGEST // 12},
            "train": {"total_steps": 3, "micro_batch_tokens": budget} | settings,
            "optimizer": {"lr": 0.0},
        }
    )
    if not torch.distributed.is_initialized():
        parallel.initialize(config.parallel, 1)
    return Actor(config)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=ownership.new_file(), required=True)
    parser.add_argument(
        "--groups", type=int, default=8, help="number of groups, of 8 rollouts each"
    )
    parser.add_argument("--budget", type=int, default=4096, help="tokens per micro-batch")
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
