"""Length of a run: rollouts, evaluations and GPU hours."""

from dataclasses import dataclass

from megatron_prepo.config import Config, EvalConfig, TrainConfig
from megatron_prepo.files import rows

Range = tuple[float, float]


@dataclass(frozen=True)
class Evaluations:
    """Completions that a run generates to evaluate itself."""

    number: int
    completions: int


def rollouts_per_step(config: Config) -> tuple[int, int]:
    """Return the least and the most; a method that refills uses between K and P groups.

    One that shares the budget of a step uses K groups' rollouts, however many prompts get some.
    """
    from megatron_prepo.selection import load

    selection, method = config.selection, load(config.selection.method)
    least = most = selection.num_selected
    if method.refills and not method.shares_budget:
        most = selection.num_candidates
    if method.needs_pass_rates:
        least = most = selection.num_selected + selection.num_candidates
    group = config.rollout.samples_per_prompt
    return least * group, most * group


def until_budget(train: TrainConfig, per_step: int) -> int:
    """Return the rollouts of the run; a budget ends it after the step that reaches it."""
    unlimited = train.total_steps * per_step
    budget = train.rollout_budget
    return unlimited if budget is None else min(unlimited, -(-budget // per_step) * per_step)


def num_steps(train: TrainConfig, per_step: int) -> int:
    """Return the steps of the run."""
    return -(-until_budget(train, per_step) // per_step)


def eval_prompts(config: Config) -> int | None:
    """Return the prompts of an evaluation; None if `data.eval` is not on this machine."""
    numbers = [_prompts_of(file, config.eval) for file in config.data.eval_files.values()]
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _prompts_of(place: str, settings: EvalConfig) -> int | None:
    most = settings.max_prompts
    if not rows.exists(place):
        return most
    number = rows.num_rows(place)
    return number if most is None else min(number, most)


def evaluations(settings: EvalConfig, steps: int, prompts: int) -> Evaluations:
    """Return the evaluations before, during and after a run of this many steps."""
    during = (steps - 1) // settings.every if settings.every else 0
    samples = 2 * settings.samples_per_prompt + during * settings.samples_during
    return Evaluations(number=2 + during, completions=samples * prompts)


def gpu_hours(
    train: TrainConfig, gpus: int, seconds: dict[str, Range], least: int, most: int
) -> Range:
    """Return the GPU hours of the run's steps, fastest and slowest.

    `seconds` are those of a step of `least` rollouts; a method that refills may generate `most`,
    and then reaches a budget in fewer steps.
    """

    def hours(speed: int, per_step: int) -> float:
        refills = seconds["rollouts"][speed] * (per_step / least - 1)
        step = sum(both[speed] for both in seconds.values()) + refills
        return num_steps(train, per_step) * step * gpus / 3600

    paces = (least, most)
    return min(hours(0, pace) for pace in paces), max(hours(1, pace) for pace in paces)


def evaluation_hours(completions: int, gpus: int, rollouts: Range, per_step: int) -> Range:
    """Return the GPU hours of evaluations, whose completions are as long as rollouts.

    `rollouts` are the seconds of a step of `per_step` rollouts.
    """
    steps = completions / per_step
    return rollouts[0] * steps * gpus / 3600, rollouts[1] * steps * gpus / 3600
