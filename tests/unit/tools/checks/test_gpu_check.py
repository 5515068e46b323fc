"""The check on a GPU machine, as far as it needs no GPU: its budget, its results, its summary."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from examples.real import run as real
from megatron_prepo import config as configuration
from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.launch.recipes import EXAMPLES
from tools.bench import sync
from tools.checks import gpu_check, gpu_parts, gpu_summary
from tools.checks.gpu_parts import Options, Part, run_within

REPOSITORY = Path(__file__).resolve().parents[4]
PASSED = {"passed": True, "seconds": 1.0, "output": ""}
ORPHAN = """
import subprocess, sys
code = "import time; print('ready', flush=True); time.sleep(600)"
options = {"start_new_session": True, "stdout": subprocess.PIPE, "text": True}
child = subprocess.Popen([sys.executable, "-c", code], **options)
child.stdout.readline()
print(child.pid, flush=True)
"""


def check(out, parts, *, budget=600.0, again=()):
    return gpu_check.check(parts, Options(), out, time.monotonic() + budget, list(again))


def written(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_a_part_ends_at_its_deadline_and_keeps_its_output():
    """The part ends even if a child process still holds the output."""
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    done = run_within(3.0, [sys.executable, "-c", code])
    assert (done["passed"], done["ended_at_the_deadline"]) == (False, True)
    assert done["output"] == "begun\n"
    assert done["seconds"] < 30


@pytest.mark.parametrize("ending", ["", "sys.exit(1)", "import time; time.sleep(60)"])
def test_no_process_outlives_its_part(ending):
    """A rank or server that its parent leaves behind, in its own session, would keep the GPU."""
    done = run_within(4.0, [sys.executable, "-c", ORPHAN + ending])
    assert done["passed"] == (not ending)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until its new parent has waited for it
            os.kill(int(done["output"]), 0)
            time.sleep(0.05)


def test_a_result_is_on_disk_before_the_next_part_and_no_failure_ends_the_others(tmp_path, capsys):
    out = tmp_path / "new" / "results"

    def breaks(options, file, seconds):
        assert written(out, "first")["measured"] == 1
        raise RuntimeError("the second part is broken")

    parts = {
        "first": Part(1, lambda *_: PASSED | {"measured": 1}),
        "second": Part(1, breaks),
        "third": Part(1, lambda *_: PASSED),
    }
    assert check(out, parts) == 1
    assert [written(out, name)["passed"] for name in parts] == [True, False, True]
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("RuntimeError: the second part is broken")
    assert (out / "summary.md").read_text().strip() in printed
    assert len(list(out.iterdir())) == 5  # with the marker


def test_time_that_a_part_does_not_use_goes_to_the_others(tmp_path, monkeypatch):
    """Shares 1, 2 and 1 of 100 s: 25; the 99 that are left by 2 of 3; the 33 that are left."""
    now, given = [0.0], []
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])

    def uses(seconds):
        def run(options, file, limit):
            given.append(limit)
            now[0] += min(seconds, limit)
            return PASSED

        return run

    parts = {"a": Part(1, uses(1)), "b": Part(2, uses(1000)), "c": Part(1, uses(1000))}
    gpu_check.check(parts, Options(), tmp_path, 100.0, [])
    assert given == [25.0, 66.0, 33.0]
    gpu_check.check({"d": Part(1, uses(1))}, Options(), tmp_path, 100.0, [])


def test_a_part_without_time_leaves_no_result_and_the_same_command_starts_it(tmp_path, capsys):
    """An earlier result is kept, too, where no time is left to repeat it."""
    parts = {"head": Part(1, lambda *_: PASSED | {"measured": None})}
    assert check(tmp_path, parts, budget=1.0) == 1
    assert not (tmp_path / "head.json").exists()
    assert "| head | not started |  |" in (tmp_path / "summary.md").read_text()
    assert "FAILED" not in capsys.readouterr().out
    assert check(tmp_path, parts) == 0
    earlier = written(tmp_path, "head")
    assert check(tmp_path, parts, budget=1.0, again=["head"]) == 1
    assert written(tmp_path, "head") == earlier


@pytest.mark.parametrize("name", gpu_summary.FINDINGS)
def test_a_part_that_raised_or_was_not_started_has_its_line(tmp_path, capsys, name):
    def breaks(options, file, seconds):
        raise RuntimeError("the part is broken")

    assert check(tmp_path, {name: Part(1, breaks)}) == 1
    assert f"| {name} | FAILED |  |" in capsys.readouterr().out
    assert check(tmp_path, {name: Part(1, breaks)}, budget=1.0, again=[name]) == 1
    assert f"| {name} | not started |  |" in capsys.readouterr().out


def test_a_part_with_a_result_is_skipped_unless_asked_for(tmp_path):
    runs = []
    parts = {n: Part(1, lambda *_, n=n: runs.append(n) or PASSED) for n in ("one", "two")}
    assert check(tmp_path, parts) == check(tmp_path, parts) == 0
    assert runs == ["one", "two"]
    check(tmp_path, parts, again=["two"])
    assert runs == ["one", "two", "two"]
    (tmp_path / "one.json").write_text('{"precious": 1}')
    with pytest.raises(UserError, match=r"one\.json exists, and is no result of this command"):
        check(tmp_path, parts, again=["one"])


def test_a_killed_benchmark_leaves_what_it_measured(tmp_path, monkeypatch):
    """The unfinished file is in the folder of results, in case the check is killed, too."""
    code = "import sys, time; open(sys.argv[2], 'w').write('[1]'); time.sleep(60)"
    (tmp_path / "tools" / "bench").mkdir(parents=True)
    (tmp_path / "tools" / "bench" / "slow.py").write_text(code)
    monkeypatch.setattr(gpu_parts, "REPOSITORY", tmp_path)
    seen = []

    def run(options, file, seconds):
        done = gpu_parts.benchmark("slow", [], file, 3.0)
        seen.append(file.name)
        return done

    out = tmp_path / "out"
    assert check(out, {"slow": Part(1, run)}) == 1
    result = written(out, "slow")
    assert (result["measured"], result["ended_at_the_deadline"]) == ([1], True)
    assert gpu_summary.verdict(result) == "stopped, with a result so far"
    assert seen == ["slow.partial.json"]
    names = sorted(path.name for path in out.iterdir())
    assert names == [ownership.MARKER, "slow.json", "summary.md"]


@pytest.mark.parametrize(
    ("output", "passed"),
    [
        ("tests/gpu/t.py::a PASSED [ 50%]\ntests/gpu/t.py::b[x y] PASSED [100%]\n", True),
        ("tests/gpu/t.py::a PASSED [ 50%]\ntests/gpu/t.py::b SKIPPED (no) [100%]\n", False),
        ("no tests ran in 0.01s\n", False),
    ],
)
def test_skipped_tests_and_none_at_all_do_not_count_as_passed(monkeypatch, output, passed):
    monkeypatch.setattr(gpu_parts, "run_within", lambda *_: PASSED | {"output": output})
    assert gpu_parts.run_tests(Options(), Path("unused"), 1.0)["passed"] == passed


def test_a_summary_is_short_and_ends_with_the_failures():
    goal = {"goal": "speed", "bound": "≥ 2", "measured": 1.5, "verdict": "missed", "cut": None}
    row = {"milliseconds": {"median": 2.0}, "tflops": 800.0}
    case = {"stages": {"table": {"logits": row}}}
    update = {"mfu": 0.4, "tokens_per_second": 1000.0}
    arms = {"packed": {"update": update}, "padded": {"failed": "out of memory"}}
    results = {
        "head": PASSED | {"measured": {"goals": [goal], "cases": [case]}},
        "utilisation": PASSED
        | {"measured": {"goals": [], "cases": [{"model": "7b", "arms": arms}]}},
        "tests": {"passed": False, "output": "\n".join(map(str, range(100)))},
        "plan": PASSED | {"measured": None},
        "demo": PASSED | {"measured": {"pass_rate_before": 0.25, "pass_rate_after": 0.5}},
        "checkpoint": PASSED | {"measured": {"seconds": {"background": 1.5}, "bytes": 2e9}},
    }
    text = gpu_summary.markdown(results)
    for line in (
        "| tests | FAILED |  |",
        "- missed: speed 1.5, goal ≥ 2",
        "- stage logits: 2.000 ms, 800 TFLOP/s",
        "- 7b, packed: update 0.400 of the peak, 1,000 tokens/s",
        "- 7b, padded: failed: out of memory",
        "- pass rate 0.250 before, 0.500 after",
        "- 2.0 GB: background 1.5 s",
    ):
        assert line in text, line
    assert text.endswith("    98\n    99") and text.count("\n") < 60


def test_without_a_gpu_nothing_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "_has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out")])
    assert gpu_check.main() == 2
    assert "--rehearse runs a tiny size" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_check_that_is_stopped_takes_its_part_with_it(tmp_path):
    """The end of a machine's time limit is a SIGTERM."""
    code = (
        "import sys; from tools.checks import gpu_check, gpu_parts\n"
        "sleep = [sys.executable, '-c', \"import os, time; print(os.getpid(), file=open('pid', "
        "'w'), flush=True); time.sleep(600)\"]\n"
        f"gpu_parts.REPOSITORY = {str(tmp_path)!r}\n"
        "run = lambda options, file, seconds: gpu_parts.run_within(seconds, sleep)\n"
        "gpu_check.PARTS['head'] = gpu_parts.Part(1, run)\n"
        "sys.argv = ['gpu_check', '--out', 'out', '--rehearse', '--parts', 'head']\n"
        "sys.exit(gpu_check.main())"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    while not (pid := (tmp_path / "pid")).exists() or not pid.read_text().strip():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_packed_packages_are_on_the_path_of_the_servers_alone(tmp_path):
    for n in (1, 2):
        with zipfile.ZipFile(tmp_path / f"sglang_{n}.zip", "w") as archive:
            archive.writestr(f"packed_{n}/__init__.py", f"number = {n}")
    python = gpu_parts.unpack(tmp_path, tmp_path)
    code = "import packed_1, packed_2, torch, os; print(packed_1.number + packed_2.number)"
    done = run_within(60.0, [str(python), "-c", code])
    assert done["passed"] and done["output"] == "3\n"
    assert not run_within(60.0, [sys.executable, "-c", "import packed_1"])["passed"]


@pytest.mark.parametrize("name", gpu_parts.APART)
def test_a_part_without_what_it_needs_is_refused_at_once(tmp_path, monkeypatch, capsys, name):
    words = ["gpu_check.py", "--rehearse", "--parts", name, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu_check.main() == 2
    assert f"--parts {name} needs --{name} FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


STEP = PASSED | {"ended_at_the_deadline": False, "measured": None}
LATE = STEP | {"passed": False, "ended_at_the_deadline": True}
SYNC = {"measured": {"transports": {"ipc": {"gigabytes_a_second": 12.5}}}}
RATES = {"measured": {"pass_rate_before": 0.25, "pass_rate_after": 0.5}}


@pytest.mark.parametrize(
    ("training", "sync", "expected"),
    [
        (STEP | RATES, STEP | SYNC, "passed"),
        (STEP | RATES, LATE, "stopped, with a result so far"),
        (LATE, LATE, "stopped, no result"),
        (STEP | {"passed": False}, LATE, "FAILED"),
    ],
)
def test_the_verdict_on_a_part_of_two_steps(training, sync, expected):
    result = gpu_parts.together({"training": training, "sync": sync})
    assert gpu_summary.verdict(result) == expected
    assert result["seconds"] == 2.0
    text = gpu_summary.markdown({"sglang": json.loads(json.dumps(result))})
    assert f"| sglang | {expected} | 2.0 |" in text
    assert f"- training: {gpu_summary.verdict(training)}, 1.0 s" in text
    assert ("- sync by ipc: 12.5 GB/s" in text) == bool(sync["measured"])
    assert ("- pass rate 0.250 before" in text) == bool(training["measured"])


def test_tests_that_were_stopped_have_outcomes_so_far():
    late = {"passed": False, "ended_at_the_deadline": True}
    assert gpu_summary.verdict(late | {"outcomes": {}}) == "stopped, no result"
    some = late | {"outcomes": {"tests/gpu/t.py::a": "PASSED"}}
    assert gpu_summary.verdict(some) == "stopped, with a result so far"


def test_a_rehearsal_is_marked_and_never_taken_for_a_measurement(tmp_path):
    goal = {"goal": "speed", "bound": "≥ 2", "measured": 2.5, "verdict": "met", "cut": None}
    parts = {"head": Part(1, lambda *_: PASSED | {"measured": {"goals": [goal], "cases": []}})}

    def call(name, rehearse, again=()):
        options, end = Options(rehearse=rehearse), time.monotonic() + 600
        assert gpu_check.check(parts, options, tmp_path / name, end, list(again)) == 0
        return (tmp_path / name / "summary.md").read_text()

    text = call("rehearsed", rehearse=True)
    assert text.startswith("REHEARSAL") and "no number here is a measurement" in text
    assert "| head | rehearsed | 1.0 |" in text and "met" not in text and "passed" not in text
    assert written(tmp_path / "rehearsed", "head")["rehearsal"] is True
    text = call("measured", rehearse=False)
    assert "| head | passed | 1.0 |" in text and "- met: speed" in text
    assert "rehears" not in text.lower()
    assert written(tmp_path / "measured", "head")["rehearsal"] is False
    for again in ([], ["head"]):
        with pytest.raises(UserError, match=r"head\.json is the result of a rehearsal"):
            call("rehearsed", rehearse=False, again=again)
        with pytest.raises(UserError, match=r"head\.json is the result of a measurement"):
            call("measured", rehearse=True, again=again)


def test_a_process_that_ends_before_it_is_killed_is_no_failure(monkeypatch):
    class Ending:
        def __init__(self, mark):
            self.mark, self.asked = mark, 0

        def environ(self):
            self.asked += 1
            if self.asked > 1:
                raise psutil.NoSuchProcess(1)
            return {gpu_parts.MARK: self.mark}

        def kill(self):
            raise psutil.NoSuchProcess(1)

    ending = Ending("mark")
    monkeypatch.setattr(gpu_parts.psutil, "process_iter", lambda: [ending])
    gpu_parts._kill("mark")
    assert ending.asked == 2


def test_a_killed_process_that_does_not_end_is_named_and_not_waited_for(monkeypatch):
    """One that waits for a GPU's driver cannot be killed."""
    killed = []
    monkeypatch.setattr(gpu_parts, "KILL_SECONDS", 0.2)
    monkeypatch.setattr(gpu_parts, "_kill", killed.append)
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(30)"
    done = run_within(3.0, [sys.executable, "-c", code])
    pid, *said = done["output"].splitlines()
    os.kill(int(pid), signal.SIGKILL)
    assert len(killed) == 1 and (done["passed"], done["ended_at_the_deadline"]) == (False, True)
    assert said[-1] == "a killed process of this part does not end, and may keep the GPU"


def test_the_commands_of_sglang_are_understood(tmp_path, monkeypatch):
    """Every setting and argument is read by the program that gets it; nothing is started."""
    given = []

    def run(seconds, command):
        given.append(command)
        return STEP | {"seconds": seconds}

    monkeypatch.setattr(gpu_parts, "run_within", run)
    result = gpu_parts.run_sglang(Options(sglang=tmp_path), tmp_path / "file", 100.0)
    assert result["passed"] and result["seconds"] == 100.0
    training, large = given
    settings = [word for word in training if "=" in word]
    config = configuration.load(EXAMPLES / "laptop" / "prepo.yaml", settings)
    assert (config.rollout.engine, config.weight_sync.transport) == ("sglang", "ipc")
    assert config.weight_sync.verify == "always"
    assert config.sglang.items() >= gpu_parts.SGLANG.items()
    seen = []

    def measure(scratch, options, transports):
        seen.append((sync.config_of(scratch, options, *transports), transports, options))
        return {}

    monkeypatch.setattr(sync, "measure", measure)
    monkeypatch.setattr(sync, "table", lambda result: "")
    monkeypatch.setattr(sync, "durable", SimpleNamespace(write_text=lambda *_: None))
    monkeypatch.setattr(sys, "argv", large[1:])
    assert sync.main() == 0
    [(config, transports, options)] = seen
    assert transports == ["ipc"] and config.sglang.items() >= gpu_parts.SGLANG.items()
    assert (options.shape, options.rounds, options.bucket_mb) == ("7b", 3, 1024)


def test_the_command_of_the_real_model_is_understood(tmp_path, monkeypatch):
    """The joined file is found by the example, with the prompts that are carried."""
    for name, half in zip(gpu_parts.HALVES, (b"ab", b"cde"), strict=True):
        (tmp_path / name).write_bytes(half)
    checksum = hashlib.sha256(b"abcde").hexdigest()
    (tmp_path / gpu_parts.CHECKSUM).write_text(f"{checksum} {real.GGUF}\n")
    lines = []

    def run_line(directory, recipe, model, settings, overrides):
        assert model.read_bytes() == b"abcde"
        lines.append(configuration.load(recipe, [*settings, *overrides]))
        raise UserError("understood")

    def run(seconds, command):
        assert real.main(command[2:]) == 2
        return STEP | {"seconds": seconds}

    monkeypatch.setattr(real, "run_line", run_line)
    monkeypatch.setattr(gpu_parts, "run_within", run)
    result = gpu_parts.run_real(Options(real=tmp_path), tmp_path / "file", 100.0)
    assert not result["passed"] and result["measured"] is None
    [config] = lines
    assert config.data.train == str(tmp_path / "train.jsonl")
    assert (config.reward.function, config.train.total_steps) == ("final_number", 50)
