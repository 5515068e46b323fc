"""Jobs as NeMo-Run experiments (nemo-run 0.11.1, extra `launch`).

| executor | nodes | start of the ranks | |
|---|---|---|---|
| `local` | this machine | torchrun | runs without a cluster |
| `slurm` | many | one `srun` task per rank | also SGLang servers on nodes, jobs in a chain |
| `docker` | one container | torchrun | |
| `skypilot` | many | torchrun | NeMo-Run needs its extra `skypilot` |
| `kubeflow` | many | torchrun | a TrainJob; NeMo-Run needs `kubernetes`, `kubectl`, a kubeconfig |

Tasks are `run.Script`, so that code inside a job does not need NeMo-Run.  Slurm jobs run in the
checkout that they are launched from, on a file system that all nodes share: nothing is packaged,
and relative paths are unchanged.

Limitations of NeMo-Run 0.11.1: command words are written unquoted into the scripts of Slurm and
Docker, and environment values into that of Slurm; the launcher's exit code is 0 even if a task
fails; variable names are converted to upper case.  Its torchrun launcher writes `$PET_MASTER_ADDR`
into a TrainJob, whose command is not run by a shell.  It cannot print a dry run of SkyPilot 0.10
and later.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from megatron_prepo import internals
from megatron_prepo.config import nearest, value_for, yaml_text
from megatron_prepo.errors import Stopped, UserError
from megatron_prepo.launch import peers, slurm_time
from megatron_prepo.launch.job import Job
from megatron_prepo.process.local_ranks import STOPPED_EXIT_CODE

EXECUTORS = ("local", "slurm", "docker", "skypilot", "kubeflow")


class LaunchFailed(RuntimeError):
    """A task failed; the message names it and its state."""


@dataclass(frozen=True)
class Place:
    """Executor of a job and its options."""

    executor: str
    account: str | None = None
    partition: str | None = None
    time: str = "04:00:00"
    image: str | None = None
    """Container image; empty: no container, and `python` is found on the nodes."""
    mounts: tuple[str, ...] = ()
    """`from:to` of the container; the working directory is always mounted, under the same path."""
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = "python"
    chain: int = 1
    """Number of Slurm jobs in sequence, each of which resumes where the previous one stopped."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Fields of NeMo-Run's executor, under NeMo-Run's names, as they were typed."""


READS = {
    "local": ("environment",),
    "slurm": ("account", "partition", "time", "image", "mounts", "environment", "python", "chain"),
    "docker": ("image", "mounts", "environment"),
    "skypilot": ("image", "environment"),
    "kubeflow": ("image", "environment"),
}
"""Fields of a place that an executor uses."""
OPTIONS = {"mounts": "--mount", "environment": "--env"}
"""Options of fields whose option has a different name."""


def check(job: Job, place: Place) -> None:
    """Raise UserError for an option that the executor would ignore."""
    if job.place.server_nodes and place.executor == "local":
        raise UserError(
            f"servers.nodes={job.place.server_nodes} (--server-nodes) has no effect with "
            "--executor local: set it to 0"
        )
    for known in fields(Place):
        name = known.name
        if name in ("executor", "fields", *READS[place.executor]):
            continue
        if getattr(place, name) != known.default:
            option = OPTIONS.get(name, f"--{name}")
            raise UserError(
                f"{option} has no effect with --executor {place.executor}: remove it, or set the "
                "field of NeMo-Run's executor by --with FIELD=VALUE"
            )
    if place.executor == "slurm" and place.mounts and not place.image:
        raise UserError("--mount is for containers: add --image, or remove --mount")
    if place.executor == "slurm":
        if "time" in place.fields:
            raise UserError("--with time=...: use --time instead")
        slurm_time.check(place.time, str(place.fields.get("signal", _signal(job))))


