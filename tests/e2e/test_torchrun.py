"""The same command as ranks that another launcher has started."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_machines_without_a_scheduler_meet(tmp_path):
    """Two machines of one rank each run `examples/launch/torchrun.sh`; both are this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = [str(REPOSITORY / "examples" / "launch" / "torchrun.sh"), str(LAPTOP / "prepo.yaml")]
    words = [*script, f"run.dir={tmp_path / 'run'}", *FILES, *SHORT]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    machine = {"HEAD": "127.0.0.1", "PORT": port, "NODES": "2", "GPUS": "1", "PATH": path}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | machine
    both = [
        subprocess.Popen(words, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=400)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert summary(tmp_path / "run")["ranks"] == 2
