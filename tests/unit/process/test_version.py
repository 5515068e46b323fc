"""`--version` of the commands."""

import pytest

import megatron_prepo
from checkpoints_convert import __main__ as convert
from megatron_prepo import cli
from megatron_prepo.launch import rank


@pytest.mark.parametrize("parser", [cli._parser, convert._parser, rank.parser])
def test_a_command_prints_its_version_and_those_of_its_libraries(parser, capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["--version"])
    words = capsys.readouterr().out
    assert end.value.code == 0 and words.startswith(f"megatron-prepo {megatron_prepo.__version__} ")
    assert "torch " in words and "megatron-core " in words