def launch(job: Job, place: Place, *, dry_run: bool, wait: bool) -> str:
    """Run the job, or describe it if `dry_run`; returns text to print.

    Jobs of Slurm and SkyPilot are waited for only if `wait` is set, all other jobs always.  Raises
    LaunchFailed if a job that was waited for failed, Stopped if it succeeded but the run is not
    finished, and UserError if NeMo-Run or a part of it is missing, or Slurm rejects a job.
    """
    run = _nemo_run()
    if place.executor == "slurm" and not dry_run:
        _check_slurm(wait)
    with run.Experiment(job.name) as experiment:
        EXPERIMENTS[place.executor](run, experiment, job, place)
        if dry_run:
            written = WRITTEN.get(place.executor)
            experiment.dryrun(log=written is None, delete_exp_dir=False)
            return "\n".join(map(written, experiment.jobs)) if written else ""
        detach = place.executor in ("slurm", "skypilot") and not wait
        with _refusals(experiment):
            experiment.run(detach=detach, tail_logs=not detach)
        if detach:
            return f"submitted: {_submitted(experiment)}"
    _raise_if_failed(experiment)
    if place.executor in ("local", "slurm"):
        _raise_if_unfinished(job)
    return "finished"


def _signal(job: Job) -> str:
    return slurm_time.warning(job.config.checkpoint.grace_seconds)


def _nemo_run() -> Any:
    # read once, at import
    os.environ.setdefault("NEMORUN_HOME", str(Path("runs/launch").resolve()))
    try:
        import nemo_run
    except ImportError as error:  # also for newer versions of leptonai, which it cannot import
        raise UserError(
            f'NeMo-Run cannot be imported ({error}): pip install -e ".[launch]"'
        ) from error
    return nemo_run


def _local(run: Any, experiment: Any, job: Job, place: Place) -> None:
    # NeMo-Run looks for torchrun on PATH, which has it only if the environment is activated
    scripts = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    executor = _build(
        run.LocalExecutor,
        place,
        launcher="torchrun",
        ntasks_per_node=job.place.ranks,
        env_vars=dict(place.environment),
    )
    experiment.add(_script(run, job.train_words()), executor=executor, name="train")


def _slurm(run: Any, experiment: Any, job: Job, place: Place) -> None:
    if not place.account:
        raise UserError("--executor slurm needs --account")
    where = job.place
    steps = [(job.rank_words(), where.nodes, where.ranks_per_node, 0)]
    if job.starts_servers:
        first = where.nodes if where.server_nodes else 0
        steps.insert(0, (job.server_words(), where.server_nodes or where.nodes, 1, first))
    tasks = [_script(run, map(shlex.quote, words), place.python) for words, *_ in steps]
    executors = [_slurm_executor(run, job, place, *step) for _, *step in steps]
    previous: list[str] = []
    for number in range(place.chain):
        name = "train" if place.chain == 1 else f"train_{number + 1}"
        alone = len(tasks) == 1
        added = experiment.add(
            tasks[0] if alone else tasks,
            executor=executors[0] if alone else executors,
            name=name,
            dependencies=previous,
        )
        previous = [added]


REQUEUED = f"""
# the exit code of ranks when a machine does not respond, which Slurm may notice much later
trap '[ $? -ne {peers.UNREACHABLE_EXIT_CODE} ] || scontrol requeue "$SLURM_JOB_ID"' EXIT
"""


def _slurm_executor(
    run: Any, job: Job, place: Place, nodes: int, tasks_a_node: int, first: int
) -> Any:
    """Build the executor of a step with `tasks_a_node` tasks on each of `nodes` nodes."""
    here = os.getcwd()
    where = f"--container-workdir={here}" if place.image else f"--chdir={here}"
    return _build(
        run.SlurmExecutor,
        place,
        account=place.account,
        partition=place.partition,
        time=place.time,
        nodes=job.nodes,
        ntasks_per_node=job.place.ranks_per_node,
        gpus_per_node=job.place.gpus_per_node,
        exclusive=True,
        mem="0",
        signal=_signal(job),
        setup_lines=REQUEUED,
        container_image=place.image,
        container_mounts=[f"{here}:{here}", *place.mounts],
        env_vars={name: shlex.quote(value) for name, value in place.environment.items()},
        srun_args=[
            f"--nodes={nodes}",
            f"--ntasks={nodes * tasks_a_node}",
            f"--ntasks-per-node={tasks_a_node}",
            f"--relative={first}",
            "--overlap",  # otherwise Slurm would start servers and ranks one after the other
            where,
        ],
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=""),
        dependency_type="afterany",
        job_name_prefix="megatron-prepo.",
        wait_time_for_group_job=0,  # the ranks wait for the servers themselves
        monitor_group_job_wait_time=10,
    )


