"""Selectors of the user's own: `selection.method=FILE.py:CLASS`, loaded and tried before a run."""

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_prepo.config import SelectionConfig
from megatron_prepo.config.schema import SELECTION_METHODS
from megatron_prepo.errors import UserError
from megatron_prepo.selection import METHODS, load
from megatron_prepo.selection.base import Candidates
from megatron_prepo.selection.rounds import rounds
from megatron_prepo.selection.user_class import TrialRun, check, made_up_candidates, try_out
from tests.unit.selection.selectors import passes, prompts

HEAD = """
import itertools, random, torch
from megatron_prepo.selection import Selector

class Mine(Selector):
    def __init__(self, config, *, total_steps, seed, pass_reward):
        self.k, self.seed, self.seen = config.num_selected, seed, 0
"""
CHOOSE = """
    def choose(self, candidates, step):
        draw = random.Random(f"{self.seed}/{self.seen}/{step}")
        return draw.sample(range(len(candidates.prompts)), self.k)
"""
MEMORY = """
    def observe(self, prompts, rewards_KG):
        self.seen += int(rewards_KG.sum())

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
"""
SIZES = """
    shares_budget = True

    def group_sizes(self, prompts, group_size):
        return [1, group_size, 2 * group_size - 1]
"""


def trial(method: str, *, candidates=8, selected=3, total_steps=20, **settings) -> TrialRun:
    config = SelectionConfig(
        method=method, num_candidates=candidates, num_selected=selected, **settings
    )
    return TrialRun(config, total_steps=total_steps, seed=1, group_size=4)


def own(directory: Path, text: str) -> str:
    (directory / "mine.py").write_text(text)
    return f"{directory}/mine.py:Mine"


def returns(expression: str) -> str:
    return f"{HEAD}\n    def choose(self, candidates, step):\n        return {expression}\n"


def test_configuration_and_package_know_the_same_methods():
    assert tuple(METHODS) == SELECTION_METHODS


@pytest.mark.parametrize("total_steps", [1, 2, 20])
@pytest.mark.parametrize(("candidates", "selected"), [(8, 3), (1, 1), (5, 5)])
@pytest.mark.parametrize("method", METHODS)
def test_our_methods_pass_the_trial(method, candidates, selected, total_steps):
    sizes = {"candidates": candidates, "selected": selected, "total_steps": total_steps}
    try_out(METHODS[method], trial(method, **sizes))


@pytest.mark.parametrize("text", [HEAD + CHOOSE, HEAD + CHOOSE + MEMORY, HEAD + CHOOSE + SIZES])
def test_a_class_that_keeps_the_interface_passes(tmp_path, text):
    check(trial(own(tmp_path, text)), overlap=True)


