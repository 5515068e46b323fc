"""Helpers shared by the tests of the selection methods: selectors, prompts, rewards, and a step."""

from collections.abc import Callable

import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.prepo.group_rows import as_rows
from megatron_prepo.records import Prompt
from megatron_prepo.rewards.pool import Grade
from megatron_prepo.selection import METHODS
from megatron_prepo.selection.base import Candidates


def selector(
    method="prepo", *, candidates=10, selected=2, total_steps=5, seed=1, pass_reward=1.0, **settings
):
    config = SelectionConfig(
        method=method, num_candidates=candidates, num_selected=selected, **settings
    )
    return METHODS[method](config, total_steps=total_steps, seed=seed, pass_reward=pass_reward)


def prompts(num: int, prefix="p") -> list[Prompt]:
    return [
        Prompt(f"{prefix}{i}", f"question {i}", "1", tuple(range(2 + i)), (0, 2 + i))
        for i in range(num)
    ]


def passes(*passes_K: int, group_size=4) -> torch.Tensor:
    """Return `rewards_KG`: for each group, this many rewards of 1, followed by zeros."""
    return torch.tensor([[1.0] * s + [0.0] * (group_size - s) for s in passes_K])


def grades(rewards_KG: torch.Tensor) -> list[Grade]:
    """Return the grades that a grader would have given."""
    return [Grade(reward) for reward in rewards_KG.flatten().tolist()]


def run_step(
    chooser, candidates: Candidates, step: int, reward: Callable[[list[int]], torch.Tensor]
) -> list[list[int]]:
    """Run the rounds of a step as `train.py` does; `reward` grades a round.

    A group of another size than `reward` has gets the first of its rewards, again and again.
    """
    rounds: list[list[int]] = []
    while chosen := chooser.choose(candidates, step):
        rewards_KG, prompts = reward(chosen), candidates.at(chosen)
        sizes = chooser.group_sizes(prompts, rewards_KG.shape[1])
        rows = [row.repeat(n)[:n] for row, n in zip(rewards_KG, sizes, strict=True)]
        chooser.observe(prompts, as_rows(torch.cat(rows), sizes))
        rounds.append(chosen)
        if not chooser.refills:
            break
    if chooser.needs_updates:
        chooser.observe_update(0.001 * (step % 3))
    return rounds
