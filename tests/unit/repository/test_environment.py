"""Environments that are odd but plausible: they change nothing, or are reported in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import actor_config

from megatron_prepo.actor import parallel
from megatron_prepo.errors import Stopped, UserError

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("command", "code", "printed"),
    [
        ("reference >&-", 0, ""),
        ("train absent.yaml <&- 2>&1", 2, "error: no such configuration file: absent.yaml"),
        ("train absent.yaml 2>&-", 2, ""),
    ],
)
def test_streams_that_are_closed_cost_no_traceback(command, code, printed):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m megatron_prepo {command}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (code, printed, "")


def test_a_reader_that_leaves_costs_no_traceback():
    """The pipe `megatron-prepo reference | head` closes early."""
    command = [sys.executable, "-m", "megatron_prepo", "reference"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_that_is_no_number_is_named(monkeypatch, name):
    monkeypatch.setenv(name, "one")
    with pytest.raises(UserError, match=rf"^{name}='one' in the environment must be an integer"):
        parallel.initialize(actor_config("unused").parallel, seed=0)


@pytest.mark.parametrize(("given", "used"), [(None, "1"), ("0", "0")])
def test_on_a_gpu_cudnn_does_not_plan_a_kernel_for_each_length(monkeypatch, given, used):
    """A variable that the user has set stays; no attention comes before this place."""
    environment = {} if given is None else {parallel.NO_CUDNN_ATTENTION: given}
    monkeypatch.setattr(parallel.os, "environ", environment)
    monkeypatch.setattr(parallel.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(parallel.torch.cuda, "set_device", lambda _: None)
    parallel._use_device()
    assert environment == {parallel.NO_CUDNN_ATTENTION: used}


def test_ranks_that_do_not_find_each_other_are_one_line_with_the_addresses(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    message = r"^error: rendezvous of the 1 ranks failed.*absent0; the environment has {.*'absent0'"
    with pytest.raises(Stopped, match=message) as stopped:
        parallel.initialize(actor_config("unused").parallel, seed=0)
    assert "\n" not in str(stopped.value) and stopped.value.exit_code == 1


def test_a_store_that_is_not_there_is_one_line_too(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "MASTER_ADDR": "no-such-host.invalid",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29999")
    monkeypatch.delenv("MEGATRON_PREPO_MEETING_FILE", raising=False)
    config = actor_config("unused", parallel={"data": 2, "timeout_minutes": 0.05}).parallel
    with pytest.raises(Stopped, match=r"^error: .* the 2 ranks .*'MASTER_ADDR': 'no-such-host"):
        parallel.initialize(config, seed=0)


@pytest.mark.slow
def test_one_thread_less_than_one_and_names_with_spaces_load(tmp_path):
    """OMP_NUM_THREADS=0, a foreign locale, a proxy for everything, no home, no TMPDIR."""
    odd = tmp_path / "ein Lauf, \u00fcber #1"
    odd.mkdir()
    (odd / "reward file.py").write_text("def f(completion, answer):\n    return 1.0\n")
    program = (
        "import sys; from megatron_prepo import config\n"
        "from megatron_prepo.inputs import preflight\n"
        "preflight.check(config.load(sys.argv[1], sys.argv[2:]))\n"
        "from megatron_prepo.actor import parallel\n"
        "parallel.initialize(config.load(sys.argv[1], sys.argv[2:]).parallel, 1); print('fine')\n"
    )
    laptop = REPOSITORY / "examples" / "laptop"
    overrides = [f"model.hf={laptop / 'base'}", f"data.train={laptop / 'train.jsonl'}"]
    overrides += [f"data.eval={laptop / 'eval.jsonl'}", "parallel.tensor=1"]
    overrides += [f"reward.function='{odd / 'reward file.py'}:f'", f"run.dir='{odd / 'run'}'"]
    odd_environment = {
        "OMP_NUM_THREADS": "0",
        "LC_ALL": "C",
        "TMPDIR": "/absent",
        "HOME": "/absent",
    }
    odd_environment |= {"http_proxy": "http://192.0.2.1:1", "ALL_PROXY": "socks5://192.0.2.1:1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(laptop / "prepo.yaml"), *overrides],
        env=os.environ | odd_environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "fine\n", done.stderr
