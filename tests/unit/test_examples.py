"""Every example is whole: model, tokenizer, prompts and layout are there and fit together."""

import pytest

from megatron_prepo import config as configuration
from megatron_prepo import preflight
from tests.e2e.laptop import REPOSITORY

EXAMPLES = sorted(p.relative_to(REPOSITORY) for p in REPOSITORY.glob("examples/*/*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_an_example_passes_all_checks_that_come_before_a_run(path, monkeypatch):
    """From the repository's root, as its README says."""
    monkeypatch.chdir(REPOSITORY)
    config = configuration.load(path)
    inputs = preflight.check(config)
    assert len(inputs.train_prompts) == 800 and len(inputs.eval_prompts) == 400
