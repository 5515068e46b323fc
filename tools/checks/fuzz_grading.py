r"""Test the grading processes with hostile answers, and measure the longest grading time.

    python tools/checks/fuzz_grading.py --answers 10000 --out result.json   # a mixture of bombs
    python tools/checks/fuzz_grading.py --atheris 3600 --out result.json    # seconds, by coverage

The mixture has bombs of nesting, digits, powers, factorials, sums, roots, polynomials, matrices and
sets, odd characters, megabytes, and splices and pieces of them.  An existing result is resumed.
With atheris (`pip install atheris`) each input goes through a grading process, and harmless ones
then through math-verify in this process, whose coverage guides the next input.
"""

import argparse
import copy
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from megatron_prepo.config import RewardConfig
from megatron_prepo.files.atomic import write_text
from megatron_prepo.files.ownership import earlier_result
from megatron_prepo.process import machine
from megatron_prepo.process.command import in_one_line
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import WALL_CLOCK_FACTOR, Grader

HONEST = (
    r"\frac{3}{7}",
    r"(-\infty, 2] \cup [5, \infty)",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    r"\{1, 2, 3\}",
    r"x^2 + 2x + 1",
    r"12.5\%",
    r"\text{Monday}",
    r"y = 2x + 1",
    "204",
)
BOMBS: dict[str, Callable[[int, random.Random], str]] = {
    "boxes": lambda n, r: r"\boxed{" * n,
    "braces": lambda n, r: "{" * n + "5" + "}" * n,
    "brackets": lambda n, r: "(" * n + "5" + ")" * n,
    "fractions": lambda n, r: r"\frac{1}{" * n + "5" + "}" * n,
    "roots": lambda n, r: r"\sqrt{2+" * n + "2" + "}" * n,
    "absolute values": lambda n, r: "|" * n + "x" + "|" * n,
    "digits": lambda n, r: "9" * n,
    "decimals": lambda n, r: "0." + "3" * n,
    "power tower": lambda n, r: "9^{" * (n % 40 + 2) + "9" + "}" * (n % 40 + 2),
    "power": lambda n, r: f"{n}^{{{n * n}}}",
    "negative power": lambda n, r: f"2^{{-{n * n * n}}}",
    "factorial": lambda n, r: f"{n * n}!",
    "factorial tower": lambda n, r: "(" * 20 + str(n % 50 + 5) + "!)" * 20,
    "binomial": lambda n, r: rf"\binom{{{n**3}}}{{{n**3 // 2}}}",
    "sum": lambda n, r: rf"\sum_{{i=1}}^{{{n**3}}} i^i",
    "product": lambda n, r: rf"\prod_{{i=1}}^{{{n * n}}} \sin(i)",
    "integral": lambda n, r: r"\int_0^1 x^{x^{x}} \sin(\frac{1}{x}) dx",
    "limit": lambda n, r: r"\lim_{x \to 0} \frac{\sin(x^{x})}{x!}",
    "polynomial": lambda n, r: f"(x+y+z+w)^{{{n}}}",
    "long sum": lambda n, r: "+".join(f"x_{{{i}}}^{{{i}}}" for i in range(n)),
    "trigonometry": lambda n, r: "".join(rf"\sin({i}x)\cos({i}y)" for i in range(n % 60)),
    "nested functions": lambda n, r: r"\sin(" * (n % 80) + "x" + ")" * (n % 80),
    "set": lambda n, r: r"\{" + ",".join(rf"\sqrt{{{i}}}" for i in range(n)) + r"\}",
    "unions": lambda n, r: r"\cup".join(f"({i},{i + 1}]" for i in range(n)),
    "matrix": lambda n, r: (
        r"\begin{pmatrix}" + r"\\".join(["&".join(["x^y"] * 30)] * (n % 30 + 1)) + r"\end{pmatrix}"
    ),
    "determinant": lambda n, r: (
        r"\det\begin{pmatrix}" + r"\\".join(["&".join("abcdefghij")] * 10) + r"\end{pmatrix}"
    ),
    "equation": lambda n, r: f"x^{{{n}}} + y^{{{n + 1}}} = z^{{{n + 2}}} + 1",
    "equations": lambda n, r: "=".join(str(i) for i in range(n)),
    "modulo": lambda n, r: rf"{n}^{{{n}^{{{n}}}}} \mod {n + 1}",
    "roots of high order": lambda n, r: rf"\sqrt[{n}]{{{n}^{{{n}}}+1}}",
    "surrogates": lambda n, r: "".join(chr(r.randrange(0xD800, 0xE000)) for _ in range(n)),
    "control characters": lambda n, r: "".join(chr(r.randrange(32)) for _ in range(n)),
    "any characters": lambda n, r: "".join(chr(r.randrange(0x110000)) for _ in range(n)),
    "commands": lambda n, r: "".join(
        r.choice((r"\frac", r"\left", r"\right", r"\text", r"\sqrt", "{", "}", "^", "_", "5", "x"))
        for _ in range(n)
    ),
    "code": lambda n, r: r.choice(
        ("__import__('os').system('kill 0')", "lambda: 0", "exec('1')", "().__class__.__bases__")
    ),
    "megabytes": lambda n, r: r.choice("9x{(\\") * (1_000_000 + n),
}
EMPTY = {
    "answers": 0,
    "by_kind": {},
    "slowest_seconds": 0.0,
    "over_the_limit_on_the_clock": 0,
    "honest_answers": 0,
    "honest_answers_graded_wrong": 0,
    "seconds": 0.0,
}
BATCH = 250
KILLING = 10.0
"""Seconds allowed to kill a process on a busy machine."""
SIZES = (1, 3, 10, 30, 100, 300, 1000, 3000)