def _docker(run: Any, experiment: Any, job: Job, place: Place) -> None:
    if not place.image:
        raise UserError("--executor docker needs --image")
    if job.nodes > 1:
        raise UserError(
            f"--executor docker supports one machine, but the job has {job.nodes} nodes"
        )
    executor = _build(
        run.DockerExecutor,
        place,
        container_image=place.image,
        launcher="torchrun",
        ntasks_per_node=job.place.ranks,
        num_gpus=-1,
        ipc_mode="host",
        volumes=[f"{os.getcwd()}:/nemo_run/code", *place.mounts],  # its working directory
        env_vars=dict(place.environment),
        packager=run.Packager(),
    )
    words = map(shlex.quote, job.train_words())
    experiment.add(_script(run, words), executor=executor, name="train")


def _skypilot(run: Any, experiment: Any, job: Job, place: Place) -> None:
    _refuse_servers(job, place)
    if not {"gpus", "instance_type"} & set(place.fields):
        raise UserError(
            "--executor skypilot needs --with gpus=H100, or another type from `sky show-gpus`; "
            "without it SkyPilot uses machines without GPUs"
        )
    executor = _build(
        run.SkypilotExecutor,
        place,
        container_image=place.image and f"docker:{place.image.removeprefix('docker:')}",
        num_nodes=job.nodes,
        gpus_per_node=job.place.gpus_per_node,
        launcher="torchrun",
        env_vars=dict(place.environment),
    )
    experiment.add(_script(run, job.train_words()), executor=executor, name="train")


def _kubeflow(run: Any, experiment: Any, job: Job, place: Place) -> None:
    _refuse_servers(job, place)
    if not place.image:
        raise UserError("--executor kubeflow needs --image")
    # with a volume for the code, NeMo-Run writes words and variables into a script unquoted
    quote = shlex.quote if place.fields.get("workdir_pvc") else str
    executor = _build(
        run.KubeflowExecutor,
        place,
        image=place.image,
        num_nodes=job.nodes,
        gpus_per_node=job.place.gpus_per_node,
        env_vars={name: quote(value) for name, value in place.environment.items()},
    )
    # no launcher: the operator sets PET_NNODES and similar variables, which torchrun reads
    words = map(quote, job.train_words())
    script = run.Script(path="-m", entrypoint="torchrun", args=list(words))
    experiment.add(script, executor=executor, name="train")


EXPERIMENTS = {
    "local": _local,
    "slurm": _slurm,
    "docker": _docker,
    "skypilot": _skypilot,
    "kubeflow": _kubeflow,
}


def _refuse_servers(job: Job, place: Place) -> None:
    if job.starts_servers:
        raise UserError(
            f"--executor {place.executor} starts no SGLang servers on multiple nodes: start them "
            "and list them in servers.urls, or use --executor slurm"
        )


def _script(run: Any, words: Iterable[str], python: str = "python") -> Any:
    module, *arguments = words
    return run.Script(path=module, m=True, entrypoint=python, args=arguments)


def _build(kind: Any, place: Place, **settings: Any) -> Any:
    """Build an executor, overridden by the user's fields; raises UserError for an unknown field."""
    known, types, own = [known.name for known in fields(kind)], get_type_hints(kind), {}
    for name, text in place.fields.items():
        if name not in known:
            raise UserError(
                f"--with {name}=...: {kind.__name__} has no such field{nearest(name, known)}"
            )
        own[name] = value_for(text, types[name], f"--with {name}: the value")
    # NeMo-Run raises the first two if an extra is missing
    refusals: tuple[type[Exception], ...] = (AssertionError, ImportError, *_no_kubeconfig())
    try:
        return kind(**settings | own)
    except refusals as error:
        raise UserError(f"--executor {place.executor}: {error}") from error


