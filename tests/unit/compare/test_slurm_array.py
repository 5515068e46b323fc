"""Jobs of `compare --executor slurm`: what is submitted, waited for and collected, by commands that
simulate Slurm (tests/real_slurm/test_compare.py has the real one)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_prepo.compare import runner as comparing
from megatron_prepo.compare import slurm_array as array
from megatron_prepo.compare.runner import RunsFailed
from megatron_prepo.errors import UserError
from tests.e2e.laptop import REPOSITORY

COMMANDS = {
    # runs the tasks of the array in sequence, those that are to end
    "sbatch": """#!/bin/bash
[ -z "$REFUSES" ] || { echo "sbatch: error: Invalid account" >&2; exit 1; }
cat > "$SLURM/script"
number=$((41 + $(ls "$SLURM" | grep -c submitted)))
touch "$SLURM/submitted.$number"
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$SLURM/script")
for task in $(seq 0 "$tasks"); do
    if [ "$task" = "$STAYS" ]; then echo "${number}_$task" > "$SLURM/queue"; continue; fi
    SLURM_ARRAY_JOB_ID=$number SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=9$task \\
        bash "$SLURM/script" > /dev/null 2>&1
done
echo "$number;cluster"
""",
    "squeue": """#!/bin/bash
echo "$*" >> "$SLURM/asked"
if [ -f "$SLURM/down" ]; then echo "Unable to contact slurm controller" >&2; exit 1; fi
[ ! -f "$SLURM/queue" ] || cat "$SLURM/queue"
""",
    "scontrol": '#!/bin/bash\necho "$*" >> "$SLURM/scontrol"\n',
    "srun": """#!/bin/bash
