"""Play Slurm on this machine: `sbatch`, `srun`, `scontrol`, `squeue` and `sacct` on `PATH`.

A job's nodes are addresses of this machine, 127.0.0.1, 127.0.0.2, ...; each task is a process.  It
reproduces tasks and their environment, `--relative`, `--kill-on-bad-exit`, dependencies, states,
and signals to all tasks of a step: `tests/real_slurm/test_played_slurm.py` compares the two, and
the tests beside it have what this one does not play (time limits, requeues, preemption, memory,
GPUs, nodes that are lost).  Run as a script by the commands that `install` makes.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

KILL_WAIT = 1.0
COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "sacct")


def install(directory: Path) -> dict[str, str]:
    """Create the commands; return the environment in which they are found."""
    binaries, state = directory / "bin", directory / "state"
    binaries.mkdir(parents=True)
    state.mkdir()
    for name in COMMANDS:
        command = binaries / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__)} {name} "$@"\n')
        command.chmod(0o755)
    path = os.pathsep.join([str(binaries), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "FAKE_SLURM": str(state)}


def state_of(environment: dict[str, str], job: str) -> str:
    """Return COMPLETED, FAILED, RUNNING or PENDING."""
    return (Path(environment["FAKE_SLURM"]) / f"{job}.state").read_text()


def signal_steps(environment: dict[str, str], number: int) -> None:
    """Send a signal to all processes of the running steps, as `--signal` does."""
    for path in Path(environment["FAKE_SLURM"]).glob("*.step"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.stem), number)


def end(environment: dict[str, str]) -> None:
    """Kill what still runs."""
    for path in Path(environment["FAKE_SLURM"]).glob("*.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)


def sbatch(words: list[str]) -> int:
    """Queue a script; it runs when the jobs that it depends on have ended."""
    options, (script, *arguments) = _options(words)
    state = Path(os.environ["FAKE_SLURM"])
    job = str(int(time.time()) * 100 % 10_000_000 + len(list(state.glob("*.state"))))
    _set_state(state, job, "PENDING")
    (state / f"{job}.words").write_text(" ".join(words))
    others = re.findall(r"--dependency=afterany:(\S+)", " ".join(words))
    print(job, flush=True)
    if os.fork():
        return 0
    os.setsid()
    (state / f"{job}.pid").write_text(str(os.getpid()))
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    for other in others:
        while (state / f"{other}.state").read_text() in ("PENDING", "RUNNING"):
            time.sleep(0.05)
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", Path(script).read_text(), re.M))
    nodes = int((flags | options)["nodes"])
    environment = {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS_PER_NODE": (flags | options)["ntasks-per-node"],
    }
    _set_state(state, job, "RUNNING")
    with open(state / f"{job}.out", "w") as out:
        process = subprocess.Popen(
            ["bash", script, *arguments],
            env={**os.environ, **environment},
            stdout=out,
            stderr=out,
        )
        ended = "COMPLETED" if process.wait() == 0 else "FAILED"
    _set_state(state, job, ended)
    os._exit(0)


def _set_state(directory: Path, job: str, state: str) -> None:
    """Write a state atomically."""
    aside = directory / f"{job}.aside"
    aside.write_text(state)
    aside.replace(directory / f"{job}.state")


def srun(words: list[str]) -> int:
    """Run a command as tasks; return the largest of their exit codes."""
    options, command = _options(words)
    if "w" in options:
        return subprocess.run(command).returncode
    count = int(options.get("nodes", os.environ["SLURM_NNODES"]))
    tasks = int(options.get("ntasks", count * int(os.environ["SLURM_NTASKS_PER_NODE"])))
    first = int(options.get("relative", 0))
    hosts = [f"127.0.0.{first + i + 1}" for i in range(count)]
    a_node = tasks // count
    log = options["output"].replace("%j", os.environ["SLURM_JOB_ID"])
    with open(Path(os.environ["FAKE_SLURM"]) / log, "a") as out:
        processes = [
            subprocess.Popen(
                command,
                cwd=options.get("chdir"),
                stdout=out,
                stderr=out,
                preexec_fn=_end_with_parent,
                env={
                    **os.environ,
                    "SLURM_PROCID": str(task),
                    "SLURM_LOCALID": str(task % a_node),
                    "SLURM_NODEID": str(task // a_node),
                    "SLURM_NTASKS": str(tasks),
                    "SLURM_NNODES": str(count),  # of the step, not of the job
                    "SLURM_STEP_NODELIST": ",".join(hosts),
                    "SLURMD_NODENAME": hosts[task // a_node],
                },
            )
            for task in range(tasks)
        ]
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _: [_signal_all(p.pid, number) for p in processes])
        step = Path(os.environ["FAKE_SLURM"]) / f"{os.getpid()}.step"
        step.touch()
        failed = None
        while None in (codes := [process.poll() for process in processes]):
            if any(codes):  # as the real one: SIGTERM, then SIGKILL after KillWait
                failed = failed or time.monotonic()
                late = time.monotonic() - failed > KILL_WAIT
                for process in processes:
                    (process.kill if late else process.terminate)()
            time.sleep(0.05)
        step.unlink()
    return max(code if code >= 0 else 128 - code for code in codes)


def _signal_all(pid: int, number: int) -> None:
    """Signal a task and all processes that it started, as Slurm reaches everything in a step."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, number)
        for child in children:
            _signal_all(int(child), number)


def scontrol(words: list[str]) -> int:
    """Run `show hostnames`, or `requeue`, which is only recorded."""
    if words[0] == "requeue":
        with open(Path(os.environ["FAKE_SLURM"]) / "requeued", "a") as file:
            file.write(f"{words[1]}\n")
        return 0
    count = int(os.environ["SLURM_NNODES"])
    print("\n".join(f"127.0.0.{i + 1}" for i in range(count)))
    return 0


def squeue(words: list[str]) -> int:
    """Report no pending job; print start and end of a job, as its script requests them."""
    if "--format=%S %e" in words:
        print("2026-01-01T12:00:00", os.environ.get("FAKE_END", "2026-01-01T16:00:00"))
    return 0


def sacct(words: list[str]) -> int:
    """Print the state of one job, as NeMo-Run requests it; without a job, report accounting."""
    if "-j" not in words:
        return 0
    job = words[words.index("-j") + 1]
    print("JobID|JobName|State")
    print(f"{job}|megatron-prepo.train|{state_of(dict(os.environ), job)}")
    return 0


def _options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return options, the last of a name counting, and the command after them."""
    options, rest = {}, list(words)
    while rest[0].startswith("-"):
        name, equals, value = rest.pop(0).lstrip("-").partition("=")
        if not equals and name in ("output", "chdir", "w"):
            value = rest.pop(0)
        options[name] = value
    return options, rest


def _end_with_parent() -> None:
    """End with the parent: a step's tasks do not outlive it."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
