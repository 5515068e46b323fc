"""Laptop-size examples pass all checks, and cluster-size examples can be planned."""

import functools
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_prepo import config as configuration
from megatron_prepo.inputs import preflight
from megatron_prepo.plan import planner as plan
from tests.e2e.laptop import REPOSITORY


def examples(*patterns: str) -> list:
    return sorted(
        p.relative_to(REPOSITORY) for pattern in patterns for p in REPOSITORY.glob(pattern)
    )


MADE = {Path("examples/real/prepo.yaml")}
"""Their model and prompts are made by `make real`; tests/e2e/test_real_model.py runs them."""
LAPTOP = [path for path in examples("examples/*/*.yaml") if path not in MADE]
PAPER = examples("examples/paper/*/*.yaml")
CLUSTER = examples("examples/cluster/*/*.yaml")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Run in the directory in which the READMEs run commands."""
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("path", LAPTOP, ids=str)
def test_a_laptops_example_passes_all_checks_that_come_before_a_run(path):
    config = configuration.load(path)
    inputs = preflight.check(config)
    assert len(inputs.train_prompts) == 800 and len(inputs.eval_sets[""]) == 400


@functools.cache
def parameters_in_transformers(hf: str) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("path", PAPER + CLUSTER, ids=str)
def test_a_cluster_sized_example_fits_and_counts_parameters_as_transformers_does(path):
    """As it is: its layout, its servers and their memory, on H100s."""
    config = configuration.load(path)
    answer = plan.make_plan(config, plan.PlanRequest())
    assert answer.fits and not answer.cautions, answer
    assert answer.engine.name == "sglang" and answer.where.started_by in ("run", "job")
    assert answer.parameters == parameters_in_transformers(config.model.hf)


def test_the_papers_table_has_five_models_by_three_methods():
    assert len(PAPER) == 15
    assert {path.stem for path in PAPER} == {"prepo", "random", "greso"}


@pytest.mark.parametrize("folder", sorted({path.parent for path in PAPER}), ids=str)
def test_methods_of_the_paper_differ_in_selection_and_weighting_only(folder):
    trees = {
        name: configuration.to_tree(configuration.load(folder / f"{name}.yaml"))
        for name in ("prepo", "random", "greso")
    }
    for name, tree in trees.items():
        assert tree.pop("run")["dir"] == f"runs/{folder.relative_to('examples')}/{name}"
        assert tree["selection"].pop("method") == name
        weighting = tree.pop("weighting")
        assert weighting["method"] == ("relative_entropy" if name == "prepo" else "none")
    assert trees["prepo"] == trees["random"] == trees["greso"]
    known = trees["prepo"]
    assert known["selection"]["num_selected"] / known["selection"]["num_candidates"] == 0.2
    assert known["rollout"]["samples_per_prompt"] == 8
    assert (known["loss"]["clip_low"], known["loss"]["clip_high"]) == (0.2, 0.28)
    assert known["reward"]["function"] == "math"
    assert known["loss"]["kl_coef"] == known["loss"]["entropy_coef"] == 0
