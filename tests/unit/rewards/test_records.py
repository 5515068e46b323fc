"""Reward functions that ask for more than the answer, and that return more than a number."""

import dataclasses
import json

import pytest

from megatron_prepo.config import RewardConfig
from megatron_prepo.errors import UserError
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards import ARGUMENTS, BY_NAME, arguments, pool
from megatron_prepo.rewards.pool import Grade, Grader
from megatron_prepo.rewards.worker import RESERVED
from megatron_prepo.run import metrics_table
from megatron_prepo.trainer.step_metrics import grading_metrics

LINE = '{"prompt": "2 + 3", "answer": 5.0, "level": [1, {"half": 0.5}], "note": "\\ud83d\\ude00"}'


def rollout(text="", record=LINE, answer="5", finished=True, num_tokens=1) -> Rollout:
    prompt = Prompt("prompt-7", "2 + 3", answer, (1, 2), (0, 2), record)
    return Rollout(prompt, (3,) * num_tokens, (-0.5,) * num_tokens, text, finished, 0)


def settings(tmp_path, source: str, **changes) -> RewardConfig:
    (tmp_path / "mine.py").write_text(source)
    values = {"processes": 1, "max_failed": 1.0, "low": -100.0, "high": 100.0}
    return RewardConfig(function=f"{tmp_path / 'mine.py'}:f", **values | changes)


def grades(tmp_path, source: str, *rollouts: Rollout) -> list[Grade]:
    grader = Grader(settings(tmp_path, source), log=lambda line: None)
    try:
        return grader.grade(rollouts)
    finally:
        grader.close()


def test_a_function_gets_what_it_asks_for_by_name_and_nothing_else():
    assert arguments(lambda completion, answer: 0) == ARGUMENTS
    assert arguments(lambda text, gold, *, record: 0) == (*ARGUMENTS, "record")
    assert arguments(lambda text, *, finished, record: 0) == ("completion", "record", "finished")
    assert arguments(lambda text, *, num_tokens=0, x=1: 0) == ("completion", "num_tokens")
    assert arguments(lambda *all_of_it: 0) == ARGUMENTS
    assert arguments(lambda *all_of_it, record: 0) == (*ARGUMENTS, "record")


def test_the_record_is_the_whole_line(tmp_path):
    source = f"""
expected = {json.loads(LINE)!r}
def f(completion, *, record, num_tokens, finished):
    assert record == expected and type(record["answer"]) is float, record
    record.clear()  # is no other answer's record
    return num_tokens + finished / 2
"""
    given = [rollout("a"), rollout("b", finished=False, num_tokens=7)]
    assert [(g.reward, g.reason) for g in grades(tmp_path, source, *given)] == [(1.5, ""), (7, "")]


def test_a_function_may_take_the_answer_too(tmp_path):
    source = "def f(completion, answer, *, finished):\n    return (answer == '5') + 2 * finished\n"
    assert grades(tmp_path, source, rollout(finished=False))[0].reward == 1.0


def test_further_numbers_of_a_dict_are_metrics(tmp_path):
    source = """
def f(completion, answer):
    return {"reward": 1, "format": True, "steps": len(completion)} if completion else {"reward": 0}
"""
    found = grades(tmp_path, source, rollout("ab"), rollout(), rollout("abcd"))
    assert [grade.reward for grade in found] == [1.0, 0.0, 1.0]
    assert [grade.metrics for grade in found] == [
        {"format": 1.0, "steps": 2.0},
        {},
        {"format": 1.0, "steps": 4.0},
    ]
    metrics = grading_metrics(found)
    assert metrics["reward/steps"] == 3.0 and metrics["reward/format"] == 1.0
    metrics_table.check_step(metrics, custom_selector=False)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("{}", "a dict needs the key `reward`"),
        ("{'reward': 'high'}", "a reward must be a number, not the text 'high'"),
        ("{'reward': None}", "TypeError"),
        ("{'reward': 1, 'steps': float('nan')}", "the metric steps is nan, not a finite number"),
        ("{'reward': 1, 'steps': float('inf')}", "the metric steps is inf"),
        ("{'reward': 1, 'steps': 10**400}", "OverflowError"),
        ("{'reward': 1, 'steps': None}", "TypeError"),
        ("{'reward': 1, 'steps': '3'}", "the metric steps must be a number, not the text '3'"),
        ("{'reward': 1, 'mean': 3}", "'mean' cannot name a metric"),
        ("{'reward': 1, completion: 3}", "'two words' cannot name a metric"),
        ("{'reward': 1, 3: 3}", "3 cannot name a metric"),
    ],
)
def test_anything_else_in_a_dict_is_an_error_of_its_answer(tmp_path, returned, reason):
    (grade,) = grades(
        tmp_path, f"def f(completion, answer):\n    return {returned}\n", rollout("two words")
    )
    assert (grade.outcome, grade.reward, grade.metrics) == ("error", -100.0, {})
    assert reason in grade.reason


def test_a_reward_out_of_bounds_in_a_dict_ends_the_run(tmp_path):
    with pytest.raises(UserError, match=r"prompt-7.*reward nan"):
        grades(tmp_path, "def f(c, a):\n    return {'reward': float('nan')}\n", rollout())


def test_names_that_every_run_has_are_reserved():
    of_reward = {key for key in metrics_table.KEYS if key.startswith(metrics_table.OF_REWARD)}
    assert {metrics_table.OF_REWARD + name for name in RESERVED} == of_reward


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(completion, *, records): ...\n", r"\(completion, \*, records\) does not fit"),
        ("def f(completion, *, record, tokens): ...\n", "missing a required.* 'tokens'"),
        ("def f(*, record): ...\n", "does not fit"),
        ("def f(a, b, c, *, record): ...\n", "does not fit"),
        ("def f(completion, record): ...\n", r"takes record by position: put a \* before it"),
        ("def f(answer, *, record): ...\n", "in the opposite order"),
    ],
)
def test_another_form_is_refused_when_it_is_loaded(tmp_path, source, message):
    with pytest.raises(UserError, match=message) as error:
        pool.check(settings(tmp_path, source))
    assert all(name in str(error.value) for name in (*ARGUMENTS, *BY_NAME))


def test_the_check_returns_what_is_taken(tmp_path):
    source = "def f(completion, *, num_tokens, record): return 0\n"
    assert pool.check(settings(tmp_path, source)) == ("completion", "record", "num_tokens")


def test_a_prompt_without_an_answer_is_refused_if_the_function_takes_it(tmp_path):
    prompts = [rollout().prompt, dataclasses.replace(rollout().prompt, id="odd", answer="")]
    for source in ("def f(c, a): return 0\n", "def f(c, *, record): return 0\n"):
        grader = Grader(settings(tmp_path, source))
        if "answer" in grader.takes:
            with pytest.raises(UserError, match="1 of 2 prompts have none, such as 'odd'; add"):
                grader.check_answers(prompts)
        else:
            grader.check_answers(prompts)
        grader.close()


def test_an_answer_that_fails_may_have_a_record_of_any_size(tmp_path):
    record = json.dumps({"prompt": "p", "grid": [[0] * 1000] * 1000})
    source = "def f(completion, *, record):\n    return len(record['grid'])\n"
    (grade,) = grades(tmp_path, source.replace("return", "return 0.01 *"), rollout(record=record))
    assert (grade.outcome, grade.reward) == ("ok", 10.0)
