# PYTHON_ARGCOMPLETE_OK
"""The command `python -m megatron_prepo.launch`.

python -m megatron_prepo.launch qwen2.5-7b --executor slurm --account A [key=value ...]
python -m megatron_prepo.launch examples/laptop/prepo.yaml --executor local
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_prepo.config import completion
from megatron_prepo.errors import Stopped, UserError
from megatron_prepo.launch import doctor
from megatron_prepo.launch.executors import EXECUTORS, LaunchFailed, Place, check, launch
from megatron_prepo.launch.job import Job, make_job
from megatron_prepo.plan.gpus import GPUS
from megatron_prepo.process import version
from megatron_prepo.process.command import in_one_line


@in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Launch a job and return the exit code.

    0: finished or submitted; 1: a job failed, or the doctor or the plan found an error; 2: an error
    that the user can fix; 75: the job was waited for and stopped before the end of the run.
    """
    parser = _parser()
    completion.answer_shell(parser)
    options = parser.parse_intermixed_args(arguments)
    try:
        job = make_job(
            options.recipe,
            options.overrides,
            nodes=options.nodes,
            gpus_per_node=options.gpus_per_node,
            server_nodes=options.server_nodes,
        )
        place = Place(
            executor=options.executor,
            account=options.account,
            partition=options.partition,
            time=options.time,
            image=options.image,
            mounts=tuple(options.mount),
            environment=_pairs("--env", options.env),
            python=options.python,
            chain=options.chain,
            fields=_pairs("--with", options.field),
        )
        _check_chain(job, place)
        check(job, place)
        if place.executor != "local" and not _examined(job, options) and not options.dry_run:
            return 1
        print(launch(job, place, dry_run=options.dry_run, wait=options.wait))
        return 0
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except LaunchFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _examined(job: Job, options: argparse.Namespace) -> bool:
    """Return whether doctor and plan, unless disabled, found no error."""
    good = True
    if options.doctor:
        findings = doctor.examine_inputs(job.config, job.place)
        bad = [finding for finding in findings if finding.state != "ok"]
        if bad:
            print(doctor.text(bad), file=sys.stderr)
        good = not any(finding.state == "missing" for finding in bad)
    if options.plan:
        good = _fits(job, options.gpu) and good
    if not good and not options.dry_run:
        print("nothing was submitted (--no-doctor, --no-plan)", file=sys.stderr)
    return good


def _fits(job: Job, gpu: str) -> bool:
    from megatron_prepo.inputs import hub
    from megatron_prepo.plan import planner as plan
    from megatron_prepo.plan import text as plan_text

    where = job.place
    question = plan.PlanRequest(
        gpus=where.ranks,
        gpu=gpu,
        gpus_per_node=max(where.ranks_per_node, where.gpus_per_node),
    )
    answer = plan.make_plan(hub.resolved(job.config, weights=False), question)
    if not answer.fits:
        print(plan_text.text(answer, None), file=sys.stderr)
        print(f"planned for --gpu {gpu}: name the job's GPUs if they are others", file=sys.stderr)
    return answer.fits


def _check_chain(job: Job, place: Place) -> None:
    if place.chain < 1:
        raise UserError(f"--chain {place.chain} must be at least 1")
    if place.chain > 1 and place.executor != "slurm":
        raise UserError(f"--chain {place.chain} needs --executor slurm")
    if place.chain > 1 and job.config.run.overwrite:
        raise UserError(
            f"--chain {place.chain} with run.overwrite=true: each job would delete the results of "
            "the previous one; set run.overwrite=false"
        )


def _pairs(option: str, words: Sequence[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise UserError(f"{option} {word!r} must have the form NAME=VALUE")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_prepo.launch",
        description="Launch a run by NeMo-Run (docs/launch.md).",
    )
    version.add_option(parser)
    parser.add_argument("recipe", help="such as qwen2.5-7b or qwen2.5-7b/random; or a YAML file")
    completion.add_overrides(parser)
    parser.add_argument("--executor", choices=EXECUTORS, required=True)
    nodes = parser.add_argument_group("nodes")
    nodes.add_argument(
        "--nodes", type=int, help="training nodes (default: as many as the layout needs)"
    )
    nodes.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    nodes.add_argument(
        "--server-nodes",
        type=int,
        metavar="N",
        help="additional nodes for SGLang (default: servers.nodes)",
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--chain", type=int, default=1, metavar="N", help="number of jobs to submit in sequence"
    )
    cluster.add_argument("--account")
    cluster.add_argument("--partition")
    cluster.add_argument("--time", default="04:00:00", help="time limit (default: %(default)s)")
    cluster.add_argument("--image", help="container image")
    cluster.add_argument("--mount", action="append", default=[], metavar="FROM:TO")
    cluster.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    cluster.add_argument(
        "--python", default="python", help="interpreter on the nodes (default: %(default)s)"
    )
    cluster.add_argument(
        "--with",
        dest="field",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="field of NeMo-Run's executor, such as qos=high",
    )
    checks = parser.add_argument_group("checks before the launch")
    checks.add_argument(
        "--gpu",
        choices=GPUS,
        default="h100",
        help="GPU type, which the plan must fit (default: %(default)s)",
    )
    checks.add_argument("--no-doctor", dest="doctor", action="store_false")
    checks.add_argument("--no-plan", dest="plan", action="store_false")
    parser.add_argument("--dry-run", action="store_true", help="print the job without running it")
    parser.add_argument(
        "--wait", action="store_true", help="wait for the end of jobs of slurm and skypilot"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