def hostile(seed: int) -> tuple[str, str]:
    """Return (kind, answer) number `seed`."""
    r = random.Random(seed)
    kind = r.choice(sorted(BOMBS))
    answer = BOMBS[kind](r.choice(SIZES), r)
    if r.random() < 0.3:
        other = BOMBS[r.choice(sorted(BOMBS))](r.choice(SIZES[:5]), r)
        cut = r.randrange(len(answer) + 1)
        between = r.choice(("", "+", ",", "=", r.choice(HONEST)))
        answer = answer[:cut] + between + other + answer[cut:]
    if r.random() < 0.2:
        start, end = sorted(r.randrange(len(answer) + 1) for _ in range(2))
        answer = answer[start:end]
    return kind, answer


def rollout(given: str, answer: str) -> Rollout:
    """Return a completion to grade."""
    prompt = Prompt("p", "", answer, (1, 2), (0, 2))
    return Rollout(prompt, (3,), (-0.5,), f"so \\boxed{{{given}}}", True, 0)


def run_mixture(result: dict, answers: int, settings: RewardConfig, save: Callable) -> None:
    """Grade more hostile answers, in batches of hundreds that include honest ones."""
    with closing(Grader(settings, log=lambda sentence: None)) as grader:
        end = result["answers"] + answers
        while result["answers"] < end:
            first, start = result["answers"], time.monotonic()
            batch = [hostile(seed) for seed in range(first, min(first + BATCH, end))]
            r = random.Random(first)
            rollouts = [rollout(answer, r.choice(HONEST)) for _, answer in batch]
            grades = grader.grade(rollouts + [rollout(answer, answer) for answer in HONEST])
            for (kind, _), grade in zip(batch, grades[: len(batch)], strict=True):
                counts = result["by_kind"].setdefault(kind, {})
                counts[grade.outcome] = counts.get(grade.outcome, 0) + 1
                result["slowest_seconds"] = max(result["slowest_seconds"], grade.seconds)
                late = grade.seconds > settings.seconds * WALL_CLOCK_FACTOR + KILLING
                result["over_the_limit_on_the_clock"] += late
            result["answers"] += len(batch)
            result["honest_answers"] += len(HONEST)
            result["honest_answers_graded_wrong"] += sum(
                g.reward != 1.0 for g in grades[len(batch) :]
            )
            result["seconds"] += time.monotonic() - start
            save()


def run_atheris(result: dict, seconds: int, settings: RewardConfig, save: Callable) -> None:
    """Grade coverage-guided inputs for a number of seconds; exits the process."""
    import atheris

    with atheris.instrument_imports(include=["math_verify", "latex2sympy2_extended"]):
        from megatron_prepo.rewards.math import boxed_answer

    grader, start = Grader(settings, log=lambda sentence: None), time.monotonic()
    gold = r"x^2 + \frac{1}{2}"

    def one(data: bytes) -> None:
        given = rollout(data.decode("utf-8", errors="surrogateescape"), gold)
        (grade,) = grader.grade([given])
        result[grade.outcome] = result.get(grade.outcome, 0) + 1
        result["inputs"] = result.get("inputs", 0) + 1
        result["slowest_seconds"] = max(result.get("slowest_seconds", 0.0), grade.seconds)
        if grade.outcome == "ok" and grade.seconds < 0.1:
            boxed_answer(given.text, gold)
        if result["inputs"] % 500 == 0:
            result["seconds"] = time.monotonic() - start
            save()
        if time.monotonic() - start > seconds:
            save()
            grader.close()
            os._exit(0)

    atheris.Setup([sys.argv[0], "-max_len=300", "-timeout=600", f"-dict={dictionary()}"], one)
    atheris.Fuzz()


def dictionary() -> str:
    """Write a dictionary of LaTeX words for libFuzzer."""
    words = sorted({word for answer in HONEST for word in re.findall(r"\\\w+|\S", answer)})
    quoted = (word.replace("\\", r"\\").replace('"', r"\"") for word in words)
    with tempfile.NamedTemporaryFile("w", suffix=".dict", delete=False) as file:
        file.writelines(f'"{word}"\n' for word in quoted)
    return file.name


@in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Return exit code 1 if an answer exceeded its limit, or an honest one was graded wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=int, default=10_000, help="additional ones (%(default)s)")
    parser.add_argument("--atheris", type=int, metavar="SECONDS", help="use atheris instead")
    parser.add_argument("--limit", type=float, default=1.0, help="reward.seconds (%(default)s)")
    parser.add_argument("--out", required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    settings = RewardConfig(function="math", seconds=options.limit, max_failed=1.0)
    path = Path(options.out)
    result = earlier_result(path, ("machine", "mixture", "atheris", "limits")) or {
        "machine": machine.describe(),
        "mixture": copy.deepcopy(EMPTY),
        "atheris": {},
    }
    result["limits"] = {"seconds": settings.seconds, "memory_mb": settings.memory_mb}

    def save() -> None:
        write_text(path, json.dumps(result, indent=2) + "\n")

    if options.atheris:
        run_atheris(result["atheris"], options.atheris, settings, save)
    mixture = result["mixture"]
    run_mixture(mixture, options.answers, settings, save)
    print(json.dumps({key: value for key, value in mixture.items() if key != "by_kind"}, indent=2))
    return int(mixture["over_the_limit_on_the_clock"] + mixture["honest_answers_graded_wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
