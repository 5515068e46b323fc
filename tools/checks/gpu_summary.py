"""One screen about a check on a GPU machine: verdicts, goals and measurements, failures last."""

from collections.abc import Iterator
from typing import Any

from tools.bench.head_stages import RATES

NOT_STARTED: dict[str, Any] = {"passed": False, "not_started": True}
"""In place of the result of a part for which no time was left."""
REHEARSAL = "REHEARSAL of a tiny size without a GPU: no number here is a measurement."
LAST_LINES = 12
"""Lines of a failed part's output; its file has more."""


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """Return the summary of the parts' results, by name."""
    rehearsed = any(result.get("rehearsal") for result in results.values())
    lines = [REHEARSAL, ""] if rehearsed else []
    lines += ["| part | result | seconds |", "|---|---|---|"]
    for name, result in results.items():
        lines.append(f"| {name} | {verdict(result)} | {result.get('seconds', '')} |")
    for name, result in results.items():
        if found := list(FINDINGS[name](result)) if name in FINDINGS else []:
            what = f"{name}, rehearsed" if result.get("rehearsal") else name
            lines += ["", f"{what}:", *(f"- {line}" for line in found)]
    for name, result in results.items():
        if not result["passed"] and "output" in result:
            lines += ["", f"FAILED: {name}, the end of its output:"]
            lines += [f"    {line}" for line in result["output"].splitlines()[-LAST_LINES:]]
    return "\n".join(lines)


def verdict(result: dict[str, Any]) -> str:
    """Return whether a part passed, or was stopped, and then whether it has measured something."""
    if result["passed"]:
        return "rehearsed" if result.get("rehearsal") else "passed"
    if "not_started" in result:
        return "not started"
    if not result.get("ended_at_the_deadline"):
        return "FAILED"
    measured = result.get("measured") or result.get("outcomes")
    return "stopped, with a result so far" if measured else "stopped, no result"


def of_head(result: dict[str, Any]) -> Iterator[str]:
    """Yield the goals, and the stages with their rates."""
    measured = result.get("measured") or {"cases": []}
    yield from _goals(result)
    for case in measured["cases"]:
        for stage, row in case.get("stages", {"table": {}})["table"].items():
            if (median := row["milliseconds"]["median"]) is not None:
                rates = [f"{row[key]:.4g} {unit}" for key, unit in UNITS if key in row]
                yield f"stage {stage}: {median:.3f} ms, {', '.join(rates)}"


def of_utilisation(result: dict[str, Any]) -> Iterator[str]:
    """Yield the goal, and one line per arm."""
    measured = result.get("measured") or {"cases": []}
    yield from _goals(result)
    for case in measured["cases"]:
        for name, arm in case["arms"].items():
            yield f"{case['model']}, {name}: {_arm(arm)}"


def of_tests(result: dict[str, Any]) -> Iterator[str]:
    """Yield how many passed, and those that did not."""
    outcomes = result.get("outcomes", {})
    if outcomes:
        yield f"{sum(o == 'PASSED' for o in outcomes.values())} of {len(outcomes)} passed"
    yield from (f"{outcome}: {test}" for test, outcome in outcomes.items() if outcome != "PASSED")


def of_plan(result: dict[str, Any]) -> Iterator[str]:
    """Yield planned over measured memory of each case, and the rate of copies."""
    measured = result.get("measured") or {"memory": [], "copies": {}}
    for case in measured["memory"]:
        how = "recomputed" if case["megatron"] else "kept"
        ratio = case["planned_over_measured"]
        yield f"{case['model']}, activations {how}: planned over measured {ratio:.3f}"
    for name, rate in measured["copies"].items():
        if rate is not None and "peak" not in name:
            yield f"copy, {name}: {rate / 1e9:.1f} GB/s"


def of_demo(result: dict[str, Any]) -> Iterator[str]:
    """Yield the pass rate before and after."""
    if summary := result.get("measured"):
        before, after = summary["pass_rate_before"], summary["pass_rate_after"]
        yield f"pass rate {before:.3f} before, {after:.3f} after"


def of_checkpoint(result: dict[str, Any]) -> Iterator[str]:
    """Yield seconds of each phase."""
    if measured := result.get("measured"):
        phases = [f"{name} {seconds} s" for name, seconds in measured["seconds"].items()]
        yield f"{measured['bytes'] / 1e9:.1f} GB: {', '.join(phases)}"


def of_sglang(result: dict[str, Any]) -> Iterator[str]:
    """Yield the verdict on each step, the pass rates, and the rate of the sync."""
    for step in ("training", "sync"):
        if step in result:
            yield f"{step}: {verdict(result[step])}, {result[step]['seconds']} s"
    measured = result.get("measured", {})
    if "training" in measured:
        yield from of_demo({"measured": measured["training"]})
    for name, way in measured.get("sync", {"transports": {}})["transports"].items():
        yield f"sync by {name}: {way['gigabytes_a_second']:.1f} GB/s"


def _goals(result: dict[str, Any]) -> Iterator[str]:
    """Yield the verdicts on the goals, of which a rehearsal has none."""
    if result.get("measured") and not result.get("rehearsal"):
        yield from map(_goal, result["measured"]["goals"])


def _goal(row: dict[str, Any]) -> str:
    measured = "-" if row["measured"] is None else f"{row['measured']:.4g}"
    cut = f" ({row['cut']})" if row["cut"] else ""
    return f"{row['verdict']}{cut}: {row['goal']} {measured}, goal {row['bound']}"


def _arm(arm: dict[str, Any]) -> str:
    if "failed" in arm:
        return f"failed: {arm['failed']}"
    update = arm["update"]
    mfu = "" if update["mfu"] is None else f"{update['mfu']:.3f} of the peak, "
    return f"update {mfu}{update['tokens_per_second']:,.0f} tokens/s"


UNITS = tuple(zip(RATES, ("TFLOP/s", "GB/s"), strict=True))
FINDINGS = {
    "head": of_head,
    "utilisation": of_utilisation,
    "tests": of_tests,
    "plan": of_plan,
    "demo": of_demo,
    "checkpoint": of_checkpoint,
    "sglang": of_sglang,
    "real": of_demo,
}
