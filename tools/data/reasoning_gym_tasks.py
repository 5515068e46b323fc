r"""Generate prompts from tasks of reasoning-gym, for `reward.function=reasoning_gym`.

    pip install -e ".[tasks]"
    python tools/data/prepare.py reasoning-gym --out data/sums --train 1000 --held-out 100 \
        --dataset chain_sum@2:min_terms=2,max_terms=3 --dataset gcd \
        --instruction "Answer with the number only."

writes `data/sums/train.jsonl`, `held_out.jsonl` and `statistics.json`.  A dataset is
`NAME[@WEIGHT][:PARAMETER=VALUE,...]`, values in JSON or plain words; `--curriculum LEVEL` takes the
parameters of all datasets from the library's curricula, except those that are given.

No question is written twice, and none is in both files.  The two files are generated from different
random numbers, so that held-out tasks stay the same when more are trained on; an id is made of
the question, and the lines are sorted by it, so that the first N are a mixture.  Every entry
is scored once as the reward will score it, with its own answer, and must get the library's score.
"""

import argparse
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prepo.config.loading import nearest
from megatron_prepo.errors import UserError, one_line
from megatron_prepo.files.atomic import write_text
from megatron_prepo.process.command import in_one_line
from megatron_prepo.rewards import load
from tools.data.own_files import refuse_other_files, written_before

FORM = re.compile(r"(?P<name>[^@:]+)(?:@(?P<weight>[^:]*))?(?::(?P<parameters>.*))?", re.DOTALL)
SET_HERE = ("seed", "size")
"""Parameters of every dataset that `--seed`, `--train` and `--held-out` determine."""
REFUSED = (AssertionError, ValueError, TypeError, AttributeError, KeyError, IndexError)
"""What the library raises for parameters that do not fit."""


@dataclass(frozen=True)
class Part:
    """A dataset of the mixture."""

    name: str
    weight: float
    parameters: dict[str, Any]
    """Parameters that differ from the library's defaults."""


def read_part(word: str, level: int | None) -> Part:
    """Return the dataset that `NAME[@WEIGHT][:PARAMETER=VALUE,...]` describes.

    Raises UserError for an unknown dataset or parameter, or values that the library refuses.
    """
    from megatron_prepo.rewards.reasoning_gym import DATASETS, task_dataset

    form = FORM.fullmatch(word)
    if not form or form["name"] not in DATASETS or form["name"] == "composite":
        name, known = form["name"] if form else word, sorted(set(DATASETS) - {"composite"})
        raise UserError(
            f"--dataset {word}: reasoning-gym has no dataset {name!r}{nearest(name, known)}; it "
            f"has {', '.join(known)}"
        )
    name, parameters = form["name"], read_parameters(word, form["parameters"] or "")
    known = [field.name for field in dataclasses.fields(DATASETS[name][1])]
    if odd := [key for key in parameters if key not in known or key in SET_HERE]:
        free = [key for key in known if key not in SET_HERE]
        raise UserError(
            f"--dataset {word}: {name} has no parameter {odd[0]!r}{nearest(odd[0], free)} to set; "
            f"it has {', '.join(free)}"
        )
    if level is not None:
        parameters = at_level(name, level) | parameters
    try:
        task_dataset(name, json.dumps(parameters, sort_keys=True))
    except REFUSED as error:
        raise UserError(
            f"--dataset {word}: {name} refuses {parameters}: {one_line(error)}"
        ) from error
    return Part(name, read_weight(word, form["weight"]), parameters)


def read_parameters(word: str, text: str) -> dict[str, Any]:
    """Return parameters from `PARAMETER=VALUE,...`; a value may be JSON with commas.

    >>> read_parameters("", 'a=2,b=["+","-"],c=up,d=true')
    {'a': 2, 'b': ['+', '-'], 'c': 'up', 'd': True}
    """
    parameters = {}
    for part in re.split(r",(?=\w+=)", text) if text else ():
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--dataset {word}: {part!r} must have the form PARAMETER=VALUE")
        try:
            parameters[key] = json.loads(value)
        except ValueError:
            parameters[key] = value
    return parameters


def read_weight(word: str, text: str | None) -> float:
    """Return a dataset's weight, 1 without one."""
    try:
        weight = float(1 if text is None else text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"--dataset {word}: the weight {text!r} must be a positive number")
    return weight


def at_level(name: str, level: int) -> dict[str, Any]:
    """Return the parameters of a level of the dataset's curriculum, without defaults.

    A parameter with fewer levels has its highest.
    """
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if not has_curriculum(name):
        raise UserError(
            f"--curriculum {level}: reasoning-gym has no curriculum of {name}; give its parameters "
            "by --dataset, in a call without --curriculum"
        )
    curriculum = create_curriculum(name)
    highest = max(len(one.levels) for one in curriculum.attributes.values()) - 1
    if not 0 <= level <= highest:
        raise UserError(f"--curriculum {level}: the levels of {name} are 0 to {highest}")
    curriculum.set_global_level(level)
    config = curriculum.generate_configuration()
    default = type(config)()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        key: value
        for key, value in values.items()
        if key not in SET_HERE and value != getattr(default, key)
    }


def shares(parts: Sequence[Part], number: int) -> list[int]:
    """Return how many of `number` tasks each part has: in proportion, by largest remainder.

    >>> shares([Part("a", 2.0, {}), Part("b", 1.0, {})], 10)
    [7, 3]
    """
    total = sum(part.weight for part in parts)
    exact = [number * part.weight / total for part in parts]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: number - sum(counts)]:
        counts[i] += 1
    return counts


