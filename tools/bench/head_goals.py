"""Goals of the head, and the verdict of a measurement on each: met, missed, not measured.

Speed is a ratio to another provider of the same run, never a time.  A goal is judged only at
REFERENCE; that of a case that was stopped early names the number of samples.
"""

import math

from tools.bench.head_providers import EPILOGUE, FORWARD, FORWARD_BACKWARD, KNOWN_GRADIENT

REFERENCE = ("Qwen2.5-7B", 1)
"""Model and tensor-parallel size."""
REFERENCE_TOKENS = (8192, 32768)
CPU_TENSOR = 2

SPEED = (
    (FORWARD, "bare", FORWARD, 0.90),
    (FORWARD, "verl", FORWARD, 1.65),
    (FORWARD, "naive", FORWARD, 2.5),
    (FORWARD_BACKWARD, "bare", FORWARD_BACKWARD, 0.90),
    (FORWARD_BACKWARD, "verl", FORWARD_BACKWARD, 1.45),
    (FORWARD_BACKWARD, "naive", FORWARD_BACKWARD, 1.6),
    (KNOWN_GRADIENT, "verl", FORWARD_BACKWARD, 1.9),
)
"""Our task, the provider's task to compare with, and the minimum ratio of speeds."""
KEPT = 1.0
"""Ratio from which `head_epilogue.py` is worth its code."""
PEAK_BYTES = 0.7e9
PEAK_GROWTH = 1.05
"""Maximum growth of the peak from the fewer to the more of REFERENCE_TOKENS: it must not depend on
tokens, except for a few numbers per token."""
LOGPROB_ERROR = 1e-5
CPU_TASKS = (
    (FORWARD, FORWARD),
    (FORWARD_BACKWARD, FORWARD_BACKWARD),
    (KNOWN_GRADIENT, FORWARD_BACKWARD),
)
"""Our task, and the task of the naive implementation to compare with."""
CPU_SPEED, CPU_MEMORY = 1.0, 20.0


def judge(device: str, cases: list[dict]) -> list[dict]:
    """Return one row per goal: name, bound, measured value, and verdict."""
    return _on_the_cpu(cases) if device == "cpu" else _on_a_gpu(cases)


def _on_a_gpu(cases: list[dict]) -> list[dict]:
    few, many = (_find(cases, *REFERENCE, tokens) for tokens in REFERENCE_TOKENS)
    rows = []
    for tokens, case in zip(REFERENCE_TOKENS, (few, many), strict=True):
        for task, other, other_task, factor in SPEED:
            goal = f"N = {tokens}: {task}, speed over that of {other}'s {other_task}"
            speed = _over(_median(case, other, other_task), _median(case, "ours", task))
            cut = case["cut"] if case and speed is not None else None
            rows.append(at_least(goal, factor, speed) | {"cut": cut})
        goal = f"N = {tokens}: forward, speed of the best epilogue over ours, to be kept"
        speed = _over(_median(case, "ours", FORWARD), _epilogue(case))
        cut = case["cut"] if case and speed is not None else None
        rows.append(at_least(goal, KEPT, speed) | {"cut": cut})
        error = _logprob_error(case)
        rows.append(at_most(f"N = {tokens}: mean log-prob error", LOGPROB_ERROR, error))
    for task in (FORWARD, FORWARD_BACKWARD):
        small, large = (_peak(case, "ours", task) for case in (few, many))
        rows.append(at_most(f"N = {REFERENCE_TOKENS[1]}: {task}, peak bytes", PEAK_BYTES, large))
        goal = f"{task}, peak at N = {REFERENCE_TOKENS[1]} over that at {REFERENCE_TOKENS[0]}"
        rows.append(at_most(goal, PEAK_GROWTH, _over(large, small)))
    return rows


def _on_the_cpu(cases: list[dict]) -> list[dict]:
    rows = []
    for case in cases:
        for task, naive_task in CPU_TASKS:
            where = f"hidden {case['shape']['hidden']}: {task}"
            speed = _over(_median(case, "naive", naive_task), _median(case, "ours", task))
            rows.append(at_least(f"{where}, speed over naive's {naive_task}", CPU_SPEED, speed))
            memory = _over(_peak(case, "naive", naive_task), _peak(case, "ours", task))
            rows.append(at_least(f"{where}, naive's peak over ours", CPU_MEMORY, memory))
    return rows


def at_least(goal: str, bound: float, measured: float | None) -> dict:
    """Return a goal that is met if measured >= bound."""
    return _row(goal, f"≥ {bound:g}", measured, measured is not None and measured >= bound)


def at_most(goal: str, bound: float, measured: float | None) -> dict:
    """Return a goal that is met if measured <= bound."""
    return _row(goal, f"≤ {bound:g}", measured, measured is not None and measured <= bound)


def _row(goal: str, bound: str, measured: float | None, met: bool) -> dict:
    verdict = "not measured" if measured is None else "met" if met else "missed"
    # JSON has no infinity: an infinite value is a missed goal without a number
    finite = measured is not None and math.isfinite(measured)
    return {
        "goal": goal,
        "bound": bound,
        "measured": measured if finite else None,
        "verdict": verdict,
        "cut": None,
    }


def _find(cases: list[dict], model: str, tensor: int, tokens: int) -> dict | None:
    for case in cases:
        shape = case["shape"]
        if (shape["model"], shape["tensor"], shape["tokens"]) == (model, tensor, tokens):
            return case
    return None


def _run(case: dict | None, provider: str, task: str) -> dict | None:
    return None if case is None else case["runs"].get(provider, {}).get(task)


def _median(case: dict | None, provider: str, task: str) -> float | None:
    run = _run(case, provider, task)
    return None if run is None else run["milliseconds"]["median"]


def _epilogue(case: dict | None) -> float | None:
    """Return the median of the fastest tile whose numbers are right."""
    right = [
        run[FORWARD]["milliseconds"]["median"]
        for name, run in (case["runs"] if case else {}).items()
        if name.startswith(EPILOGUE) and _error(run[FORWARD]) <= LOGPROB_ERROR
    ]
    return min((median for median in right if median is not None), default=None)


def _peak(case: dict | None, provider: str, task: str) -> int | None:
    run = _run(case, provider, task)
    return None if run is None else run["peak_extra_bytes"]


def _logprob_error(case: dict | None) -> float | None:
    run = _run(case, "ours", FORWARD)
    return None if run is None else _error(run)


def _error(run: dict) -> float:
    """Return the error, which is infinite if a single number is not finite."""
    error = run["errors"]["logprob"]
    return math.inf if error["not_finite"] else error["mean"]


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