while [ "$1" != megatron_prepo.launch.rank ]; do
    case $1 in --output=*) log=${1#--output=};; esac
    shift
done
shift
exec "$PYTHON" "$FAKE_TRAIN" "$@" >> "$log" 2>&1
""",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Directory in which the commands keep their state."""
    state, binaries = tmp_path / "slurm", tmp_path / "bin"
    state.mkdir()
    binaries.mkdir()
    for name, text in COMMANDS.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM", str(state))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("FAKE_TRAIN", str(REPOSITORY / "tests" / "fake_train.py"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("FAKE_STARTED", str(tmp_path / "started"))
    monkeypatch.setattr(array, "POLL_SECONDS", 0.05)
    return state


@pytest.fixture
def compare(tmp_path):
    """Run a comparison of two methods at one seed in a directory with odd characters."""
    for name in ("train.jsonl", "eval.jsonl", "model"):
        (tmp_path / name).write_text(name)
    tree = {
        "run": {"dir": "runs/none"},
        "model": {"hf": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "selection": {"num_candidates": 20, "num_selected": 4},
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 8},
        "train": {"total_steps": 3},
        "eval": {"every": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))

    def run(*overrides, methods="random,prepo", **slurm):
        return comparing.compare(
            path,
            methods,
            "1",
            tmp_path / "odd $name",
            overrides=overrides,
            check=lambda config: None,
            slurm=array.Slurm(**slurm),
        )

    return run


def flags(state) -> set[str]:
    lines = (state / "script").read_text().splitlines()
    return {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}


def started(tmp_path) -> list[str]:
    return (tmp_path / "started").read_text().split()


def test_each_run_is_a_task_and_leaves_its_record(slurm, compare, tmp_path):
    records = compare(account="lab", partition="gpu", options=("--mem=64G",))
    assert [record["arm"] for record in records] == ["random", "prepo"]
    assert started(tmp_path) == ["random/1", "prepo/1"]
    asked = flags(slurm)
    assert {"--array=0-1", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"} <= asked
    assert {"--account=lab", "--partition=gpu", "--mem=64G", "--signal=USR1@360"} <= asked
    place = tmp_path / "odd $name" / "array"
    assert {"--requeue", "--time=04:00:00", f"--output='{place}/%A_%a.out'"} <= asked
    assert "--exclusive" not in asked
    assert (place / "41.sbatch").is_file()
    compare()
    assert len(started(tmp_path)) == 2, "what is finished is not run again"


def test_runs_that_fill_nodes_have_them_alone(slurm, compare):
    wide = ["parallel.tensor=4", "parallel.data=2", "checkpoint.grace_seconds=60"]
    compare(*wide, gpus_per_node=4)
    assert {"--nodes=2", "--ntasks-per-node=4", "--exclusive", "--mem=0"} <= flags(slurm)
    assert "--signal=USR1@120" in flags(slurm)


def test_a_run_that_fails_is_named_with_its_log(slurm, compare, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "prepo/1")
    with pytest.raises(RunsFailed, match=r"1 of 2 runs failed(.|\n)*exit code 3(.|\n)*gives up"):
        compare()
    monkeypatch.delenv("FAKE_FAILS")


def test_what_is_queued_is_not_submitted_again(slurm, compare, tmp_path, monkeypatch, capsys):
    """The command is interrupted while a job waits; that job runs, and the command is repeated."""
    monkeypatch.setenv("STAYS", "1")

    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(array, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare()
    assert "scancel 41 cancels them" in capsys.readouterr().err
    assert started(tmp_path) == ["random/1"]

    def run_it(seconds):
        (slurm / "queue").unlink()
        task = {"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "91"}
        subprocess.run(["bash", slurm / "script"], env=os.environ | task, check=True)

    monkeypatch.setattr(array, "sleep", run_it)
    records = compare()
    assert [record["arm"] for record in records] == ["random", "prepo"]
    assert started(tmp_path) == ["random/1", "prepo/1"]
    assert len(list(slurm.glob("submitted.*"))) == 1


def test_a_controller_that_does_not_answer_has_not_ended_the_jobs(slurm, compare, monkeypatch):
    monkeypatch.setenv("STAYS", "1")
    asked = []

    def down_then_gone(seconds):
        asked.append(seconds)
        if len(asked) == 1:
            (slurm / "down").touch()
        if len(asked) == 4:
            (slurm / "down").unlink()
            (slurm / "queue").unlink()

    monkeypatch.setattr(array, "sleep", down_then_gone)
    with pytest.raises(RunsFailed, match="prepo/1: exit code 1"):
        compare()  # the queued one has ended without running
    assert len(asked) == 4
    (slurm / "down").touch()
    with pytest.raises(UserError, match="squeue does not answer, and jobs may be queued"):
        compare()


def test_a_run_that_is_stopped_queues_itself_again(slurm, compare, tmp_path, monkeypatch):
    """Ranks exit with code 0 and there is no summary."""
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\n")
    with pytest.raises(RunsFailed):
        compare(methods="random")
    assert (slurm / "scontrol").read_text() == "requeue 90\n"


def test_what_cannot_be_is_refused_before_a_job(slurm, compare, monkeypatch):
    with pytest.raises(UserError, match="--time 00:05:00 leaves no time to train"):
        compare(time="00:05:00")
    with pytest.raises(
        UserError, match=r"6 ranks of the layout .or --gpus. do not fill nodes of 4"
    ):
        compare("parallel.tensor=1", "parallel.data=6", gpus_per_node=4)
    with pytest.raises(UserError, match="starts no SGLang servers"):
        compare("parallel.data=2", "rollout.engine=sglang", gpus_per_node=1)
    monkeypatch.setenv("REFUSES", "yes")
    with pytest.raises(UserError, match="sbatch refuses the jobs: Invalid account"):
        compare()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="--executor slurm needs sbatch"):
        compare()


def test_the_script_is_sound(slurm, compare):
    compare()
    assert subprocess.run(["bash", "-n", slurm / "script"]).returncode == 0
    # next to this Python, where the extra `dev` installs it; that may not be on the path
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip('shellcheck is not installed (pip install -e ".[dev]")')
    done = subprocess.run(
        # "$" within single quotes is intended
        [shellcheck, "--severity=warning", slurm / "script"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
