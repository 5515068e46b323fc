"""Print a step as a table: prompts, perplexities, completions, rewards, weights.

    python tools/inspect/step.py runs/demo 3                       # from ledger and metrics
    python tools/inspect/step.py runs/demo/dumps/step_0003         # with the completions

Without a dump of the step (`debug.dump_steps`) the completions are those that the run keeps
(`texts.rollouts`), and perplexities are ranked among the prompts that were rolled out.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_prepo import config as configuration
from megatron_prepo.config import Config
from megatron_prepo.debug import dump
from megatron_prepo.errors import UserError
from megatron_prepo.files.atomic import read_lines
from megatron_prepo.files.existing import existing
from megatron_prepo.files.rows import exists, read_records
from megatron_prepo.prepo.group_rows import as_rows
from megatron_prepo.prepo.loss import rollout_coefficients
from megatron_prepo.process.command import in_one_line
from megatron_prepo.run import ledger
from megatron_prepo.run.texts import file_name
from megatron_prepo.trainer.overlong import Overlong
from megatron_prepo.trainer.policy_update import estimate_advantages


@dataclass(frozen=True)
class Line:
    """One rollout."""

    reward: float
    advantage: float | None
    length: int
    finished: bool
    entropy: float | None
    weight: float | None
    trained: bool
    completion: str | None = None


@dataclass(frozen=True)
class Group:
    """A prompt and its rollouts."""

    prompt_id: str
    ppl: float | None
    rank: int | None
    """Rank of its perplexity, starting with 1 for the lowest."""
    prompt: str | None
    rollouts: list[Line]


def groups_of_dump(of: dump.Dump) -> list[Group]:
    """Read groups from a dump, which has all except those that were not trained on."""
    ppl = {c["id"]: c["ppl"] for c in of.about["candidates"] if c["ppl"] is not None}
    rank = {prompt_id: r for r, prompt_id in enumerate(sorted(ppl, key=ppl.get), 1)}
    weight_N, entropies = weights(of), of.per_rollout("entropy_T")
    lines: dict[str, list[Line]] = {}
    for n, (rollout, batch) in enumerate(zip(of.rollouts, of.batch, strict=True)):
        line = Line(
            reward=float(of.rewards_N[n]),
            advantage=batch.advantage,
            length=len(rollout.tokens),
            finished=rollout.finished,
            entropy=float(entropies[n].mean()),
            weight=float(weight_N[n]),
            trained=True,
            completion=rollout.text,
        )
        lines.setdefault(rollout.prompt.id, []).append(line)
    prompts = {rollout.prompt.id: rollout.prompt.text for rollout in of.rollouts}
    return [Group(i, ppl.get(i), rank.get(i), prompts[i], lines[i]) for i in lines]


def weights(of: dump.Dump) -> torch.Tensor:
    """Return `weight_N`: each coefficient without the normaliser of its update."""
    parts = []
    for _, batch in of.updates():
        lengths_N = torch.tensor([s.sequence.num_scored for s in batch])
        unweighted_N = rollout_coefficients(
            torch.ones(len(batch)).double(),
            lengths_N,
            of.config.loss.aggregation,
            max_tokens=of.config.rollout.max_new_tokens,
        )
        parts.append(torch.tensor([s.coefficient for s in batch]).double() / unweighted_N)
    return torch.cat(parts)


def groups_of_run(run: Path, step: int, config: Config) -> list[Group]:
    """Read groups from ledger and kept texts; advantages are recomputed from the rewards."""
    entries = [e for e in ledger.read(run / "ledger.jsonl") if e.step == step]
    if not entries:
        raise UserError(f"{run / 'ledger.jsonl'} has no rollouts of step {step}")
    by_prompt: dict[tuple[str, str], list[ledger.LedgerEntry]] = {}
    for entry in entries:
        by_prompt.setdefault((entry.purpose, entry.prompt_id), []).append(entry)
    ppl = {i: e[0].ppl for (_, i), e in by_prompt.items() if e[0].ppl is not None}
    rank = {prompt_id: r for r, prompt_id in enumerate(sorted(ppl, key=ppl.get), 1)}
    prompts, completions, groups = prompt_texts(config), kept_completions(run, step), []
    advantages = trained_advantages(config, by_prompt)
    for (purpose, prompt_id), group in by_prompt.items():
        lines = [
            Line(
                reward=entry.reward,
                advantage=advantage if entry.trained else None,
                length=entry.length,
                finished=entry.finished,
                entropy=entry.mean_entropy,
                weight=entry.weight,
                trained=entry.trained,
                completion=completions.get((purpose, prompt_id, entry.sample)),
            )
            for entry, advantage in zip(group, advantages[purpose, prompt_id], strict=True)
        ]
        name = prompt_id if purpose == "train" else f"{prompt_id} ({purpose})"
        groups.append(
            Group(name, ppl.get(prompt_id), rank.get(prompt_id), prompts.get(prompt_id), lines)
        )
    return groups


def kept_completions(run: Path, step: int) -> dict[tuple[str, str, int], str]:
    """Return the completions of a step that the run keeps, by purpose, prompt and sample."""
    path = run / file_name("rollouts")
    lines = read_lines(path) if path.is_file() else ()
    return {
        ("train", prompt["id"], sample): rollout["text"]
        for line in lines
        if line["step"] == step
        for prompt in line["prompts"]
        for sample, rollout in enumerate(prompt["rollouts"])
    }


def trained_advantages(
    config: Config, groups: Mapping[tuple[str, str], Sequence[ledger.LedgerEntry]]
) -> dict[tuple[str, str], Sequence[float | None]]:
    """Return the advantages of each group, recomputed; None for groups not trained on.

    All are None where the ledger does not have what they depend on: log-probabilities (the
    divergence is in the reward), the selector's state (`posterior`) or entropies (`rl_zvp`).
    """
    known: dict[tuple[str, str], Sequence[float | None]] = {
        key: [None] * len(group) for key, group in groups.items()
    }
    trained = [key for key, group in groups.items() if any(entry.trained for entry in group)]
    known_by_rewards = config.advantage.method not in ("posterior", "rl_zvp")
    if trained and known_by_rewards and not config.loss.kl_in_reward:
        penalty = Overlong.of(config.rollout).penalty
        sizes = [len(groups[key]) for key in trained]
        entries = [entry for key in trained for entry in groups[key]]
        reward_N = torch.tensor([entry.reward + penalty(entry.length) for entry in entries])
        lengths_N = torch.tensor([entry.length for entry in entries])
        advantage_N = estimate_advantages(config.advantage, as_rows(reward_N, sizes), lengths_N)
        by_group = [advantage_G.tolist() for advantage_G in advantage_N.split(sizes)]
        known |= dict(zip(trained, by_group, strict=True))
    return known


def prompt_texts(config: Config) -> dict[str, str]:
    """Return the training prompts by id, if their file still exists."""
    data = config.data
    if not exists(data.train):
        return {}
    records = read_records(data.train, needs_answer=False, fields=data.fields)
    return {record.id: record.prompt for record in records}


def table(groups: Sequence[Group], *, width: int) -> str:
    """Format the groups by perplexity: one line for the prompt, and one line per rollout."""
    lines = []
    for group in sorted(groups, key=lambda g: (g.ppl is None, g.ppl or 0.0)):
        ppl = "" if group.ppl is None else f"  ppl {group.ppl:.4g}, rank {group.rank}"
        solved = sum(line.reward for line in group.rollouts) / len(group.rollouts)
        lines.append(f"\n{group.prompt_id}{ppl}  mean reward {solved:.2f}")
        if group.prompt is not None:
            lines.append(f"  {cut(group.prompt, width - 2)}")
        lines.append("    reward  advantage  weight  entropy  tokens")
        for line in group.rollouts:
            numbers = (
                f"    {line.reward:6.2f}  {number(line.advantage, 9)}  {number(line.weight, 6)}  "
                f"{number(line.entropy, 7)}  {line.length:5d}{' ' if line.finished else '+'}"
            )
            note = "" if line.trained else "  dropped"
            text = "" if line.completion is None else f"  {line.completion}"
            lines.append(numbers + note + cut(text, max(10, width - len(numbers) - len(note))))
    lines.append("\n+ cut at the limit of new tokens")
    return "\n".join(line.rstrip() for line in lines)


def number(value: float | None, width: int) -> str:
    """Format a number with three decimals, or as a dash."""
    return f"{'-':>{width}}" if value is None else f"{value:{width}.3f}"


def cut(text: str, width: int) -> str:
    """Return a text in one line, truncated to a width."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= width else line[: width - 3] + "..."


