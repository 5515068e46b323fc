"""Skipped updates: counted in a row, also across a restart."""

import json
from types import SimpleNamespace

import pytest
import tiny_models

from megatron_prepo.trainer.guarded_update import SkipUpdates, UpdateGuard


@pytest.fixture
def run(tmp_path):
    return SimpleNamespace(
        directory=tmp_path, log=lambda sentence: None, check_directory=lambda: None
    )


@pytest.fixture
def fresh(tmp_path, run):
    """Factory of the updates of a run that has just been started."""
    config = tiny_models.actor_config(
        str(tmp_path),
        train={"total_steps": 8, "max_skipped_updates": 2},
        debug={"max_skip_dumps": 2},
    )
    return lambda: UpdateGuard(config, None, run)


def skip(updates: UpdateGuard, dumps: list) -> None:
    updates.skip(FloatingPointError("not finite"), lambda: dumps.append("dump") or "there")


def test_a_run_that_goes_on_counts_on(fresh):
    dumps, before, after = [], fresh(), fresh()
    skip(before, dumps)
    skip(before, dumps)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    with pytest.raises(FloatingPointError, match=r"3 in a row are more than .*=2; no more"):
        skip(after, dumps)
    assert len(dumps) == 2


def test_without_updates_there_is_nothing_to_count(run):
    updates = SkipUpdates(run)
    updates.load_state_dict(updates.state_dict())
    assert updates.state_dict() == {}
    assert not updates.learns_from(1.0)
