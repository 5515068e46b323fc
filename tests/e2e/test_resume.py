"""Runs that are stopped, killed, restarted, or lose their engine, equal uninterrupted ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from fake_sglang import FakeSGLang

from megatron_prepo.cli import main
from megatron_prepo.debug import resume_check as prove
from tests.e2e.laptop import FILES, LAPTOP, REPOSITORY, SHORT, made_by_ranks, train

RUN = [*SHORT, "train.total_steps=4", "parallel.tensor=1", "eval.every=1", "checkpoint.every=3"]
RUN += ["texts.rollouts=2", "texts.evaluations=3"]
DEADLINE_SECONDS = 240.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return made_by_ranks(tmp_path_factory.mktemp("undisturbed") / "run", *RUN)


def start(directory: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_prepo", "train", str(LAPTOP / "prepo.yaml")]
    return subprocess.Popen(
        [*command, f"run.dir={directory}", *FILES, *RUN, *options],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(count: int, directory: Path, process: subprocess.Popen) -> None:
    """Wait until the run has this many steps, or more; 0: until a restarted job truncates them."""
    deadline = time.monotonic() + DEADLINE_SECONDS

    def there() -> bool:
        found = prove.num_lines(directory / "metrics.jsonl")
        return found >= count if count else found == 0

    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def assert_equal(undisturbed: Path, directory: Path, *, texts: bool = True) -> None:
    checks = prove.compare(undisturbed, directory)
    assert all(check.equal for check in checks), prove.text(checks)
    assert (checks[-1].what == "texts") == texts
    # of each step the rollouts and the evaluation after it, and the evaluation before the first
    num_texts = 2 * prove.num_lines(directory / "metrics.jsonl") + 1
    assert not texts or checks[-1].detail.startswith(f"{num_texts} ")
    assert not (directory / "journal").exists()


def test_killed_started_again_asked_to_stop_and_gone_on_with(capfd, tmp_path, undisturbed):
    """The run saves in the background, which the uninterrupted run does not."""
    directory = tmp_path / "run"
    settings = ["run.overwrite=true", "checkpoint.asynchronous=true"]
    process = start(directory, "--max-restarts", "1", *settings)
    wait_for_steps(1, directory, process)
    [rank] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(rank), signal.SIGKILL)
    first = (directory / "first_evaluation.json").stat().st_mtime_ns
    wait_for_steps(0, directory, process)
    wait_for_steps(1, directory, process)
    assert (directory / "first_evaluation.json").stat().st_mtime_ns == first, "it is kept"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 75, said
    assert said.count("started again (1 left)") == 1 and "died with SIGKILL" in said
    steps = prove.num_lines(directory / "metrics.jsonl")
    assert f"stopped as asked; {steps} steps are saved" in said and steps < 4
    assert not (directory / "summary.json").exists()
    config = directory / "config.yaml"
    config.write_text(config.read_text().replace("overwrite: false", "overwrite: true"))
    assert main(["resume", str(directory)]) == 0
    assert "resuming from" in capfd.readouterr().err
    assert_equal(undisturbed, directory)


def test_by_default_a_run_of_a_few_steps_resumes_after_the_steps_that_it_made(
    capfd, tmp_path, undisturbed
):
    process = start(tmp_path, "checkpoint.every=")
    wait_for_steps(2, tmp_path, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE_SECONDS)
    assert train(tmp_path, *RUN, "checkpoint.every=") == 0
    assert f"resuming from {tmp_path / 'checkpoints' / 'iter_000000'}" in capfd.readouterr().err
    assert_equal(undisturbed, tmp_path)
    assert len(list(tmp_path.glob("checkpoints/iter_*"))) <= 2


def test_a_users_error_is_not_tried_again(capsys, tmp_path):
    code = train(tmp_path / "run", *RUN, "--max-restarts", "3", "train.seed=x")
    assert code == 2 and "started again" not in capsys.readouterr().err


def test_other_settings_do_not_go_on(capsys, tmp_path, undisturbed):
    config = (undisturbed / "config.yaml").read_text()
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    (directory / "summary.json").unlink()
    assert train(directory, *RUN, "train.seed=2") == 2
    said = capsys.readouterr().err
    assert "train.seed=1, now 2" in said and len(said.strip().splitlines()) == 1
    assert (directory / "config.yaml").read_text() == config
    assert main(["resume", str(undisturbed)]) == 2
    assert "a finished run of 4 steps; extend it by a larger" in capsys.readouterr().err


def test_a_run_from_anothers_checkpoints_resumes_without_them(capfd, tmp_path, undisturbed):
    """Resume once it has its own checkpoint; before that, refuse and name the one it began from."""
    first, base = tmp_path / "first", tmp_path / "base"
    shutil.copytree(undisturbed / "checkpoints", first)
    shutil.copytree(LAPTOP / "base", base)
    settings = [*RUN, "train.total_steps=3", "checkpoint.every=1", f"model.hf={base}"]
    whole = made_by_ranks(tmp_path / "whole", *settings, f"model.megatron={first}")

    shutil.rmtree(first / "iter_0000004")  # a newer one would be in its place as well
    (first / "latest_checkpointed_iteration.txt").write_text("3")
    killed = killed_after_two_steps(whole, tmp_path / "no_checkpoint")
    shutil.rmtree(killed / "checkpoints")
    assert refused(capfd, killed).count(f"model.megatron={first}/iter_0000004") == 1
    killed = killed_after_two_steps(whole, tmp_path / "damaged")
    for file in killed.glob("checkpoints/iter_*/__0_0.distcp"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert "cannot start from the beginning: the content of model.megatron" in refused(
        capfd, killed
    )

    # its own weights it still reads, of the model only tokenizer and configuration
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to("pruned")
    began_with = json.loads((whole / "inputs.json").read_text())
    for name, change in {"replaced": lambda: None, "gone": lambda: shutil.rmtree(first)}.items():
        change()
        killed = killed_after_two_steps(whole, tmp_path / name)
        assert main(["resume", str(killed)]) == 0
        assert_equal(whole, killed)
        assert json.loads((killed / "inputs.json").read_text()) == began_with


def killed_after_two_steps(whole: Path, directory: Path) -> Path:
    """A finished run of three steps as it was before the third."""
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints" / "iter_0000003")
    shutil.rmtree(directory / "hf")
    (directory / "summary.json").unlink()
    return directory


def refused(capfd, directory: Path) -> str:
    capfd.readouterr()
    assert main(["resume", str(directory)]) == 2
    return capfd.readouterr().err


def test_killed_among_rollouts_or_without_an_engine_it_pays_for_nothing_twice(capfd, tmp_path):
    """The run is killed in the first step's rollouts; then all servers die in the second step's;
    then in the sync after that step.  Rollouts that were already received are not requested again.
    """
    with FakeSGLang() as fake:
        settings = ["rollout.engine=sglang", f"servers.urls=[{fake.url}]", "servers.attempts=1"]
        settings += ["weight_sync.verify=never", "checkpoint.every=0", "servers.connect_seconds=2"]
        settings += ["train.total_steps=3"]
        settings += ["servers.concurrency=1"]  # no other answer is in flight when a server dies
        made_by_ranks(tmp_path / "whole", *RUN, *settings)
        whole = Counter(fake.answered)
        rollouts = {asked for asked, count in whole.items() if count == 1}
        assert len(rollouts) == 3 * 32 and len(whole) == 3 * 32 + 8

        fake.restart()
        fake.answered.clear()
        gone, journal = tmp_path / "gone", tmp_path / "gone" / "journal"

        def after(num_rollouts: int, fault: str):
            """Inject the fault after this many rollouts; the evaluation's are answered."""

            def decide(path: str, body: dict) -> str | None:
                if path == "/generate" and asked_of(body) in rollouts:
                    with fake._lock:
                        allowed.append(asked_of(body))
                    return fault if len(allowed) > num_rollouts else None

            allowed: list[str] = []
            return decide

        fake.fault = after(13, "hang")
        process = start(gone, *settings)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while prove.num_lines(journal / "rollouts_0.0.jsonl") != 13:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.communicate()

        def in_sync(path: str, body: dict) -> str | None:
            syncs = path.startswith("/update_weights")
            return "die" if syncs and num_paid() == 64 else None

        def num_paid() -> int:
            return sum(fake.answered[asked] for asked in rollouts)

        for fault, steps, paid in ((after(19 + 20, "die"), 1, 32 + 20), (in_sync, 2, 64)):
            fake.restart()
            fake.fault = fault
            assert train(gone, *RUN, *settings) == 1
            said = capfd.readouterr().err
            assert "the engine failed" in said and f"{steps} steps are saved" in said
            assert "Traceback" not in said
            assert num_paid() == paid
        fake.restart()
        assert train(gone, *RUN, *settings) == 0
        assert {asked: fake.answered[asked] for asked in rollouts} == dict.fromkeys(rollouts, 1)
        assert_equal(tmp_path / "whole", gone)


