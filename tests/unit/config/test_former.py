"""Settings of earlier versions are read as the settings that replaced them, or refused."""

from pathlib import Path

import pytest
import yaml

from megatron_prepo.config import former, load
from megatron_prepo.config.loading import _known_keys
from megatron_prepo.errors import UserError
from megatron_prepo.run import changes

REPOSITORY = Path(__file__).resolve().parents[3]
SAVED = REPOSITORY / "tests" / "data" / "config_of_9cda445.yaml"
"""What commit 9cda445, of the time of the comparison's first runs, saved for the run random/1."""


def saved(tmp_path, *overrides, **changes):
    """Return the old run's configuration with changes as `section__key=value`."""
    tree = yaml.safe_load(SAVED.read_text())
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree[section][key] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load(path, overrides)


def test_a_former_setting_is_none_of_today():
    assert not former.FORMER.keys() & set(_known_keys())
    assert {now for old in former.FORMER.values() for now in old.now} <= set(_known_keys())
    assert set(former.MEMORY) <= set(_known_keys())


def test_a_saved_configuration_of_an_earlier_version(tmp_path):
    """32 sequences have at most 32 * (96 + 52) tokens."""
    config = saved(tmp_path)
    assert config.train.micro_batch_tokens == 4736
    assert config.loss.importance == "off" and config.loss.head_memory_mib == 900
    assert config.optimizer.lr == 2e-4 and config.eval.every == 10


def test_a_cap_on_the_importance(tmp_path):
    loss = saved(tmp_path, loss__importance_cap=3).loss
    assert (loss.importance, loss.importance_level) == ("truncated", "token")
    assert loss.importance_high == 3.0


def test_a_run_of_an_earlier_version_is_resumed(tmp_path):
    """Its own settings are no change; today's way to set the same is one only of rounding."""
    before = saved(tmp_path)
    read = {"read_before": None, "initial_weights": False}
    assert changes.compare(before, saved(tmp_path), **read).forbidden == []
    smaller = saved(tmp_path, "train.micro_batch_tokens=4096")
    found = changes.compare(before, smaller, **read)
    assert found.forbidden == []
    assert found.rounding == ["train.micro_batch_tokens=4736, now 4096"]


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        (["train.micro_batch_tokens=500"], 500),
        (["train.micro_batch_size=2"], 2 * 148),
        (["train.micro_batch_size=2", "rollout.max_new_tokens=4"], 2 * 100),
        (["train.micro_batch_size=2", "train.micro_batch_tokens=500"], 500),
        (["train.micro_batch_tokens=500", "train.micro_batch_size=2"], 2 * 148),
    ],
)
def test_overrides_take_precedence(tmp_path, overrides, tokens):
    assert saved(tmp_path, *overrides).train.micro_batch_tokens == tokens


def test_an_override_of_an_earlier_version_changes_a_file_of_today(tmp_path):
    config = load(REPOSITORY / "examples/laptop/compare.yaml", ["loss.importance_cap=1.5"])
    assert config.loss.importance_high == 1.5
    tokens = ["train.micro_batch_size=3"]
    config = load(REPOSITORY / "examples/laptop/compare.yaml", tokens)
    assert config.train.micro_batch_tokens == 3 * 148


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss__importance_cap": 0.5},
            r"loss\.importance_cap=0\.5 of an earlier version has no equivalent: .*must now be 1 or"
            r" more.*set loss\.importance and loss\.importance_high instead",
        ),
        ({"loss__importance_cap": "high"}, r"loss\.importance_cap='high' .*no equivalent"),
        ({"train__micro_batch_size": 0}, r"train\.micro_batch_size=0 .*set train\.micro_batch_tok"),
        ({"train__micro_batch_size": True}, r"train\.micro_batch_size=True .*no equivalent"),
        ({"loss__chunk_tokens": 0.5}, r"loss\.chunk_tokens=0\.5 .*set loss\.head_memory_mib"),
        (
            {"train__micro_batch_tokens": 4096},
            r"micro_batch_size is now train\.micro_batch_tokens, which is given too; remove",
        ),
        ({"rollout__max_new_tokens": "many"}, r"rollout\.max_new_tokens='many'"),
    ],
)
def test_what_has_no_equivalent_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as refused:
        saved(tmp_path, **changes)
    assert len(str(refused.value).splitlines()) == 1
