"""A real Slurm on this machine, used as on a login node (`cluster.sh`)."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_prepo.debug import resume_check as prove
from tests.e2e import launcher
from tests.e2e.laptop import FILES, REPOSITORY, SHORT

SCRIPT = Path(__file__).with_name("cluster.sh")
PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "ip": "iproute2",
    "ps": "procps",
}
ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
"""Packages for `sacct`; without them, tests that need it are skipped."""
SECONDS = 300.0
"""Deadline of each wait: many times what a quiet machine needs."""
TRAIN = [*FILES, *SHORT, "train.total_steps=12", "checkpoint.every=4", "eval.every=6"]
"""Short steps of the laptop example, enough of them to interrupt."""
NODES = 3
EXTRA = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL PriorityTier=100 State=UP
"""
"""Lines of slurm.conf: jobs of the partition `urgent` preempt others."""
SINFO = ("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%T")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
"""States in which a job stays."""


def missing() -> str:
    """Return why there can be no cluster here; empty if there can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    packages = [package for name, package in PACKAGES.items() if not shutil.which(name, path=path)]
    if sys.platform != "linux":
        return "Slurm's nodes are Linux namespaces"
    if packages:
        return (
            f"Slurm is not installed: apt-get install --no-install-recommends {' '.join(packages)}"
        )
    return "Slurm's nodes are namespaces, which only root can make" if os.geteuid() else ""


def has_accounting() -> bool:
    """Return whether `sacct` is available."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return all(shutil.which(name, path=path) for name in ACCOUNTING)