@pytest.mark.slow
def test_killed_in_a_later_round_of_a_step_it_generates_only_the_rest(tmp_path):
    """Pilot-Commit: all pilots of the first step have been answered, and some of the commits."""
    with FakeSGLang() as fake:
        parity = REPOSITORY / "tests" / "loop_record.py"
        settings = ["rollout.engine=sglang", f"servers.urls=[{fake.url}]", "servers.concurrency=1"]
        settings += ["weight_sync.verify=never", "checkpoint.every=0", "train.total_steps=2"]
        settings += ["selection.method=pilot_commit", f"reward.function={parity}:parity"]
        made_by_ranks(tmp_path / "whole", *RUN, *settings)
        rollouts = {asked for asked, count in fake.answered.items() if count == 1}
        assert len(rollouts) == 2 * 32
        with open(tmp_path / "whole" / "ledger.jsonl") as ledger:
            sizes = Counter(json.loads(line)["prompt_id"] for line in list(ledger)[:32])
        assert len(set(sizes.values())) > 1

        allowed: list[str] = []

        def hangs(path: str, body: dict) -> str | None:
            if path == "/generate" and asked_of(body) in rollouts:
                with fake._lock:
                    allowed.append(asked_of(body))
                return "hang" if len(allowed) > 27 else None

        fake.restart()
        fake.answered.clear()
        fake.fault, gone = hangs, tmp_path / "gone"
        process, deadline = start(gone, *settings), time.monotonic() + DEADLINE_SECONDS
        while prove.num_lines(gone / "journal" / "rollouts_0.0.jsonl") != 27:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.communicate()
        fake.restart()
        assert train(gone, *RUN, *settings) == 0
        assert {asked: fake.answered[asked] for asked in rollouts} == dict.fromkeys(rollouts, 1)
        assert_equal(tmp_path / "whole", gone)


def asked_of(body: dict) -> str:
    """Return the key by which the fake counts answers."""
    return f"{body['input_ids']} {body['sampling_params'].get('sampling_seed')}"


@pytest.mark.slow
def test_five_kills(tmp_path):
    """Five of the hundred kills that `tools/checks/kill_runs.py` makes."""
    out = tmp_path / "kills.json"
    command = [sys.executable, str(REPOSITORY / "tools" / "checks" / "kill_runs.py")]
    command += ["--kills", "5", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["kills"] >= 5 and result["runs_that_differ"] == []
    assert result["kills_of"].keys() == {"all", "rank", "grader", "engine"}
    assert all(result["kills_of"].values())