def test_a_class_may_import_modules_of_its_directory_and_inherit_through_them(tmp_path):
    (tmp_path / "basis_of_mine.py").write_text(HEAD.replace("class Mine", "class Basis"))
    text = f"from basis_of_mine import Basis, random\nclass Mine(Basis):{CHOOSE}"
    check(trial(own(tmp_path, text)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Mine\n", r"does not load: \S+mine\.py, line 1: SyntaxError: expected ':'"),
        ("x = 1\nx / 0\n", r"does not load: \S+mine\.py, line 2: ZeroDivisionError"),
        ("import sys\nsys.exit(0)\n", r"mine\.py, line 2: SystemExit: 0"),
        ("import absent_helper\n", r"line 1: ModuleNotFoundError: .*absent_helper"),
        (
            HEAD.replace("Mine", "Other") + CHOOSE,
            r"does not load: \S+mine\.py has no class 'Mine'; its classes: Other$",
        ),
        ("def Mine(): ...\n", r"is a function, not a class"),
        ("class Mine: ...\n", r"is not a selector; derive it from megatron_prepo\.selection\.Se"),
        (HEAD, r"has no method choose; define choose\(self, candidates, step\)$"),
        (
            "from megatron_prepo.selection import Selector\nclass Mine(Selector):" + CHOOSE,
            r"has no method __init__; define __init__\(self, config, \*, total_steps, seed, pass_r",
        ),
        (
            HEAD.replace(", pass_reward", "") + CHOOSE,
            r"__init__ cannot be called as a selector's \(.*'pass_reward'\); define __init__\(",
        ),
        (
            HEAD + CHOOSE.replace(", step)", ")", 1),
            r"choose cannot be called .*; define choose\(self, candidates, step\)$",
        ),
        (
            HEAD + CHOOSE + MEMORY.replace("prompts, rewards_KG", "rewards_KG"),
            r"observe cannot be called .*; define observe\(self, prompts, rewards_KG\)$",
        ),
        (
            HEAD + CHOOSE + SIZES.replace("[1,", "[0,"),
            r"group_sizes, in step 0, returned \[0, 4, 7\] for 3 prompts; return a list with an",
        ),
        (
            HEAD + CHOOSE + SIZES.replace("[1,", "[2,"),
            r"group_sizes, in step 0, returned 13 rollouts in all; share .* = 12 among the prompts",
        ),
        (HEAD + "    refills = 1\n" + CHOOSE, r"refills is 1; set it to True or False"),
        (returns("1 / 0"), r"fails on made-up cand.*mine\.py, line 10: ZeroDivisionError"),
        (returns("candidates.ppl_P[0]"), r"mine\.py, line 10: TypeError"),
        (returns("torch.arange(self.k)"), r"returned a Tensor; return a list of positions, such"),
        (returns("list(torch.arange(self.k))"), r"position tensor\(0\) of type Tensor"),
        (returns("[True, 1, 2]"), r"position True of type bool; return positions of type int"),
        (returns("[5, 6, 8]"), r"step 0, returned the position 8; return positions from 0 to 7"),
        (returns("[0, 1, -1]"), r"the position -1; return positions from 0 to 7"),
        (returns("[0, 1, 0]"), r"the position 0 twice; return each candidate at most once per"),
        (returns("[0, 1]"), r"returned 2 positions; return selection\.num_selected=3, or set ref"),
        (returns("[]"), r"returned 0 positions"),
        (
            returns("[step]").replace("    def", "    refills = True\n    def", 1),
            r"returned the position 0 twice",
        ),
        (
            returns("[]").replace("    def", "    refills = True\n    def", 1),
            r"returned 0 positions in all rounds; return at least selection\.num_selected=3",
        ),
        (
            returns("random.sample(range(8), self.k)"),
            r"a second selector with the same seed chose other prompts; derive random numbers",
        ),
        (
            HEAD.replace(
                "self.seen = config.num_selected, seed, 0", "_ = config.num_selected, seed, 0"
            )
            + "    seen = []\n"
            + CHOOSE.replace("self.seen}", "len(self.seen)}")
            + "\n    def observe(self, prompts, rewards_KG):\n        self.seen.append(1)\n",
            r"a second selector with the same seed chose other prompts; .*keep data in the in",
        ),
        (
            HEAD + CHOOSE + MEMORY.replace('"seen": self.seen', ""),
            r"fails on made-up candidates: \S+mine\.py, line 20: KeyError: 'seen'",
        ),
        (
            HEAD + CHOOSE + MEMORY.replace('self.seen = state["seen"]', "pass"),
            r"restored by load_state_dict chose other prompts than the one that was saved",
        ),
        (
            HEAD + CHOOSE + MEMORY.replace('"seen": self.seen', '"seen": {1, 2}'),
            r"state_dict returned what is not JSON \(Object of type set is not JSON serializable\)",
        ),
        (
            HEAD + CHOOSE + "    def state_dict(self):\n        return [1]\n",
            r"state_dict returned a list; return a dict",
        ),
        (
            HEAD.replace("self.seen = config", "self.all = config").replace("seed, 0", "seed, {}")
            + returns("list(range(self.k))").replace(HEAD, "")
            + "    def observe(self, prompts, rewards_KG):\n"
            "        self.all |= {p.id: 1 for p in prompts}\n"
            "    def state_dict(self):\n        return self.all\n",
            r"the result of state_dict changes when the selector observes more; return a copy",
        ),
        (
            HEAD + CHOOSE + "    def metrics(self):\n        return {'mine': 1}\n",
            r"metrics returned the name 'mine'; names begin with selection/",
        ),
        (
            HEAD
            + CHOOSE
            + "    def metrics(self):\n        return {'selection/a': float('nan')}\n",
            r"metrics returned selection/a=nan; return finite numbers",
        ),
        (
            HEAD
            + CHOOSE
            + "    def metrics(self):\n        return {'selection/a': torch.ones(())}\n",
            r"metrics returned selection/a=tensor\(1\.\); return finite numbers",
        ),
    ],
)
def test_a_class_that_cannot_select_is_refused_with_setting_file_and_remedy(
    tmp_path, text, message
):
    method = own(tmp_path, text)
    with pytest.raises(UserError) as raised:
        check(trial(method))
    line = str(raised.value)
    assert line.startswith(f"selection.method={method}") and "\n" not in line
    assert re.search(message, line), line


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"=absent\.py:Mine does not load: no such file: absent"):
        load("absent.py:Mine")


