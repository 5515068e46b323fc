"""Whose directory it is: a new run's, one's that goes on, or one's that is left alone."""

import pytest
import yaml

from megatron_prepo import config as configuration
from megatron_prepo import run_directory
from megatron_prepo.errors import UserError

MINIMAL = {
    "model": {"hf": "hf"},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
    "selection": {"num_candidates": 8, "num_selected": 4},
    "rollout": {"max_new_tokens": 8},
    "train": {"total_steps": 4},
}


def config(tmp_path, **sections):
    tree = {name: dict(section) for name, section in MINIMAL.items()}
    tree["run"] = {"dir": str(tmp_path / "run")}
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return configuration.from_tree(tree)


@pytest.fixture
def begun(tmp_path):
    """An unfinished run's directory."""
    said = []
    directory = run_directory.prepare(config(tmp_path), said.append)
    (directory / "ledger.jsonl").write_text("{}\n")
    (directory / "notes.txt").write_text("the user's")
    assert not said
    return directory


def test_the_same_settings_go_on(tmp_path, begun):
    assert run_directory.check(config(tmp_path)) == "unfinished"
    run_directory.prepare(config(tmp_path), pytest.fail)
    assert (begun / "ledger.jsonl").read_text() == "{}\n"
    run_directory.check_unfinished(begun)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "total_steps", 5),
        ("train", "seed", 2),
        ("optimizer", "lr", 1e-3),
        ("selection", "method", "random"),
        ("rollout", "engine", "sglang"),
        ("megatron", "hidden_dropout", 0.1),
        ("model", "dtype", "float32"),
    ],
)
def test_other_settings_are_named(tmp_path, begun, section, key, value):
    with pytest.raises(UserError, match=f"{section}.{key}=.*, now {value}") as error:
        run_directory.check(config(tmp_path, **{section: {key: value}}))
    assert "run.overwrite=true" in str(error.value)
    assert (begun / "ledger.jsonl").exists()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("run", "wandb_project", "there"),
        ("servers", "count", 3),
        ("reward", "processes", 3),
        ("weight_sync", "verify", "never"),
        ("checkpoint", "every", 7),
        ("sglang", "mem_fraction_static", 0.5),
    ],
)
def test_what_moves_no_number_may_change_silently(tmp_path, begun, section, key, value):
    run_directory.prepare(config(tmp_path, **{section: {key: value}}), pytest.fail)
    assert yaml.safe_load((begun / "config.yaml").read_text())[section][key] == value


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("parallel", "tensor", 2),
        ("train", "micro_batch_tokens", 4096),
        ("loss", "head", "recompute"),
    ],
)
def test_what_rounds_differently_is_said(tmp_path, begun, section, key, value):
    said = []
    run_directory.prepare(config(tmp_path, **{section: {key: value}}), said.append)
    assert len(said) == 1 and f"{section}.{key}=" in said[0] and "not to the bit" in said[0]
    assert (begun / "ledger.jsonl").exists()


def test_a_finished_run_is_left_alone(tmp_path, begun):
    (begun / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"finished.*run.overwrite=true"):
        run_directory.check(config(tmp_path))
    with pytest.raises(UserError, match="is finished"):
        run_directory.check_unfinished(begun)


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path, begun):
    for name in ("journal", "checkpoints"):
        (begun / name).mkdir()
        (begun / name / "file").touch()
    other = config(tmp_path, run={"overwrite": True}, train={"seed": 2})
    assert run_directory.check(other) == "new"
    run_directory.prepare(other, pytest.fail)
    assert sorted(path.name for path in begun.iterdir()) == ["config.yaml", "notes.txt"]


def test_a_config_that_cannot_be_read_is_precious(tmp_path, begun):
    (begun / "config.yaml").write_text("precious")
    with pytest.raises(UserError, match=r"config.yaml cannot be read.*run.overwrite=true"):
        run_directory.check(config(tmp_path))
    assert (begun / "config.yaml").read_text() == "precious"


def test_an_empty_directory_holds_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        run_directory.check_unfinished(tmp_path)


def test_the_names_of_what_may_change_are_settings(tmp_path):
    tree = configuration.to_tree(config(tmp_path))
    for name in (*run_directory.FREE, *run_directory.ROUNDING):
        section, _, key = name.partition(".")
        assert section in tree and (not key or key in tree[section]), name
