"""`loss.preset`: the settings that it stands for, given or not."""

import pytest
import yaml

from megatron_prepo.config import from_tree, load, to_yaml
from megatron_prepo.config.schema import PRESETS
from megatron_prepo.errors import UserError
from tests.unit.config.test_config import tree


def written(tmp_path, **changes):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree(**changes)))
    return path


def values(config, preset):
    names = [name.split(".") for name in PRESETS[preset]]
    return [getattr(getattr(config, section), key) for section, key in names]


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_that_are_not_given_get_its_values(tmp_path, preset):
    """From a file or the command line; the saved configuration has them all, and reads the same."""
    by_file = load(written(tmp_path, loss__preset=preset))
    assert by_file == load(written(tmp_path), [f"loss.preset={preset}"])
    assert values(by_file, preset) == list(PRESETS[preset].values())
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(by_file))
    assert load(saved) == by_file


def test_dr_grpo_by_hand(tmp_path):
    config = load(written(tmp_path, loss__preset="dr-grpo"))
    assert config.advantage.std == "none"
    assert config.loss.aggregation == "seq-mean-token-sum-norm"
    assert config.loss.policy == "clipped"


def test_none_changes_nothing(tmp_path):
    assert load(written(tmp_path), ["loss.preset=none"]) == load(written(tmp_path))


def test_another_value_is_refused_with_both_settings(tmp_path):
    given = written(tmp_path, loss__preset="dr-grpo")
    with pytest.raises(
        UserError, match=r"stands for advantage\.std=none, but .*=population is giv"
    ):
        load(given, ["advantage.std=population"])
    assert load(given, ["advantage.std=none"]).advantage.std == "none"


def test_a_tree_without_them_is_refused(tmp_path):
    """No configuration has a preset and other values."""
    with pytest.raises(UserError, match=r"loss\.preset=gspo stands for loss\.policy=gspo"):
        from_tree(tree(loss__preset="gspo"))


@pytest.mark.parametrize("wrong", ["drgrpo", "[dr-grpo]", "1", ""])
def test_an_unknown_preset_is_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=r"loss\.preset"):
        load(written(tmp_path), [f"loss.preset={wrong}"])


def test_a_section_that_is_no_section_is_refused_as_ever(tmp_path):
    with pytest.raises(UserError, match="advantage"):
        load(written(tmp_path, loss__preset="dr-grpo", advantage=3))
