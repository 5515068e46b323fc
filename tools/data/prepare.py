"""Convert mathematics data sets to prompts: read, deduplicate, decontaminate, count.

    python tools/data/prepare.py --out data \
        --train dapo-math-17k=hub --suite aime24=hub --suite math500=math500.jsonl --together paper

writes `data/dapo-math-17k/train.jsonl`, `data/suites/aime24.jsonl`, ..., all suites together as
`data/paper.jsonl`, and `data/statistics.json`.  After the = comes a local `.jsonl` or `.parquet`
file, a folder of them, or `hub`, which reads the data set below through the `datasets` package.
Parquet needs `pyarrow`; `pip install -e ".[data]"` brings both.

Two problems are equal if their texts are, ignoring case and spaces.  Of equal problems the first
one is kept; if their answers differ, none is.  A training problem is removed if it shares a
sequence of `--ngram` words (13, as in GPT-3, arXiv 2005.14165, appendix C; signs are not words)
with a problem of any suite; a problem with fewer words is removed if it is equal.  The suites are
not modified.

`prepare.py reasoning-gym` generates tasks instead (`reasoning_gym_tasks.py`).
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.errors import NoSuchPath, UserError, one_line
from megatron_prepo.files import json_lines
from megatron_prepo.files.atomic import write_text
from megatron_prepo.files.existing import existing
from megatron_prepo.files.json_lines import answer_field, text_field
from megatron_prepo.process.command import in_one_line
from megatron_prepo.rewards.boxed import last_boxed
from megatron_prepo.rewards.number import number
from tools.data.own_files import refuse_other_files, written_before

DAPO_BEFORE = re.compile(r"^Solve the following math problem step by step\..*?\n\n", re.DOTALL)
DAPO_AFTER = re.compile(r'\n\nRemember to put your answer on its own line after "Answer:"\.?\s*$')
WORD = re.compile(r"\w+")
DOLLAR = re.compile(r"(?<!\\)\$")
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""Instruction of Qwen2.5-Math's model card, for the format that `reward.function=math` expects."""


@dataclass(frozen=True)
class Problem:
    """A problem and its answer; `id` is unique in its data set."""

    id: str
    text: str
    answer: str

    @property
    def key(self) -> str:
        """Text by which problems are compared; signs are significant, 3 + 4 is not 3 - 4."""
        return " ".join(self.text.lower().split())

    @property
    def words(self) -> list[str]:
        """Words and numbers in lower case, without signs."""
        return WORD.findall(self.text.lower())

    def runs(self, length: int) -> set[tuple[str, ...]]:
        """Return all sequences of `length` words; for a shorter problem, its complete text."""
        words = self.words
        if len(words) < length:
            return {(self.key,)}
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@dataclass(frozen=True)
class Source:
    """A data set on the hub, and the format of its rows."""

    hub: tuple[str, str | None, str]
    """Repository, configuration and split."""
    read: Callable[[dict], tuple[object, object]]
    """Function from a row to problem and answer; KeyError names a missing column."""
    id_column: str | None = None


def dapo(row: dict) -> tuple[str, object]:
    """Read a chat with a single turn that wraps the problem in instructions, which are removed."""
    (turn,) = row["prompt"]
    text = DAPO_AFTER.sub("", DAPO_BEFORE.sub("", turn["content"]))
    return text, row["reward_model"]["ground_truth"]


def gsm8k(row: dict) -> tuple[str, str]:
    """Read an answer that ends with `####` and the number."""
    _, result = row["answer"].split("####")
    return row["question"], result.replace(",", "")


def boxed_solution(row: dict) -> tuple[str, str]:
    """Read MATH: the answer is in the last \\boxed{...} of the solution."""
    return row["problem"], last_boxed(row["solution"])


def problem_and_answer(row: dict) -> tuple[object, object]:
    """Read MATH-500 and AIME."""
    return row["problem"], row["answer"]


