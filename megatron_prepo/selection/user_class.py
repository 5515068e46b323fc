"""A selector of the user's own, `selection.method=FILE.py:CLASS`: loaded, and tried before a run.

The trial is a short made-up run without a model: real numbers of candidates and steps, invented
prompts, scores and rewards.  It finds what would otherwise fail hours later, at the first resume.
"""

import inspect
import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from megatron_prepo.config import SelectionConfig
from megatron_prepo.errors import UserError, one_line
from megatron_prepo.files import user_code
from megatron_prepo.records import Prompt
from megatron_prepo.selection.base import Candidates, Selector
from megatron_prepo.selection.rounds import Choice, rounds

MODULE = "__selection_file__"
"""Module name of a user's file."""
TRIAL_STEPS = 6
CONTRACTS = {
    "__init__": "(self, config, *, total_steps, seed, pass_reward)",
    "choose": "(self, candidates, step)",
    "group_sizes": "(self, prompts, group_size)",
    "observe": "(self, prompts, rewards_KG)",
    "observe_update": "(self, size)",
    "metrics": "(self)",
    "state_dict": "(self)",
    "load_state_dict": "(self, state)",
}
"""Signature of each method of a selector."""


def load(method: str) -> type[Selector]:
    """Return the class that `selection.method=FILE.py:CLASS` names.

    Raises UserError for a file that fails, with its line, and for anything but a selector.
    """
    try:
        found = user_code.load(method, module=MODULE, kind="class", is_kind=inspect.isclass)
    except UserError as error:
        raise UserError(f"selection.method={method} does not load: {one_line(error)}") from error
    return _checked_class(found, f"selection.method={method}")


def _checked_class(found: object, setting: str) -> type[Selector]:
    """Return a class that fulfils the interface as far as this is visible without an instance."""
    if not inspect.isclass(found):
        raise UserError(f"{setting} is a {type(found).__name__}, not a class; name a selector")
    if Selector not in found.__mro__:
        raise UserError(
            f"{setting} is not a selector; derive it from megatron_prepo.selection.Selector"
        )
    for name, contract in CONTRACTS.items():
        function = getattr(found, name)
        if getattr(function, "__isabstractmethod__", False):
            raise UserError(f"{setting} has no method {name}; define {name}{contract}")
        _check_signature(function, name, setting)
    for name in ("needs_scores", "needs_pass_rates", "needs_updates", "refills", "shares_budget"):
        value = getattr(found, name)
        if not isinstance(value, bool):
            raise UserError(f"{setting}: {name} is {value!r:.80}; set it to True or False")
    selector = cast(type[Selector], found)
    features = selector.hidden_features
    if type(features) is not int or features < 0:
        raise UserError(f"{setting}: hidden_features is {features!r:.80}; set it to 0 or more")
    return selector


def _check_signature(function: Callable[..., Any], name: str, setting: str) -> None:
    contract = CONTRACTS[name]
    words = [word.strip() for word in contract.strip("()").split(",")]
    keywords = words[words.index("*") + 1 :] if "*" in words else []
    positional = words[: words.index("*")] if "*" in words else words
    try:
        signature = inspect.signature(function)
        signature.bind(*positional, **dict.fromkeys(keywords))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{setting}: {name} cannot be called as a selector's ({error}); define {name}{contract}"
        ) from None


@dataclass(frozen=True)
class TrialRun:
    """Sizes of the run that a class is to select for."""

    config: SelectionConfig
    total_steps: int
    seed: int
    group_size: int
    """G, the rollouts of each selected prompt."""
    low: float = 0.0
    """Reward of a rollout that fails, and `high` of one that passes."""
    high: float = 1.0


def check(run: TrialRun, *, overlap: bool = False) -> None:
    """Raise UserError unless the class in `selection.method` loads and passes the trial.

    `overlap`: `train.overlap`, which selects a step's prompts once, before the step.
    """
    method = run.config.method
    cls = load(method)
    for name in ("refills", "needs_pass_rates", "needs_updates"):
        if overlap and getattr(cls, name):
            raise UserError(
                f"train.overlap=true selects a step's prompts once, before the step, but "
                f"selection.method={method} has {name} = True; set train.overlap=false or use "
                "another method"
            )
    try_out(cls, run)


