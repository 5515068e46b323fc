"""Grading processes: every way in which an answer can break one, and the effect on others."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_prepo.config import RewardConfig
from megatron_prepo.errors import UserError
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards import output, pool
from megatron_prepo.rewards.pool import WALL_CLOCK_FACTOR, Grader

FILE = Path(__file__).resolve().parents[2] / "reward_functions.py"
LIMIT = 0.3


def rollouts(*texts: str, answer="5") -> list[Rollout]:
    prompt = Prompt("prompt-7", "2 + 3", answer, (1, 2), (0, 2))
    return [Rollout(prompt, (3,), (-0.5,), text, True, 0) for text in texts]


def settings(function="misbehave", file=FILE, **changes) -> RewardConfig:
    values = {"seconds": LIMIT, "memory_mb": 512, "processes": 1, "max_failed": 1.0}
    return RewardConfig(function=f"{file}:{function}", **values | changes)


@pytest.fixture(scope="module")
def grader():
    grader = Grader(settings())
    yield grader
    grader.close()


def processes(grader) -> set[int]:
    """Return the ids of the processes that wait for answers."""
    workers = [grader.idle.get() for _ in range(grader.processes)]
    for worker in workers:
        grader.idle.put(worker)
    return {worker.process.pid for worker in workers}


def outcome(grader, text: str) -> str:
    """Return the outcome of an answer, after which a good one is graded well."""
    first, second = grader.grade(rollouts(text, "fine"))
    assert (second.outcome, second.reward) == ("ok", 1.0)
    assert first.outcome == "ok" or first.reward == 0.0
    return first.outcome


def test_an_answer_over_its_processor_time_is_ended_by_the_kernel_and_costs_no_process():
    grader = Grader(settings(seconds=1.0))
    before = processes(grader)
    assert outcome(grader, "loop") == outcome(grader, "big-power") == "timeout"
    assert processes(grader) == before
    grader.close()


@pytest.mark.parametrize("text", ["sleep", "stop"])
def test_one_that_uses_no_processor_time_is_ended_by_the_clock(grader, text):
    start, before = time.monotonic(), processes(grader)
    assert outcome(grader, text) == "timeout"
    assert time.monotonic() - start > LIMIT * WALL_CLOCK_FACTOR
    assert not processes(grader) & before


@pytest.mark.parametrize("text", ["raise", "exit", "memory", "kill", "none"])
def test_one_that_raises_or_ends_its_process_is_an_error(grader, text):
    assert outcome(grader, text) == "error"


def test_the_reason_is_what_was_raised(grader):
    (grade,) = grader.grade(rollouts("raise"))
    assert grade.reason == f"{FILE}, line 20: RuntimeError: no \ud800 such \0 luck"
    (grade,) = grader.grade(rollouts("exit"))
    assert grade.reason == f"{FILE}, line 22: SystemExit: 0"
    (grade,) = grader.grade(rollouts("kill"))
    assert grade.reason == "the grading process ended with status -9"


def test_what_a_function_prints_is_no_reward(grader):
    assert outcome(grader, "print") == "ok"


def test_what_a_function_prints_reaches_the_log_of_the_run(tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_text(
        "import sys\nprint('loaded')\ndef f(completion, answer):\n"
        "    print('graded', completion)\n    print('x' * (3 << 20), file=sys.stderr)\n"
        "    return 1.0\n"
    )
    monkeypatch.setattr(output, "MAX_BYTES", 4 << 20)
    log = tmp_path / "logs" / "reward.log"
    given = settings("f", tmp_path / "reward.py", seconds=20.0)
    grader = Grader(given, output=log)
    grades = grader.grade(rollouts("one", "two"))
    grader.close()
    assert [grade.outcome for grade in grades] == ["ok", "ok"]  # above the limit of file sizes, too
    lines = log.read_text().splitlines()
    assert {"loaded", "graded one", "graded two"} <= set(lines)
    assert lines[-1] == "[the limit of this file is reached]"


def test_memory_that_runs_out_is_reported_with_its_place(grader):
    (grade,) = grader.grade(rollouts("memory"))
    assert grade.outcome == "error" and f"{FILE}, line 34: MemoryError" in grade.reason


def test_a_child_that_has_filled_up_is_replaced_and_the_next_answer_does_not_pay():
    grader = Grader(settings(seconds=10.0))
    grades = grader.grade(rollouts("pid", "pid", "leak", "pid"))
    before, same, _, after = (grade.reward for grade in grades)
    assert [grade.outcome for grade in grades] == ["ok"] * 4
    assert before == same != after
    grader.close()


def test_an_answer_whose_process_someone_else_killed_is_graded_again(grader):
    (grade,) = grader.grade(rollouts("pid"))
    os.kill(round(grade.reward * 2**32), signal.SIGKILL)
    assert outcome(grader, "fine") == "ok"


@pytest.mark.parametrize("text", ["\ud800 \0 \u2028 \n", "{" * 100_000, "x" * 5_000_000, ""])
def test_any_text_gets_through(grader, text):
    assert outcome(grader, text) == "ok"


def test_a_clusters_warning_ends_no_process(grader):
    """Slurm sends it to every process of a step."""
    before = processes(grader)
    for leader in before:
        os.killpg(leader, signal.SIGUSR1)
    assert outcome(grader, "fine") == "ok"
    assert processes(grader) == before


def test_grades_come_in_the_order_of_the_rollouts():
    grader = Grader(settings("length", processes=2))
    texts = ["x" * (i % 10) for i in range(200)]
    first = processes(grader)
    grades = grader.grade(rollouts(*texts))
    assert [grade.reward for grade in grades] == [len(text) / 10 for text in texts]
    assert grader.grade([]) == [] and processes(grader) == first
    grader.close()


@pytest.mark.parametrize(("text", "shown"), [("not-a-number", "nan"), ("two", "2.0")])
def test_a_reward_out_of_bounds_is_refused_by_name(grader, text, shown):
    words = rf"prompt-7.*reward {shown} of '{text}'.*reward\.low=0\.0.*reward\.high=1\.0"
    with pytest.raises(UserError, match=words):
        grader.grade(rollouts("fine", text))


def test_too_many_failures_end_the_run_and_the_first_few_are_said_once():
    said = []
    grader = Grader(settings(max_failed=0.5), log=said.append)
    grader.grade(rollouts("fine", "raise"))
    grader.grade(rollouts("fine", "raise"))
    assert len(said) == 1 and "failed on 1 of 2 answers" in said[0]
    with pytest.raises(UserError, match=r"failed on 2 of 3.*prompt-7.*RuntimeError.*max_failed"):
        grader.grade(rollouts("raise", "fine", "raise"))
    grader.close()


def test_a_process_that_someone_killed_before_it_was_ready_is_started_again(tmp_path):
    """The first two kill themselves, which looks the same from outside."""
    file = tmp_path / "slow.py"
    file.write_text(
        "import os, pathlib, signal\n"
        f"starts = pathlib.Path({str(tmp_path)!r})\n"
        "(starts / f'start_{len(list(starts.iterdir()))}').touch()\n"
        "if len(list(starts.iterdir())) <= 3:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def fine(completion, answer):\n"
        "    return 1.0\n"
    )
    grader = Grader(settings("fine", file))
    assert len(list(tmp_path.iterdir())) == 4
    assert [grade.reward for grade in grader.grade(rollouts("fine"))] == [1.0]
    grader.close()


def test_a_function_that_does_not_load_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"does not load.*has no function 'absent'"):
        Grader(settings("absent"))
    broken = tmp_path / "broken.py"
    broken.write_text("import os\nos.abort()\n")
    with pytest.raises(UserError, match=r"does not load.*ended with status -6"):
        Grader(settings(file=broken))
    broken.write_text("x = bytearray(4 << 30)\n")
    with pytest.raises(UserError, match=r"memory_mb=512: MemoryError"):
        Grader(settings(file=broken))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(completion, answer)\n    return 1\n", r"reward\.py, line 1: SyntaxError: expected"),
        ("import helper\n\nhelper.broken()\n", r"helper\.py, line 3: ZeroDivisionError"),
        ("import absent_helper\n", r"reward\.py, line 1: ModuleNotFoundError: .*absent_helper"),
        ("import sys\nsys.exit(0)\n", r"reward\.py, line 2: SystemExit: 0"),
        (
            "def g(completion, answer): ...\n",
            r"has no function 'f'; its functions: g; fix the file",
        ),
        ("def f(completion): ...\n", r"reward\.py:f\(completion\) does not fit \(too many pos"),
        ("def f(a, b, c): ...\n", r"f\(a, b, c\) does not fit \(missing a required argument: 'c'"),
        ("def f(a, *, b): ...\n", r"does not fit"),
        ("f = 3\n", r"f is a int; a reward function takes \(completion, answer\) and"),
        ("class f:\n    def __init__(self, a, b): ...\n", r"f is a class"),
        ("async def f(a, b): ...\n", r"f is a coroutine function"),
        ("def f(a, b):\n    yield 1.0\n", r"f is a generator function"),
        (
            "class C:\n    async def __call__(self, a, b): ...\nf = C()\n",
            r"f is a coroutine function",
        ),
    ],
)
def test_a_file_that_cannot_grade_is_refused_before_any_rank_starts(tmp_path, text, message):
    (tmp_path / "helper.py").write_text("def broken():\n\n    return 1 / 0\n")
    (tmp_path / "reward.py").write_text(text)
    with pytest.raises(UserError, match=rf"^reward\.function=\S+:f does not load.*{message}") as e:
        pool.check(settings("f", tmp_path / "reward.py"))
    assert "\n" not in str(e.value)


def test_a_file_that_never_loads_is_refused_at_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "START_SECONDS", 2.0)
    (tmp_path / "reward.py").write_text("while True:\n    pass\n")
    with pytest.raises(UserError, match="the file was not loaded after 2 s"):
        pool.check(settings("f", tmp_path / "reward.py"))


WELL = """
import dataclasses, functools, sys
from typing import ClassVar
import helper  # beside this file
print("loaded"), print("loaded", file=sys.stderr)