def numbers_of(metrics: dict) -> str:
    """Format the metrics of a step, except for times, in two columns."""
    shown = [
        f"{name:32} {value:12.5g}"
        for name, value in metrics.items()
        if isinstance(value, int | float) and not name.startswith("seconds/")
    ]
    half = -(-len(shown) // 2)
    pairs = zip(shown[:half], [*shown[half:], ""], strict=False)
    return "\n".join("   ".join(pair).rstrip() for pair in pairs)


def inspect_dump(directory: Path, *, width: int) -> str:
    """Return a dump as text."""
    of = dump.read(directory)
    parts = [f"step {of.about['step']}, dumped because of {of.about['why']}; {directory}"]
    for result in of.about["results"]:
        parts.append(
            f"update {result['update']}: {result['rollouts']} rollouts, loss {result['loss']:.6g}, "
            f"gradient norm {result['grad_norm']:.6g}"
        )
        if result.get("not_finite"):
            parts.append(f"  gradients that are not finite: {', '.join(result['not_finite'])}")
    return "\n".join([*parts, table(groups_of_dump(of), width=width)])


def inspect_run(run: Path, step: int, *, width: int) -> str:
    """Return a step of a run as text: its dump if it exists, and its metrics."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run: it has no config.yaml")
    metrics = [m for m in read_lines(run / "metrics.jsonl") if m["step"] == step]
    parts = [numbers_of(metrics[-1])] if metrics else []
    dumped = run / "dumps" / f"step_{step:04d}"
    if dumped.is_dir():
        return "\n\n".join([*parts, inspect_dump(dumped, width=width)])
    config = configuration.load(run / "config.yaml")
    groups = groups_of_run(run, step, config)
    note = (
        "no dump of this step: completions as far as the run keeps them (texts.rollouts), and "
        "ranks are among the prompts that were rolled out"
    )
    return "\n\n".join([*parts, note, table(groups, width=width)])


@in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=existing(), help="directory of a run, or a dump")
    parser.add_argument("step", nargs="?", type=int, help="step of a run, counted from 0")
    parser.add_argument("--width", type=int, default=120, help="width of a line (%(default)s)")
    options = parser.parse_args(arguments)
    path = options.path
    if options.step is None:
        print(inspect_dump(path, width=options.width))
    else:
        print(inspect_run(path, options.step, width=options.width))
    return 0


if __name__ == "__main__":
    sys.exit(main())