def olympiad(row: dict) -> tuple[str, str]:
    """Read a list of one or several answers in dollar signs; or a single answer."""
    answers = row["final_answer"]
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"`final_answer` must be a list of texts, but is {one_line(answers)}")
    return row["question"], ", ".join(DOLLAR.sub("", answer).strip() for answer in answers)


SOURCES = {
    "dapo-math-17k": Source(("BytedTsinghua-SIA/DAPO-Math-17k", None, "train"), dapo),
    "gsm8k-train": Source(("openai/gsm8k", "main", "train"), gsm8k),
    "math": Source(("EleutherAI/hendrycks_math", "all", "train"), boxed_solution),
    "gsm8k": Source(("openai/gsm8k", "main", "test"), gsm8k),
    "math500": Source(("HuggingFaceH4/MATH-500", None, "test"), problem_and_answer, "unique_id"),
    "aime24": Source(("HuggingFaceH4/aime_2024", None, "train"), problem_and_answer, "id"),
    "aime25": Source(("math-ai/aime25", None, "test"), problem_and_answer, "id"),
    "olympiadbench": Source(
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"), olympiad, "id"
    ),
}
HENDRYCKS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
"""Configurations of MATH on the hub."""


def read_problems(name: str, place: str) -> list[Problem]:
    """Return all problems of a data set; raises UserError naming a row that cannot be read."""
    if name not in SOURCES:
        raise UserError(f"unknown data set {name!r}; known are {', '.join(SOURCES)}")
    source, problems, seen = SOURCES[name], [], {}
    rows = _hub_rows(source.hub) if place == "hub" else _local_rows(Path(place))
    for index, (where, row) in enumerate(rows, 1):
        try:
            problem, answer = source.read(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where}: {type(error).__name__} {one_line(error)}; its columns are "
                f"{one_line(sorted(map(str, row)))}, but should be those of {source.hub[0]}"
            ) from error
        read = {"problem": problem, "answer": answer, "id": row.get(source.id_column)}
        own = str(index) if read["id"] is None else answer_field(read, "id", where)
        if own in seen:
            raise UserError(f"{where}: id {own!r} is also that of {seen[own]}")
        seen[own] = where
        text = text_field(read, "problem", where).strip()
        answer = answer_field(read, "answer", where).strip()
        problems.append(Problem(f"{name}/{own}", text, answer))
    if not problems:
        raise UserError(f"{name}: {place} contains no rows")
    return problems


def absent(path: str | Path) -> str:
    """Return the message for a source that does not exist."""
    return f"no such file or folder: {path}; use `hub` to read it with `datasets`"