def generate(part: Part, seed: str, number: int, taken: set[str]) -> list[dict[str, Any]]:
    """Return lines with `number` new questions of a dataset, which are added to `taken`.

    `seed` names the random numbers.
    """
    lines: list[dict[str, Any]] = []
    limit = 10 * number + 100
    entries = entries_of(part, seed, limit) if number else ()
    for dataset, entry in entries:
        key = " ".join(entry["question"].split())
        if key not in taken:
            taken.add(key)
            lines.append(line_of(part, dataset, entry))
        if len(lines) == number:
            return lines
    if number:
        raise UserError(
            f"{part.name} with {part.parameters or 'its defaults'} has too few different "
            f"questions: {limit} tries gave {len(lines)} new ones of {number}; ask for fewer, or "
            "widen its parameters"
        )
    return lines


def entries_of(part: Part, seed: str, number: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield (dataset, entry) of the library."""
    from megatron_prepo.rewards.reasoning_gym import task_dataset

    known = task_dataset(part.name, json.dumps(part.parameters, sort_keys=True))
    digest = hashlib.sha256(f"{seed}/{part.name}".encode()).digest()
    number_seed = int.from_bytes(digest[:4], "big") // 2  # some add the index to it
    try:
        config = dataclasses.replace(known.config, seed=number_seed, size=number)
        dataset = type(known)(config)
        for index in range(number):
            yield dataset, dataset[index]
    except REFUSED as error:
        raise UserError(
            f"{part.name} with {part.parameters or 'its defaults'} fails at {number} tasks: "
            f"{type(error).__name__} {one_line(error)}; ask for fewer, or change its parameters"
        ) from error


def line_of(part: Part, dataset: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the line of an entry without its instruction; UserError if it would be misgraded."""
    from megatron_prepo.rewards.reasoning_gym import INSTALLED, task_score

    digest = hashlib.sha256(" ".join(entry["question"].split()).encode()).hexdigest()
    line = {"id": f"{part.name}/{digest[:12]}", "prompt": entry["question"]}
    answer = entry["answer"]
    if isinstance(answer, str) and answer.strip():
        line["answer"] = answer
    line["reasoning_gym"] = {
        "version": INSTALLED,
        "dataset": part.name,
        "parameters": part.parameters,
        "entry": entry,
    }
    try:
        line = json.loads(json.dumps(line, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"{part.name}: its entries are no JSON: {one_line(error)}") from error
    if "answer" in line:
        given = task_score(answer, record=json.loads(json.dumps(line)))["reward"]
        theirs = float(dataset.score_answer(answer, entry))
        if given != theirs:
            raise UserError(
                f"{part.name}: the reward would give its own answer {given} where the library "
                f"gives {theirs} ({one_line(answer)[:80]}); use another dataset"
            )
    return line


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write all files; returns the statistics, which are also written."""
    if options.train < 1 or options.held_out < 0:
        raise UserError(
            f"--train {options.train} must be at least 1, and --held-out {options.held_out} at "
            "least 0"
        )
    load("reasoning_gym")  # UserError without the library
    from megatron_prepo.rewards.reasoning_gym import INSTALLED, LIBRARY

    parts = [read_part(word, options.curriculum) for word in options.dataset]
    out, sizes = Path(options.out), {"held_out": options.held_out, "train": options.train}
    names = {f"{split}.jsonl" for split, size in sizes.items() if size} | {"statistics.json"}
    refuse_other_files(out, names)
    taken: set[str] = set()
    splits = {
        split: [
            generate(part, f"{options.seed}/{split}", number, taken)
            for part, number in zip(parts, shares(parts, size))
        ]
        for split, size in sizes.items()
    }
    statistics = {
        "library": f"{LIBRARY} {INSTALLED}",
        "seed": options.seed,
        "curriculum": options.curriculum,
        "instruction": options.instruction,
        "datasets": [
            dataclasses.asdict(part) | {split: len(splits[split][i]) for split in sizes}
            for i, part in enumerate(parts)
        ],
        "files": sorted(names | written_before(out)),
    }
    out.mkdir(parents=True, exist_ok=True)
    # before the others: should this call fail, the next one knows them
    write_text(out / "statistics.json", json.dumps(statistics, indent=2) + "\n")
    for split, size in sizes.items():
        if size:
            lines = [line for of_part in splits[split] for line in of_part]
            write_text(out / f"{split}.jsonl", text_of(lines, options.instruction))
    return statistics


def text_of(lines: Sequence[dict[str, Any]], instruction: str) -> str:
    """Return a prompt file: each question with the instruction on a line of its own."""
    suffix = f"\n{instruction}" if instruction else ""
    ordered = sorted(lines, key=lambda line: line["id"].rpartition("/")[2])
    return "".join(
        json.dumps(line | {"prompt": line["prompt"] + suffix}, ensure_ascii=False) + "\n"
        for line in ordered
    )


@in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns exit code 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="prepare.py reasoning-gym", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--dataset",
        action="append",
        required=True,
        metavar="NAME[@WEIGHT][:PARAMETER=VALUE,...]",
        help="may come several times, for a mixture",
    )
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--train", type=int, required=True, metavar="N", help="tasks to train on")
    parser.add_argument("--held-out", type=int, default=0, metavar="N", help="tasks held out")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--curriculum", type=int, metavar="LEVEL", help="level, from 0")
    parser.add_argument("--instruction", default="", help="text on a line after every question")
    print(json.dumps(prepare(parser.parse_args(arguments)), indent=2))
    return 0
