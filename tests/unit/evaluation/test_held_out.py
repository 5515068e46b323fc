"""Evaluations during training: pass@k, and how they are sampled."""

import pytest
import torch
from rounding import approx

from megatron_prepo.config import EvalConfig
from megatron_prepo.evaluation.held_out import Evaluation


def test_pass_at_k_is_the_unbiased_estimate_of_the_samples():
    """0, 1 and 3 of 4 samples pass: two of four include one that passed with 0, 1/2 and 1."""
    found = Evaluation(torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64), 4)
    means = [found.pass_at(k)["mean"] for k in (1, 2, 4)]
    assert means == approx([1 / 3, (0 + 1 / 2 + 1) / 3, 2 / 3])
    assert means[0] == approx(found.pass_rate)
    low, high = found.pass_at(2)["ci95"]
    assert 0 <= low < 0.5 < high <= 1


def test_thirds_are_counts():
    """A share of 1/3 is one sample of three, whatever its rounding."""
    found = Evaluation((torch.tensor([1.0, 2.0]) / 3).double(), 3)
    assert found.pass_at(3)["mean"] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pass_at": (8,)}, r"pass@8 needs k from 1 to eval\.samples_per_prompt=4"),
        ({"pass_at": (0,)}, r"pass@0 needs k from 1"),
        ({"temperature": 0}, r"decodes greedily.*set eval\.samples_per_prompt=1"),
        (
            {"temperature": 0, "samples_per_prompt": 1, "samples_during": 2},
            r"set eval\.samples_during=1",
        ),
        ({"temperature": 0, "samples_per_prompt": 1, "top_p": 0.9}, "would change nothing"),
        ({"temperature": 0, "samples_per_prompt": 1, "top_k": 5}, "would change nothing"),
        ({"temperature": -1}, r"eval\.temperature=-1.* must be at least 0"),
        ({"top_p": 0}, r"eval\.top_p=0.* must be above 0"),
        ({"top_p": 1.1}, r"eval\.top_p=1.1 must be above 0 and at most 1"),
        ({"top_k": 0}, r"eval\.top_k=0 must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**settings)


def test_greedy_evaluation_is_allowed_with_one_sample():
    assert EvalConfig(temperature=0, samples_per_prompt=1).sampling["temperature"] == 0