def _local_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (`FILE, line N` or `FILE, row N`, row) of a file, or of the files of a folder."""
    if path.is_dir():
        files = sorted([*path.glob("*.jsonl"), *path.glob("*.parquet")])
        for file in files:
            yield from _local_rows(file)
    elif not path.is_file():
        raise UserError(absent(path))
    elif path.suffix == ".jsonl":
        for line, row in json_lines.read(path):
            yield f"{path}, line {line}", row
    elif path.suffix == ".parquet":
        for index, row in enumerate(_parquet_rows(path), 1):
            yield f"{path}, row {index}", row
    else:
        raise UserError(f"{path}: only .jsonl and .parquet files are read")


def _parquet_rows(path: Path) -> list[dict]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f'{path}: parquet needs pyarrow: pip install -e ".[data]"') from error
    try:
        return parquet.read_table(path).to_pylist()
    # raised by pyarrow for damaged files, and for values that Python cannot represent
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} cannot be read as Parquet: {one_line(error)}; copy it again"
        ) from error


def _hub_rows(hub: tuple[str, str | None, str]) -> Iterator[tuple[str, dict]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError('`hub` needs the package datasets: pip install -e ".[data]"') from error
    repository, configuration, split = hub
    for part in HENDRYCKS if configuration == "all" else (configuration,):
        where = ", ".join(filter(None, (part, split)))
        try:
            rows = load_dataset(repository, part, split=split)
        except (OSError, ValueError) as error:  # no network or data set; no such part or split
            raise UserError(
                f"{repository} ({where}) cannot be read from the hub: {error}; use a local copy, "
                "NAME=FILE instead of NAME=hub"
            ) from error
        for index, row in enumerate(rows, 1):
            yield f"{repository} ({where}), row {index}", row


def unique(problems: Sequence[Problem]) -> tuple[list[Problem], int, int]:
    """Return unique problems, and the numbers of removed repeats and contradicting answers."""
    answers: dict[str, set[Fraction | str]] = {}
    for problem in problems:
        value = number(problem.answer)
        answers.setdefault(problem.key, set()).add(problem.answer if value is None else value)
    first = {problem.key: problem for problem in reversed(problems)}
    kept = [
        problem
        for problem in problems
        if first[problem.key] is problem and len(answers[problem.key]) == 1
    ]
    contradicting = sum(len(answers[problem.key]) > 1 for problem in problems)
    return kept, len(problems) - len(kept) - contradicting, contradicting


def decontaminate(
    problems: Sequence[Problem], suites: dict[str, Sequence[Problem]], length: int
) -> tuple[list[Problem], dict[str, int]]:
    """Return problems that share no word sequence with a suite, and the number removed per suite.

    A problem that matches several suites is counted for the first.
    """
    of_suite = {
        name: set().union(*(problem.runs(length) for problem in suite))
        for name, suite in suites.items()
    }
    kept, lost = [], dict.fromkeys(suites, 0)
    for problem in problems:
        mine = problem.runs(length)
        known = next((name for name, theirs in of_suite.items() if mine & theirs), None)
        if known is None:
            kept.append(problem)
        else:
            lost[known] += 1
    return kept, lost


def split(problems: Sequence[Problem], held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Return (training, held out): problems whose texts have the smallest hashes are held out.

    So a problem stays in its split when other problems are added or removed.
    """
    if held_out >= len(problems):
        raise UserError(f"--held-out {held_out} leaves none of the {len(problems)} problems")
    by_hash = sorted(problems, key=lambda problem: hashlib.sha256(problem.key.encode()).digest())
    chosen = {problem.id for problem in by_hash[:held_out]}
    return (
        [problem for problem in problems if problem.id not in chosen],
        [problem for problem in problems if problem.id in chosen],
    )


def describe(problems: Sequence[Problem]) -> dict:
    """Return statistics of a written file; lengths are in words."""
    lengths = sorted(len(problem.words) for problem in problems)
    whole = sum(re.fullmatch(r"-?\d+", problem.answer) is not None for problem in problems)
    return {
        "problems": len(problems),
        "words": {
            name: lengths[round(share * (len(lengths) - 1))]
            for name, share in (("least", 0), ("median", 0.5), ("p90", 0.9), ("most", 1))
        },
        "whole_number_answers": whole,
        "not_ascii": sum(not problem.text.isascii() for problem in problems),
    }