def _no_kubeconfig() -> tuple[type[Exception], ...]:
    """Return the exception that the Kubernetes package raises if it finds no cluster."""
    if importlib.util.find_spec("kubernetes") is None:
        return ()
    from kubernetes.config import ConfigException

    kind: type[Exception] = ConfigException
    return (kind,)


def _sbatch_script(job: Any) -> str:
    path = Path(job.executor.experiment_dir) / f"{job.executor.job_name}_sbatch.sh"
    return f"# {path}\n{path.read_text()}"


def _sky_task(job: Any) -> str:
    internals.require(job, "_dryrun_info")
    return yaml_text.write(job._dryrun_info.request.task.to_yaml_config())


def _train_job(job: Any) -> str:
    internals.require(job, "_dryrun_info")
    request = job._dryrun_info.request
    body = request.executor.get_job_body(request.name, request.cmd)
    return yaml_text.write(body)


WRITTEN = {"slurm": _sbatch_script, "skypilot": _sky_task, "kubeflow": _train_job}
"""Text of a submitted job per executor; for other executors NeMo-Run prints the request."""


def _check_slurm(wait: bool) -> None:
    """Raise UserError if sbatch, or sacct if `wait` is set, cannot be used."""
    for place in (os.environ["NEMORUN_HOME"], os.getcwd()):
        if "/nemo_run" in place:  # NeMo-Run replaces every occurrence of it in its scripts
            raise UserError(
                f"NeMo-Run cannot write scripts for a path that contains /nemo_run: {place}; set "
                "NEMORUN_HOME, or launch from another directory"
            )
    if shutil.which("sbatch") is None:
        raise UserError(
            "--executor slurm needs sbatch, which is not on PATH: is this a login node?"
        )
    if not wait:
        return
    try:
        asked = subprocess.run(["sacct", "--noheader"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--wait needs sacct ({error}): remove --wait") from error
    if asked.returncode:
        raise UserError(
            f"--wait needs sacct, which reports {' '.join(asked.stderr.split())!r}: remove --wait, "
            "and check squeue and the run's summary.json"
        )


@contextmanager
def _refusals(experiment: Any) -> Iterator[None]:
    """Raise UserError with sbatch's message if it rejects a job, naming jobs submitted before."""
    from invoke.exceptions import UnexpectedExit

    experiment.console.quiet = True  # it would print the same error in twenty lines
    try:
        yield
    except UnexpectedExit as error:
        lines = error.result.stderr.replace("sbatch: error: ", "").splitlines()
        said = "; ".join(filter(None, lines)) or f"exit code {error.result.exited}"
        taken = _submitted(experiment)
        also = f"; already submitted, cancel them with scancel: {taken}" if taken else ""
        raise UserError(f"sbatch rejected the job: {said}{also}") from None
    finally:
        experiment.console.quiet = False


def _submitted(experiment: Any) -> str:
    """Return the submitted jobs, with the cluster's job ids."""
    return ", ".join(
        f"{added.id} as {added.handle.rpartition('/')[2]}"
        for added in experiment.jobs
        if added.launched
    )


def _raise_if_unfinished(job: Job) -> None:
    """Raise Stopped unless the run is finished, whatever the scheduler reports for its jobs."""
    directory = Path(job.config.run.dir)
    if not (directory / "summary.json").is_file():
        raise Stopped(
            f"the jobs have ended, but the run in {directory} is not finished: it was stopped "
            "before the time limit; the same command resumes it",
            exit_code=STOPPED_EXIT_CODE,
        )


def _raise_if_failed(experiment: Any) -> None:
    """Raise LaunchFailed unless the last job, which finishes the run, succeeded."""
    last = experiment.jobs[-1]
    if last.state.name != "SUCCEEDED":
        where = last.executor.job_dir
        raise LaunchFailed(f"{last.id} ended as {last.state.name}; its logs are in {where}")
