"""An option that no command has: the message names the setting that it may stand for."""

import pytest

from megatron_prepo.cli import main
from tests.e2e.laptop import LAPTOP


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--overwrite"], "arguments: --overwrite (for a setting, write run.overwrite=... without"),
        (["--total-steps=3"], "(for a setting, write train.total_steps=... without dashes)"),
        (["--steps"], "(for a setting, write profile.steps=... without dashes)"),
        (["--nothing-like-it"], "arguments: --nothing-like-it\n"),
    ],
)
def test_the_setting_is_named(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(LAPTOP / "prepo.yaml"), *words])
    assert message in capsys.readouterr().err