@dataclasses.dataclass
class Length:
    limit: "int" = 4
    names: ClassVar[list] = []

    def __call__(self, completion, answer, *more, extra=0):
        return helper.length(completion) / self.limit

f = functools.partial(Length(), extra=1)
"""


def test_dataclasses_modules_beside_the_file_and_callables_of_all_kinds_grade(tmp_path):
    """The working directory is another one; printed output is not a reply."""
    (tmp_path / "helper.py").write_text("length = len\n")
    (tmp_path / "reward.py").write_text(WELL)
    grader = Grader(settings("f", tmp_path / "reward.py"))
    assert [grade.reward for grade in grader.grade(rollouts("fou"))] == [0.75]
    grader.close()


def test_close_leaves_no_process_and_neither_does_the_end_of_the_trainer():
    grader = Grader(settings())
    (grade,) = grader.grade(rollouts("pid"))
    grader.close()
    assert not alive(round(grade.reward * 2**32))
    program = (
        "import os\n"
        "from tests.unit.rewards.test_grading_pool import Grader, rollouts, settings\n"
        "grader = Grader(settings())\n"
        "print(grader.grade(rollouts('pid'))[0].reward, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, deadline = round(float(done.stdout) * 2**32), time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


def test_a_grading_process_imports_neither_torch_nor_what_needs_it():
    program = (
        "import sys, megatron_prepo.rewards.worker, megatron_prepo.rewards.math\n"
        "print(*sorted({'torch', 'numpy', 'transformers', 'pydantic'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "\n", done.stdout + done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_drops_what_rewards_print_and_changes_no_reward(tmp_path, capsys):
    log = output.OutputFile(Path("/dev/full"))
    tap = output.Tap(log)

    def print_more_than_a_pipe_holds():
        for _ in range(3):
            os.write(tap.writer, b"x" * 50_000)
        os.close(tap.writer)

    printing = threading.Thread(target=print_more_than_a_pipe_holds, daemon=True)
    printing.start()
    printing.join(timeout=10)
    assert not printing.is_alive(), "nobody reads what is printed"
    assert tap.last_line() == "x" * output.TAIL_BYTES
    assert capsys.readouterr().err.count("later output is dropped") == 1