def write(path: Path, problems: Sequence[Problem], instruction: str) -> dict:
    """Write prompts as `data.read_prompts` reads them; returns their description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {"id": p.id, "prompt": p.text + instruction, "answer": p.answer}, ensure_ascii=False
        )
        for p in problems
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"file": str(path)} | describe(problems)


def to_write(options: argparse.Namespace) -> set[str]:
    """Return the files of this call, relative to `--out`."""
    names = {f"suites/{name}.jsonl" for name, _ in options.suite} | {"statistics.json"}
    kinds = ("train", "held_out") if options.held_out else ("train",)
    names |= {f"{name}/{kind}.jsonl" for name, _ in options.train for kind in kinds}
    names |= {f"{options.together}.jsonl"} if options.together else set()
    return names | ({"perplexity.png", "perplexity.json"} if options.perplexity else set())


def prepare(options: argparse.Namespace) -> dict:
    """Write all files; returns the statistics, which are also written."""
    for kind in ("train", "suite"):
        names = [name for name, _ in getattr(options, kind)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(
                f"--{kind} {twice[0]} is given twice; put its files into one folder and use that"
            )
    if options.held_out < 0 or options.ngram < 1:
        raise UserError(
            f"--held-out {options.held_out} must be at least 0, and --ngram {options.ngram} at "
            "least 1"
        )
    out, statistics = Path(options.out), {"train": {}, "suites": {}}
    refuse_other_files(out, to_write(options))
    suites = {name: read_problems(name, place) for name, place in options.suite}
    out.mkdir(parents=True, exist_ok=True)
    # before the files: should this call fail, the next one knows them
    statistics["files"] = sorted(to_write(options) | written_before(out))
    write_text(out / "statistics.json", json.dumps(statistics, indent=2) + "\n")
    for name, problems in suites.items():
        path = out / "suites" / f"{name}.jsonl"
        statistics["suites"][name] = write(path, problems, options.instruction)
    if options.together:
        everything = [problem for suite in suites.values() for problem in suite]
        path = out / f"{options.together}.jsonl"
        statistics["together"] = write(path, everything, options.instruction)
    for name, place in options.train:
        read = read_problems(name, place)
        kept, repeated, contradicting = unique(read)
        kept, contaminated = decontaminate(kept, suites, options.ngram)
        if not kept:
            raise UserError(
                f"--train {name}: none of its {len(read)} problems remains: {repeated} are "
                f"repeated, {contradicting} contradict each other, {contaminated} are in a suite"
            )
        training, held_out = split(kept, options.held_out)
        entry = {
            "read": len(read),
            "repeated": repeated,
            "contradicting": contradicting,
            "contaminated": contaminated,
            "train": write(out / name / "train.jsonl", training, options.instruction),
        }
        if held_out:
            path = out / name / "held_out.jsonl"
            entry["held_out"] = write(path, held_out, options.instruction)
        statistics["train"][name] = entry
    if options.perplexity:
        from tools.data.prompt_perplexity import describe as describe_perplexities

        files = {name: entry["file"] for name, entry in statistics["suites"].items()}
        files |= {name: entry["train"]["file"] for name, entry in statistics["train"].items()}
        statistics["perplexity"] = describe_perplexities(
            str(options.perplexity), files, out / "perplexity.png"
        )
    write_text(out / "statistics.json", json.dumps(statistics, indent=2) + "\n")
    return statistics


@in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns exit code 0, or 2 for an error that the user can fix."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["reasoning-gym"]:
        from tools.data import reasoning_gym_tasks

        return reasoning_gym_tasks.main(words[1:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for kind in ("train", "suite"):
        parser.add_argument(
            f"--{kind}",
            action="append",
            default=[],
            type=_named_place,
            metavar="NAME=FILE",
            help=f"one of {', '.join(SOURCES)}; FILE may be `hub`; may come several times",
        )
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--together", metavar="NAME", help="also write all suites to one file")
    parser.add_argument("--held-out", type=int, default=0, metavar="N", help="number per --train")
    parser.add_argument("--ngram", type=int, default=13, metavar="N", help="in words (%(default)s)")
    instruction = parser.add_mutually_exclusive_group()
    instruction.add_argument("--instruction", default="", help="text after every problem")
    instruction.add_argument(
        "--boxed",
        action="store_const",
        dest="instruction",
        const=BOXED,
        help="add the text that asks for a boxed answer, as reward.function=math needs",
    )
    parser.add_argument(
        "--perplexity",
        type=existing(),
        metavar="HF",
        help="draw the prompts' perplexities under this model",
    )
    print(json.dumps(prepare(parser.parse_args(words)), indent=2))
    return 0


def _named_place(word: str) -> tuple[str, str]:
    name, equals, place = word.partition("=")
    if not (name and equals and place):
        raise argparse.ArgumentTypeError(f"{word!r} must have the form NAME=FILE")
    if place != "hub" and not Path(place).exists():
        raise NoSuchPath(absent(place))
    return name, place


if __name__ == "__main__":
    sys.exit(main())