def try_out(cls: type[Selector], run: TrialRun) -> None:
    """Raise UserError, which names `selection.method`, unless a class passes the trial.

    Its choices can be rolled out, its metrics logged and its state saved as JSON; the same seed
    gives the same choices, also after a resume from the saved state.
    """
    setting, num_steps = f"selection.method={run.config.method}", min(TRIAL_STEPS, run.total_steps)
    with _errors_located(setting):
        selector, again, resumed = (
            cls(run.config, total_steps=run.total_steps, seed=run.seed, pass_reward=run.high)
            for _ in range(3)
        )
        half = num_steps // 2
        before = [_trial_step(selector, run, step) for step in range(half)]
        saved = selector.state_dict()
        text = _as_json(saved, setting)
        after = [_trial_step(selector, run, step) for step in range(half, num_steps)]
        if _as_json(saved, setting) != text:
            raise UserError(
                f"{setting}: the result of state_dict changes when the selector observes more; "
                "return a copy"
            )
        if [_trial_step(again, run, step) for step in range(num_steps)] != before + after:
            raise UserError(
                f"{setting}: a second selector with the same seed chose other prompts; derive "
                f"random numbers from the seed and the step, as in "
                f'random.Random(f"{{seed}}/name/{{step}}"), and keep data in the instance'
            )
        resumed.load_state_dict(json.loads(text))
        if [_trial_step(resumed, run, step) for step in range(half, num_steps)] != after:
            raise UserError(
                f"{setting}: a selector that was restored by load_state_dict chose other prompts "
                "than the one that was saved; save in state_dict, and restore, all that choose "
                "depends on (keys of JSON objects are text, and tuples become lists)"
            )


def _trial_step(
    selector: Selector, run: TrialRun, step: int
) -> tuple[list[tuple[list[int], list[int]]], dict[str, float]]:
    """Return the prompts and sizes of a step's rounds, and its metrics."""
    method, done = run.config.method, []
    candidates = made_up_candidates(selector, run, step)
    for choice in rounds(
        selector,
        candidates,
        step,
        num_selected=run.config.num_selected,
        group_size=run.group_size,
        method=method,
    ):
        done.append((list(choice.positions), choice.sizes))
        selector.observe(choice.prompts, choice.rewards(_made_up_rewards(choice, run, step)))
    if selector.needs_updates:
        selector.observe_update(1e-6 * (step % 3))
    return done, _checked_metrics(selector.metrics(), f"selection.method={method}")


def made_up_candidates(selector: Selector, run: TrialRun, step: int) -> Candidates:
    """Return the P candidates of a step: every third of 3 P prompts, in another order each time.

    They have the scores that the selector would get in the run.
    """
    num, pool = run.config.num_candidates, range(3 * run.config.num_candidates)
    draw = torch.Generator().manual_seed(step)
    prompts = [_made_up_prompt(i) for i in random.Random(step).sample(pool[step % 3 :: 3], num)]
    ppl_P, entropy_P, pass_rate_P = torch.rand(3, num, generator=draw, dtype=torch.float64)
    by_actor = run.config.ppl_from == "actor"
    hidden_PD = torch.randn(num, selector.hidden_features, generator=draw, dtype=torch.float64)
    return Candidates(
        prompts,
        ppl_P=1 + 20 * ppl_P if selector.needs_scores else None,
        entropy_P=5 * entropy_P if selector.needs_scores and by_actor else None,
        hidden_PD=hidden_PD if selector.needs_scores and by_actor and hidden_PD.numel() else None,
        pass_rate_P=(
            (pass_rate_P * run.group_size).round() / run.group_size
            if selector.needs_pass_rates
            else None
        ),
    )


def _made_up_prompt(i: int) -> Prompt:
    length = 2 + i % 50
    return Prompt(f"trial-{i}", f"question {i}", "1", tuple(range(length)), (0, length))


def _made_up_rewards(choice: Choice, run: TrialRun, step: int) -> torch.Tensor:
    """Return `reward_N` with 0 to G passes per group; in step 1, no group has an advantage."""
    draw = random.Random(f"{step}/{choice.positions}")
    rewards: list[float] = []
    for size in choice.sizes:
        passes = draw.randint(0, size) if step != 1 else 0
        rewards += [run.high] * passes + [run.low] * (size - passes)
    return torch.tensor(rewards)


def _checked_metrics(metrics: object, setting: str) -> dict[str, float]:
    """Return the metrics of a step; raises UserError for any that cannot be logged."""
    if not isinstance(metrics, dict):
        raise UserError(f"{setting}: metrics returned a {type(metrics).__name__}; return a dict")
    for name, value in metrics.items():
        if not (isinstance(name, str) and name.startswith("selection/")):
            raise UserError(
                f"{setting}: metrics returned the name {name!r:.80}; names begin with selection/"
            )
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(
                f"{setting}: metrics returned {name}={value!r:.80}; return finite numbers of type "
                "int or float"
            )
    return dict(metrics)


def _as_json(state: object, setting: str) -> str:
    if not isinstance(state, dict):
        raise UserError(f"{setting}: state_dict returned a {type(state).__name__}; return a dict")
    try:
        return json.dumps(state)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{setting}: state_dict returned what is not JSON ({error}); return dicts with text as "
            "keys, lists, texts and numbers"
        ) from None


@contextmanager
def _errors_located(setting: str) -> Iterator[None]:
    """Raise any exception of the user's code as a UserError with file and line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # any error of a user's class is reported to the user
        file = Path(setting.partition("=")[2].rpartition(":")[0])
        words = one_line(user_code.described(error, file))
        raise UserError(f"{setting} fails on made-up candidates: {words}") from error
