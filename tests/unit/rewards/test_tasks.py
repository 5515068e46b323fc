"""The generators of `examples/`: correct answers, of the promised lengths, in disjoint files."""

import json
import random
import re

import pytest

import tiny_base
import tiny_task
from megatron_prepo.rewards.final_number import final_number
from tests.tiny_tasks import TASKS, load

NUM_DRAWN = 300
WORKED_TOKENS = {"laptop": (19, 40), "traces": (65.0, 92), "lists": (24.0, 60)}
"""Approximate mean and upper limit of the lengths of the pool's worked answers."""


@pytest.fixture(params=TASKS)
def name(request) -> str:
    return request.param


def draw(task: tiny_base.Task) -> list[tiny_task.Problem]:
    rng = random.Random(1)
    kinds = (task.draw_for_corpus, task.draw_for_pool, task.draw_beyond)
    return [kind(rng) for kind in kinds for _ in range(NUM_DRAWN)]


def test_worked_answers_are_correct_and_corrupted_ones_are_not(name):
    for problem in draw(load(name)):
        answer = str(problem.answer)
        assert problem.answer >= 0
        assert final_number(problem.worked_answer, answer) == 1
        assert final_number(problem.direct_answer, answer) == 1
        assert final_number(f"{problem.working} #### {problem.answer + 1}", answer) == 0
        assert final_number(f"{problem.worked_answer} {problem.direct_answer}", answer) == 0
        assert final_number(problem.working, answer) == 0


def test_an_independent_reading_of_the_prompt_gives_the_answer(name):
    for problem in draw(load(name)):
        assert READERS[name](problem) == problem.answer, problem


def read_story(story) -> int:
    """Compute a story's answer, sentence by sentence, from lists of words that add or subtract."""
    opening, *sentences, _, _ = re.split(r"(?<=[.?]) ", story.prompt)
    (total,) = map(int, re.findall(r"\d+", opening))
    for sentence in sentences:
        numbers = [int(number) for number in re.findall(r"\d+", sentence)]
        said = set(sentence.split())
        if said & {"years", "minutes", "friends"}:
            continue
        if said & {"doubles", "repeats", "twice", "equal", "identical"}:
            assert not numbers
            total *= 2
        elif said & {"half", "halves"}:
            assert not numbers
            total //= 2
        else:
            (number,) = numbers
            total += -number if said & DOWN else number
    return total


# fmt: off
DOWN = {
    "gives", "loses", "off", "spends", "costs", "run", "sells", "borrow", "damaged", "takes",
    "removes", "bought", "burned", "drops", "cools", "descends", "down", "wastes", "needs",
    "deserted", "swept", "discards", "consumes",
}
# fmt: on


def read_program(program) -> int:
    """Run a register program as Python statements."""
    statements = {
        "add": "a += b",
        "swap": "a, b = b, a",
        "inc": "a += 1",
        "double": "a *= 2",
        "push": "b += a",
        "dec": "a -= 1",
        "sub": "a -= b",
        "copy": "b = a",
        "cross": "a, b = b, a + b",
        "triple": "a *= 3",
        "turn": "a, b = -b, a",
        "gap": "a = a - b if a > b else b - a",
    }
    _, modulus, _, a, _, b, _, rounds, *body, _ = program.prompt.split()
    scope = {"a": int(a), "b": int(b)}
    for instruction in body * int(rounds):
        exec(f"{statements[instruction]}; a %= {modulus}; b %= {modulus}", {}, scope)
    return int(f"{scope['a']}{scope['b']}")


def read_pipeline(pipeline) -> int:
    """Run a pipeline in Python's terms, with the operations written another way."""
    opening, text = pipeline.prompt.removesuffix(" =").split(" : ")
    items = [int(digit) for digit in opening.split()[1:]]
    *operations, question = text.split()
    for name in operations:
        match name:
            case "reverse" | "flip":
                items = list(reversed(items))
            case "sort" | "order":
                items.sort()
            case "descending":
                items.sort(key=lambda x: -x)
            case "raise" | "add":
                items = [int(str(x + 1)[-1]) for x in items]
            case "lower":
                items = ["1234567890".index(str(x)) for x in items]
            case "drop" | "skip":
                items = items[1:]
            case "pop" | "cut":
                items = items[:-1]
            case "rotate" | "turn":
                items.append(items.pop(0))
            case "shift":
                items.insert(0, items.pop())
            case "complement" | "mirror":
                items = ["9876543210".index(str(x)) for x in items]
            case _:
                raise AssertionError(name)
    match question:
        case "ends" | "edges":
            return int(f"{items[0]}{items[-1]}")
        case "front" | "start":
            return int("".join(map(str, items[:2])))
        case "back" | "tail":
            return int("".join(map(str, items[-2:])))
    raise AssertionError(question)


READERS = {"laptop": read_story, "traces": read_program, "lists": read_pipeline}


def test_worked_answers_have_the_promised_lengths(name):
    task = load(name)
    tokenizer = tiny_task.build_tokenizer(task.words)
    problems = tiny_task.draw_unique(task.draw_for_pool, random.Random(1), 2000)
    lengths = [len(tokenizer(problem.worked_answer).input_ids) for problem in problems]  # <eos> too
    mean, largest = WORKED_TOKENS[name]
    assert sum(lengths) / len(lengths) == pytest.approx(mean, abs=1)
    assert max(lengths) <= min(largest, task.max_new_tokens)


def test_prompt_files_are_repeatable_and_disjoint(name, tmp_path):
    task = load(name)
    tiny_base.write_fresh_prompts(task, tmp_path / "a", task.seed, 2000)
    tiny_base.write_fresh_prompts(task, tmp_path / "b", task.seed, 2000)
    fresh = tmp_path / "a" / "train.jsonl"
    assert fresh.read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()
    files = [prompts(fresh), prompts(task.folder / "train.jsonl")]
    files.append(prompts(task.folder / "eval.jsonl"))
    assert [len(file) for file in files] == [2000, 800, 400]
    assert len(set().union(*files)) == 3200


def test_one_scarce_prompt_in_five_is_of_the_pool(name, tmp_path):
    """The pool's own limits tell them apart: a problem beyond the model is outside of them."""
    task = load(name)
    for folder in ("a", "b"):
        tiny_base.write_scarce_prompts(task, tmp_path / folder, task.seed, 500)
    scarce = tmp_path / "a" / "train.jsonl"
    assert scarce.read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()
    shipped = {*prompts(task.folder / "train.jsonl"), *prompts(task.folder / "eval.jsonl")}
    assert len(shipped.union(prompts(scarce))) == 1200 + 500
    kinds = [BEYOND[name](json.loads(line)) for line in scarce.read_text().splitlines()]
    assert kinds.count(True) == 400
    assert 60 <= kinds[:100].count(True) < 100, "in random order: 80 are expected"
    pool = [json.loads(line) for line in (task.folder / "train.jsonl").read_text().splitlines()]
    assert not any(map(BEYOND[name], pool))


@pytest.mark.parametrize("option", ["--fresh", "--scarce"])
@pytest.mark.parametrize("number", ["0", "-3", "1.5"])
def test_a_number_of_prompts_that_is_none_writes_nothing(
    name, option, number, tmp_path, monkeypatch, capsys
):
    words = ["build.py", option, number, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        tiny_base.main(load(name), "")
    assert ended.value.code == 2 and f"argument {option}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


BEYOND = {
    "laptop": lambda story: story["magnitude"] == 4,
    "traces": lambda program: program["executed"] > 14,
    "lists": lambda pipeline: pipeline["length"] > 7 and pipeline["steps"] > 4,
}


def prompts(path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
