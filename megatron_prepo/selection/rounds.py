"""The rounds of a step: what a selector chooses, checked before anything is rolled out."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prepo.errors import UserError
from megatron_prepo.prepo.group_rows import as_rows
from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates, Selector


@dataclass(frozen=True)
class Choice:
    """Prompts that are rolled out together, in one round of a step."""

    positions: list[int]
    """Positions among the candidates."""
    prompts: list[Prompt]
    samples: list[range]
    """Numbers of each prompt's rollouts: from 0, or after those of earlier rounds."""

    @property
    def sizes(self) -> list[int]:
        """Number of rollouts of each prompt."""
        return [len(numbers) for numbers in self.samples]

    def rewards(self, reward_N: torch.Tensor) -> Any:
        """Return what `Selector.observe` receives: `rewards_KG`, or K tensors if sizes differ."""
        return as_rows(reward_N, self.sizes)


def rounds(
    selector: Selector,
    candidates: Candidates,
    step: int,
    *,
    num_selected: int,
    group_size: int,
    method: str,
) -> Iterator[Choice]:
    """Yield the prompts to roll out: once, or until a method that refills has done.

    Between two rounds the caller lets the selector observe the rewards of the first.  Raises
    UserError, which names `selection.method`, for a choice that cannot be rolled out, has another
    size than K, or another number of rollouts than K*G where the method shares these; a method that
    refills may choose more than K in its rounds.
    """
    choosing, sizing = (
        f"selection.method={method}: {name}, in step {step}," for name in ("choose", "group_sizes")
    )
    positions, more = range(len(candidates.prompts)), True
    generated: Counter[int] = Counter()
    while more:
        taken = () if selector.shares_budget else generated
        chosen = _checked(selector.choose(candidates, step), positions, choosing, taken)
        more, prompts = selector.refills and bool(chosen), candidates.at(chosen)
        sizes = _sizes(selector.group_sizes(prompts, group_size), prompts, sizing) if chosen else []
        pairs = list(zip(chosen, sizes, strict=True))
        choice = Choice(chosen, prompts, [range(generated[p], generated[p] + n) for p, n in pairs])
        generated.update(dict(pairs))
        if selector.shares_budget:
            _check_budget(generated, num_selected * group_size, more, sizing)
        if not more:
            _check_number(generated, num_selected, selector.refills, choosing)
        if chosen:
            yield choice


def _check_number(generated: Counter[int], num_selected: int, refills: bool, what: str) -> None:
    """Raise UserError unless K prompts are chosen in all, or at least K where a method refills."""
    num = len(generated)
    if not refills and num != num_selected:
        raise UserError(
            f"{what} returned {num} positions; return selection.num_selected="
            f"{num_selected}, or set refills = True to choose in several rounds"
        )
    if num < num_selected:
        raise UserError(
            f"{what} returned {num} positions in all rounds; return at least "
            f"selection.num_selected={num_selected}"
        )


def _check_budget(generated: Counter[int], budget: int, more: bool, what: str) -> None:
    """Raise UserError for too many rollouts, or, without more rounds, for too few."""
    total = generated.total()
    if total > budget or (total < budget and not more):
        raise UserError(
            f"{what} returned {total} rollouts in all; share selection.num_selected * "
            f"rollout.samples_per_prompt = {budget} among the prompts, or set shares_budget = False"
        )


def _sizes(sizes: object, prompts: Sequence[Prompt], what: str) -> list[int]:
    """Return the numbers of rollouts; raises UserError unless there is one for each prompt."""
    if (
        not isinstance(sizes, list)
        or len(sizes) != len(prompts)
        or not all(type(size) is int and size >= 1 for size in sizes)
    ):
        raise UserError(
            f"{what} returned {sizes!r:.80} for {len(prompts)} prompts; return a list with an int "
            "of at least 1 for each"
        )
    return sizes


def _checked(chosen: object, positions: range, what: str, taken: Collection[int] = ()) -> list[int]:
    """Return what a selector chose; raises UserError unless it is a list of new positions."""
    if not isinstance(chosen, list):
        raise UserError(
            f"{what} returned a {type(chosen).__name__}; return a list of positions, such as "
            "tensor.tolist()"
        )
    known = set(taken)
    for position in chosen:
        if type(position) is not int:
            raise UserError(
                f"{what} returned the position {position!r:.80} of type {type(position).__name__}; "
                "return positions of type int"
            )
        if position not in positions:
            raise UserError(
                f"{what} returned the position {position}; return positions from 0 to "
                f"{positions[-1]}"
            )
        if position in known:
            raise UserError(
                f"{what} returned the position {position} twice; return each candidate at most "
                "once per step"
            )
        known.add(position)
    return chosen
