"""A full disk, a read-only directory, a clock that jumps: one-line errors, nothing lost."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prepo.debug import resume_check as prove
from tests.e2e.laptop import FILES, LAPTOP, REPOSITORY, SHORT, made_by_ranks, train

RUN = [*SHORT, "parallel.tensor=1", "eval.every=1", "checkpoint.every=1"]
BACKGROUND = "checkpoint.asynchronous=true"
"""Setting that saves checkpoints in the background, under a deadline."""
DEADLINE_SECONDS = 240.0
UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""Command prefix for root, which permissions do not otherwise keep from writing."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return made_by_ranks(tmp_path_factory.mktemp("undisturbed") / "run", *RUN)


def start(
    directory: Path, *settings: str, prefix=(), command=(), **environment: str
) -> subprocess.Popen:
    train = [sys.executable, "-m", "megatron_prepo", "train", *command, str(LAPTOP / "prepo.yaml")]
    return subprocess.Popen(
        [*prefix, *train, f"run.dir={directory}", *FILES, *RUN, *settings],
        cwd=REPOSITORY,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Wait for the condition while the process runs."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def ends(process: subprocess.Popen, code: int) -> str:
    """Wait for the end of the process and check its exit code; return its output."""
    _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == code, said
    return said


@pytest.fixture
def unprivileged():
    """Prefix of a command that makes permissions hold."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root writes everywhere, and setpriv (util-linux) is not installed")
    return UNPRIVILEGED


@pytest.mark.parametrize("locked", ["", "run", "run/checkpoints"])
def test_a_read_only_directory_is_a_sentence_before_anything_starts(tmp_path, unprivileged, locked):
    (tmp_path / locked).mkdir(parents=True, exist_ok=True)
    (tmp_path / locked).chmod(0o555)
    before = sorted(tmp_path.rglob("*"))
    [sentence] = ends(start(tmp_path / "run", prefix=unprivileged), code=2).splitlines()
    assert sentence.startswith(f"error: run.dir={tmp_path / 'run'} cannot be written, since")
    assert f" {tmp_path / locked} is read-only" in sentence
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / locked).chmod(0o755)


def test_read_only_in_the_middle_it_ends_and_goes_on_later(tmp_path, unprivileged, undisturbed):
    directory = tmp_path / "run"
    checkpoints = directory / "checkpoints"
    process = start(directory, prefix=unprivileged)
    wait_for(process, lambda: (checkpoints / "latest_checkpointed_iteration.txt").exists())
    checkpoints.chmod(0o555)
    said = ends(process, code=1)
    assert "Permission denied" in said and str(checkpoints) in said
    assert prove.num_lines(directory / "metrics.jsonl") == 2
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == ["iter_0000001"]
    checkpoints.chmod(0o755)
    assert train(directory, *RUN) == 0
    assert_equal(undisturbed, directory)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a small file system at `tmp_path`, and give the function that changes its size."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here")
    yield lambda kib: subprocess.check_call(["mount", "-o", f"remount,size={kib}k", str(tmp_path)])
    subprocess.check_call(["umount", "--lazy", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("kib", [4, 16, 24, 36, 2000, 2956, 5912, 6672])
def test_a_full_disk_is_one_line_and_with_room_the_run_resumes(
    tmp_path, small_disk, undisturbed, kib
):
    """The disk is full before the run begins, in its first lines, its checkpoints or its export.  A
    restart finds no room either, and logs it."""
    directory, restarts = tmp_path / "run", int(kib == 2000)
    small_disk(kib)
    said = ends(start(directory, command=["--max-restarts", str(restarts)]), code=1)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 + restarts == 1 + said.count("started again (1 left)"), said
    assert "Traceback" not in said
    for line in lines:
        assert f"No space left on device: '{directory}" in line or "(0 MiB are free there)" in line
        assert line.endswith("make room there, and the same command resumes what is unfinished")
    assert not (directory / "summary.json").exists()
    small_disk(65536)
    assert train(directory, *RUN) == 0
    assert_equal(undisturbed, directory)


JUMPING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

/* The time of day, five hours off in one direction or the other, another one every 40 questions.
   The clocks that only run are as they are. */

static long off(void) {
    static unsigned asked = 0;
    const long hours[] = {0, 5, -5, 5, 0, -5};
    return 3600 * hours[__atomic_fetch_add(&asked, 1, __ATOMIC_RELAXED) / 40 % 6];
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += off();
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    int result = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory):
    """Environment of a process whose time of day jumps back and forth."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler to make the clock jump with")
    directory = tmp_path_factory.mktemp("clock")
    (directory / "jumping.c").write_text(JUMPING)
    library = directory / "jumping.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, directory / "jumping.c", "-ldl"], check=True
    )
    return {"LD_PRELOAD": str(library)}


def test_the_clock_does_jump(jumping_clock):
    program = "import time; t = [time.time() for _ in range(240)]; print(round(max(t) - min(t)))"
    asked = [sys.executable, "-c", program]
    plain, jumping = (
        int(subprocess.check_output(asked, env=os.environ | extra)) for extra in ({}, jumping_clock)
    )
    assert plain < 3600 and jumping == pytest.approx(10 * 3600, abs=5)


def test_a_clock_that_jumps_changes_nothing(tmp_path, jumping_clock, undisturbed):
    """Nothing changes in a run, nor in one that is killed and resumed."""
    directory = tmp_path / "run"
    process = start(directory, BACKGROUND, **jumping_clock)
    wait_for(process, lambda: prove.num_lines(directory / "metrics.jsonl") >= 1)
    process.kill()
    process.communicate()
    ends(start(directory, BACKGROUND, **jumping_clock), code=0)
    assert_equal(undisturbed, directory)


def assert_equal(undisturbed: Path, directory: Path) -> None:
    checks = prove.compare(undisturbed, directory)
    assert all(check.equal for check in checks), prove.text(checks)
    assert not (directory / "journal").exists()