class Cluster:
    """A login node and NODES nodes of 8 processors and 8 GPUs (of /dev/null)."""

    def __init__(self, **settings: str):
        self.home = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.runs = self.home / "runs"
        self.runs.mkdir()
        # Slurm's variables in the launching shell belong to another cluster
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment |= {
            "SLURM_HOME": str(self.home),
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
            "PATH": path,
            "NEMORUN_HOME": str(self.home / "launched"),
            "OMP_NUM_THREADS": "1",
        }
        self.settings = {
            "NODES": str(NODES),
            "ACCOUNTING": "yes" if has_accounting() else "no",
            "SLURMD_TIMEOUT": "20",
            "CRED_EXPIRE": "5",
            "KILL_WAIT": "10",
            "DISK_MB": "64",
            "OWN_NAME": "127.0.1.1",  # as Debian and Ubuntu have it
            "EXTRA": EXTRA,
            **settings,
        }

    def __enter__(self) -> "Cluster":
        # stops the cluster even if this process is killed
        code = (
            f"while kill -0 {os.getpid()} 2>/dev/null; do sleep 2; done; "
            f"{SCRIPT} down; rm -rf {self.home}"
        )
        self.watcher = subprocess.Popen(
            ["bash", "-c", code], env=self.environment, start_new_session=True
        )
        try:
            self._script("up", **self.settings)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        os.killpg(self.watcher.pid, signal.SIGKILL)
        self.watcher.wait()
        self._script("down")
        shutil.rmtree(self.home)

    def _script(self, *words: str, **environment: str) -> str:
        done = subprocess.run(
            [SCRIPT, *words],
            env=self.environment | environment,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout

    def run(self, *words: str) -> str:
        """Run a command on the login node; return what it prints."""
        return self._script("run", *words)

    def on(self, node: str, *words: str) -> str:
        """Run a command on a node."""
        return self._script("on", node, *words)

    def cut(self, node: str) -> None:
        """Disconnect a node from the network; its processes live."""
        self._script("cut", node)

    def join(self, node: str) -> None:
        """Reconnect a node to the network."""
        self._script("join", node)

    def power_off(self, node: str) -> None:
        """Stop the machine: it does not answer."""
        self._script("power-off", node)

    def boot(self, node: str) -> None:
        """Start a machine that was powered off."""
        self._script("boot", node)

    def restart(self, host: str) -> None:
        """Restart the slurmd of a node, or the slurmctld of `login`; jobs live."""
        self._script("restart", host)

    @contextlib.contextmanager
    def slurm_notices_late(self):
        """Let Slurm take minutes to notice a lost node, as by default; in tests it takes 20 s."""
        conf = self.home / "etc" / "slurm.conf"
        before = conf.read_text()
        conf.write_text(re.sub("SlurmdTimeout=.*", "SlurmdTimeout=600", before))
        self.run("scontrol", "reconfigure")
        try:
            yield
        finally:
            conf.write_text(before)
            self.run("scontrol", "reconfigure")

    def idle(self) -> None:
        """Wait until no job is left and all nodes are idle, as each test finds them."""
        self.run("scancel", "--user=root")
        wait_for("an empty queue", lambda: not self.run("squeue", "--noheader"))
        wait_for("idle nodes", self._all_idle)

    def _all_idle(self) -> bool:
        states = self.run(*SINFO).split()
        return states == ["idle"] * NODES

    def launch(
        self, *words: str, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run `python -m megatron_prepo.launch LAPTOP --executor slurm ...` on the login node."""
        command = [launcher.PYTHON, "-m", "megatron_prepo.launch", "examples/laptop/prepo.yaml"]
        fixed = ["--executor", "slurm", "--account", "lab", "--python", sys.executable]
        done = subprocess.run(
            [SCRIPT, "run", *command, *fixed, "--no-doctor", "--no-plan", *words],
            env=self.environment | environment,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * SECONDS,
        )
        said = f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
        assert not check or done.returncode == 0, said
        return done

    def launched(self, *words: str, **environment: str) -> list[str]:
        """Launch, and return the numbers of the jobs that were submitted."""
        done = self.launch(*words, **environment)
        line = next(line for line in done.stdout.splitlines() if line.startswith("submitted: "))
        return re.findall(r" as (\d+)", line)

    def sbatch(self, script: str, *words: str, options=(), **environment: str) -> str:
        """Submit one of `examples/launch`, two tasks on two nodes; returns the job's number."""
        shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--account=lab"]
        where = [f"--chdir={self.home}", "--output=slurm-%j.batch"]
        return self._script(
            *["run", "env", f"SLURM_HOME={self.home}", "sbatch", "--parsable", *shape, *where],
            *[*options, str(REPOSITORY / "examples" / "launch" / script), *words],
            **environment,
        ).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return the output of `scontrol show job` as a dictionary."""
        shown = self.run("scontrol", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def state(self, number: str) -> str:
        """Return the job's state: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ..."""
        return self.job(number)["JobState"]

    def wait(self, number: str, *states: str, seconds: float = SECONDS) -> dict[str, str]:
        """Wait until the job is in one of the states; returns `job`."""
        what = f"job {number} to be {' or '.join(states)}"
        self.wait_for(what, lambda: self.state(number) in states, number, seconds)
        return self.job(number)

    def wait_for(
        self, what: str, happened: Callable[[], object], number: str, seconds: float = SECONDS
    ) -> None:
        """Wait for an effect of a job; fail immediately if the job has ended without it."""

        def happened_or_ended() -> bool:
            ended = self.state(number) in ENDED
            return bool(happened()) or (ended and self._fail(what, number))

        wait_for(what, happened_or_ended, seconds, lambda: self.text(number))

    def _fail(self, what: str, number: str) -> None:
        raise AssertionError(f"no {what}, and the job has ended\n{self.text(number)}")

    def text(self, number: str) -> str:
        """Return all information about a job."""
        return f"{self.job(number)}\n{self.logs(number)}"

    def ends(self, number: str, state: str = "COMPLETED", seconds: float = SECONDS) -> str:
        """Wait for the end of a job, which must be in this state; return its logs."""
        job = self.wait(number, *ENDED, seconds=seconds)
        assert job["JobState"] == state, self.text(number)
        return self.logs(number)

    def log_files(self, number: str) -> list[Path]:
        """Return the files that a job has printed to."""
        nemo = (self.home / "launched").rglob(f"*_{number}*.out")
        return sorted([*nemo, *self.home.glob(f"slurm-{number}*")])

    def logs(self, number: str) -> str:
        """Return the output of a job."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-60_000:]}"
            for path in self.log_files(number)
        )

    def signal(self, number: str, name: str = "USR1") -> None:
        """Send the signal that Slurm sends before a time limit, to all tasks of all steps."""
        self.run("scancel", f"--signal={name}", number)

    def wait_for_steps(self, run: Path, steps: int, number: str) -> None:
        """Wait until a run has completed this many steps."""
        written = run / "metrics.jsonl"
        self.wait_for(f"{steps} steps", lambda: prove.num_lines(written) >= steps, number)

    def wait_for_ranks(self, run: Path, ranks: int, number: str) -> None:
        """Wait until this many ranks of a run listen to the signal."""
        self.wait_for(f"{ranks} ranks", lambda: len(listening(run)) >= ranks, number)


def listening(run: Path) -> list[int]:
    """Return the ranks of a run that catch SIGUSR1, by the ids that their processes have here."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "megatron_prepo.launch.rank" in words and f"run.dir={run}" in words:
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
                if caught >> (signal.SIGUSR1 - 1) & 1:
                    found.append(process.pid)
    return found


def wait_for(
    what: str,
    happened: Callable[[], object],
    seconds: float = SECONDS,
    text: Callable[[], str] = str,
) -> None:
    """Poll until it has happened; fail at the deadline, with `text`."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}\n{text()}"
        time.sleep(0.25)
