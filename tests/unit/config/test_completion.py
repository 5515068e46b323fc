"""The shell completes commands, options and settings; a command that runs does not pay for it."""

import os
import subprocess
import sys

import pytest

from megatron_prepo.cli import main
from megatron_prepo.config.completion import complete_override
from megatron_prepo.config.schema import SELECTION_METHODS
from tests.e2e.laptop import LAPTOP, REPOSITORY


def completed(module: str, line: str, tmp_path) -> list[str]:
    """Return what argcomplete answers to a TAB at the end of a command line, in examples/laptop."""
    line, out = f"program {line}", tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line}
    asked |= {"COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", module],
        cwd=LAPTOP,
        env=os.environ | asked | {"PYTHONPATH": path},
        check=True,
    )
    return out.read_text().split("\n")


@pytest.mark.parametrize(
    ("module", "line", "words"),
    [
        ("megatron_prepo", "re", ["resume", "replay", "report", "reference"]),
        ("megatron_prepo", "train prepo.yaml model.hf=ba", ["model.hf=base/"]),
        # argparse itself expects no overrides after an option
        ("megatron_prepo", "train prepo.yaml --max-restarts 1 train.tot", ["train.total_steps="]),
        ("megatron_prepo", "compare prepo.yaml --methods mopps,gr", ["mopps,greso "]),
        ("megatron_prepo", "demo --dir ba", ["base/"]),
        ("megatron_prepo", "demo --dir sel", [""]),
        ("megatron_prepo.launch", "laptop --executor sl", ["slurm "]),
        ("checkpoints_convert", "import --dt", ["--dtype "]),
    ],
)
def test_a_tab_completes_commands_options_settings_and_files(module, line, words, tmp_path):
    assert completed(module, line, tmp_path) == words


def test_choices_of_a_setting_follow_its_name():
    assert complete_override("run.tensorboard=") == [
        "run.tensorboard=true",
        "run.tensorboard=false",
    ]
    methods = [f"selection.method={name}" for name in SELECTION_METHODS]
    assert complete_override("selection.method=") == methods
    assert complete_override("train.total_steps=") == complete_override("no.such=") == []


def test_a_command_that_runs_does_not_import_it():
    code = "import sys; from megatron_prepo.cli import main; main(['reference', 'metrics'])\n"
    code += "sys.exit('argcomplete' in sys.modules or 'torch' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("command", "title", "option"),
    [
        ("compare", "with --executor slurm", "--sbatch"),
        ("plan", "machines", "--gpus-per-node"),
        ("resume", "proof that a resumed run equals an uninterrupted one", "--steps"),
    ],
)
def test_help_shows_options_by_group(command, title, option, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    group = capsys.readouterr().out.partition(f"\n{title}:\n")[2].partition("\n\n")[0]
    assert f"  {option}" in group
