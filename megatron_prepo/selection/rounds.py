"""The rounds of a step: what a selector chooses, checked before anything is rolled out."""

from collections.abc import Collection, Iterator

from megatron_prepo.errors import UserError
from megatron_prepo.selection.base import Candidates, Selector


def rounds(
    selector: Selector, candidates: Candidates, step: int, *, num_selected: int, method: str
) -> Iterator[list[int]]:
    """Yield positions of the candidates to roll out: once, or until a method that refills has done.

    Between two rounds the caller lets the selector observe the rewards of the first.  Raises
    UserError, which names `selection.method`, for a choice that cannot be rolled out or has another
    size than K; a method that refills may choose more than K in its rounds.
    """
    what = f"selection.method={method}: choose, in step {step},"
    positions = range(len(candidates.prompts))
    if not selector.refills:
        chosen = _checked(selector.choose(candidates, step), positions, what)
        if len(chosen) != num_selected:
            raise UserError(
                f"{what} returned {len(chosen)} positions; return selection.num_selected="
                f"{num_selected}, or set refills = True to choose in several rounds"
            )
        yield chosen
        return
    taken: list[int] = []
    while chosen := _checked(selector.choose(candidates, step), positions, what, taken):
        yield chosen
        taken += chosen
    if len(taken) < num_selected:
        raise UserError(
            f"{what} returned {len(taken)} positions in all rounds; return at least "
            f"selection.num_selected={num_selected}"
        )


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
