"""How often a run saves while `checkpoint.every` is empty."""

import pytest

from megatron_prepo.config import CheckpointConfig
from megatron_prepo.trainer.resume import MAX_SHARE, is_affordable


@pytest.mark.parametrize(
    ("step", "save", "num_steps"),
    [(2.0, 0.1, 1000), (2.0, 30.0, 1000), (600.0, 100.0, 100), (5000.0, 60.0, 20)],
    ids=["a laptop", "a slow disk", "7B", "long answers"],
)
def test_saving_takes_a_bounded_share_of_the_time_and_a_bounded_part_is_lost(step, save, num_steps):
    seconds, since, lost = {"rollouts": 0.0, "checkpoint": 0.0}, 0.0, []
    for number in range(1, num_steps + 1):
        seconds["rollouts"] += step
        since += step
        if is_affordable(seconds):
            seconds["checkpoint"] += save
            lost.append(since)
            since = 0.0
        assert number > 1 or lost == [step], "the first step is saved"
    share = seconds["checkpoint"] / sum(seconds.values())
    assert share <= MAX_SHARE + save / sum(seconds.values())
    assert max(lost) <= step + save / MAX_SHARE


@pytest.mark.parametrize(
    ("settings", "num_kept"),
    [({}, 2), ({"keep_last": 5}, 5), ({"every": 4}, None), ({"every": 4, "keep_last": 3}, 3)],
)
def test_checkpoints_of_a_chosen_interval_are_kept_as_before(settings, num_kept):
    assert CheckpointConfig(**settings).num_kept == num_kept