def test_overlap_needs_a_class_that_selects_once_before_the_step(tmp_path):
    for name in ("refills", "needs_pass_rates"):
        text = f"{HEAD}{CHOOSE}    {name} = True\n"
        with pytest.raises(UserError, match=rf"mine\.py:Mine has {name} = True; set train\.overl"):
            check(trial(own(tmp_path, text)), overlap=True)


def test_candidates_of_the_trial_have_the_scores_of_the_run(tmp_path):
    def scored(attributes: str, **settings) -> Candidates:
        run = trial(own(tmp_path, f"{HEAD}{CHOOSE}{attributes}"), **settings)
        cls = load(run.config.method)
        selector = cls(run.config, total_steps=9, seed=1, pass_reward=1.0)
        return made_up_candidates(selector, run, 0)

    def given(candidates: Candidates) -> list[str]:
        scores = dataclasses.asdict(candidates) | {"prompts": None}
        return [name for name, value in scores.items() if value is not None]

    assert given(scored("")) == []
    assert given(scored("    needs_scores = True\n")) == ["ppl_P", "entropy_P"]
    assert given(scored("    needs_scores = True\n", ppl_from="engine")) == ["ppl_P"]
    assert given(scored("    needs_pass_rates = True\n")) == ["pass_rate_P"]
    hidden = scored("    needs_scores = True\n    hidden_features = 5\n")
    assert given(hidden) == ["ppl_P", "entropy_P", "hidden_PD"]
    assert hidden.hidden_PD.shape == (len(hidden.prompts), 5)


@pytest.mark.parametrize("value", ["-1", "True", "2.0", "None"])
def test_a_number_of_features_that_is_none_is_refused(tmp_path, value):
    method = own(tmp_path, f"{HEAD}{CHOOSE}    hidden_features = {value}\n")
    with pytest.raises(UserError, match=r"mine\.py:Mine: hidden_features is .*; set it to 0 or mo"):
        load(method)


def test_a_choice_during_the_run_is_checked_too(tmp_path):
    """A mistake of step 9, which the trial does not reach."""
    method = own(tmp_path, returns("[0, 1, 2 if step < 9 else 99]"))
    check(trial(method))
    selector = load(method)(trial(method).config, total_steps=20, seed=1, pass_reward=1.0)
    candidates = Candidates(prompts(8))
    sizes = {"num_selected": 3, "group_size": 4, "method": method}
    assert [c.positions for c in rounds(selector, candidates, 8, **sizes)] == [[0, 1, 2]]
    with pytest.raises(UserError, match=r"mine\.py:Mine: choose, in step 9, returned the pos.* 99"):
        list(rounds(selector, candidates, 9, **sizes))


def test_rounds_of_a_method_that_refills_may_not_repeat_a_candidate(tmp_path):
    text = returns("[0, 1] if not self.seen else [2, 1]").replace(
        "    def ch", "    refills = True\n    def ch"
    )
    method = own(tmp_path, text + MEMORY)
    selector = load(method)(trial(method).config, total_steps=20, seed=1, pass_reward=1.0)
    sizes = {"num_selected": 3, "group_size": 4, "method": method}
    asked = rounds(selector, Candidates(prompts(8)), 0, **sizes)
    assert next(asked).positions == [0, 1]
    selector.observe(prompts(2), passes(1, 1))
    with pytest.raises(UserError, match="the position 1 twice"):
        next(asked)
