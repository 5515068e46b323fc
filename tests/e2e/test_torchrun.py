"""The same command as ranks that somebody else has started."""

import os
import subprocess
import sys

from tests.e2e.laptop import FILES, LAPTOP, REPOSITORY, SHORT, summary


def torchrun(directory, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    train = ["-m", "megatron_prepo", "train", str(LAPTOP / "prepo.yaml"), f"run.dir={directory}"]
    return subprocess.run(
        [*command, *train, *FILES, *SHORT, *overrides],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_ranks_of_torchrun_train(tmp_path):
    done = torchrun(tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(tmp_path / "run")["ranks"] == 2
    assert done.stdout.count("held-out pass rate after") == 1


def test_a_users_error_is_said_once(tmp_path):
    done = torchrun(tmp_path / "run", "parallel.tensor=2", "parallel.data=2")
    assert done.returncode != 0
    assert done.stderr.count("error: 2 ranks do not fit parallel.tensor=2") == 1
