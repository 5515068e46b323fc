"""The goal of the benchmark of utilisation: judged by the best arm, which it names."""

import pytest

from tools.bench import utilisation


def case(model, **mfu):
    arms = {name: {"update": {"mfu": value}} for name, value in mfu.items()}
    return {"model": model, "arms": arms | {"too large": {"failed": "out of memory"}}}


@pytest.mark.parametrize(
    ("mfu", "goal", "measured", "verdict"),
    [
        ({"packed": 0.40, "fused": 0.47, "padded": 0.1}, ", fused", 0.47, "met"),
        ({"packed": 0.40, "fused": None}, ", packed", 0.40, "missed"),
        ({"packed": None}, "", None, "not measured"),
        ({}, "", None, "not measured"),
    ],
)
def test_the_goal_names_the_arm_that_it_is_judged_by(mfu, goal, measured, verdict):
    cases = [case("another", packed=0.9), case(utilisation.GOAL_MODEL, **mfu)]
    (row,) = utilisation.goals(cases)
    assert row["goal"] == f"{utilisation.GOAL_MODEL}, update, model FLOPs utilisation{goal}"
    assert (row["measured"], row["verdict"]) == (measured, verdict)
