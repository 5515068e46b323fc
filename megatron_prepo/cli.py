# PYTHON_ARGCOMPLETE_OK
"""The command `megatron-prepo`.

megatron-prepo demo                              run the laptop experiment, in runs/demo
megatron-prepo train CONFIG [key=value ...]      train; under torchrun, as one of the ranks
megatron-prepo resume RUN_DIR [key=value ...]    resume an interrupted run
megatron-prepo resume --prove CONFIG_OR_RUN_DIR  kill and resume a short run, compare bit for bit
megatron-prepo replay DUMP [key=value ...]       run a dumped step again, in any layout
megatron-prepo compare CONFIG --methods A,B ...  compare methods on equal terms, over seeds
megatron-prepo evaluate --model DIR ...          evaluate models on suites, avg@k and pass@k
megatron-prepo report RUN_OR_RESULTS...          write a page of runs and comparisons
megatron-prepo plan CONFIG --gpus N --gpu KIND   estimate memory and seconds, suggest layouts
megatron-prepo doctor [CONFIG]                   check this machine, with a remedy per problem
megatron-prepo reference [metrics]               print all settings, or all metrics, in Markdown
"""

import argparse
import os
import re
import select
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from megatron_prepo import config as configuration
from megatron_prepo.compare import runner as compare
from megatron_prepo.compare import slurm_array as array
from megatron_prepo.compare.arms import ARMS
from megatron_prepo.config import completion, literal
from megatron_prepo.config.loading import settings_like
from megatron_prepo.errors import Stopped, UserError
from megatron_prepo.files import lock, rows
from megatron_prepo.files.existing import existing
from megatron_prepo.launch import recipes, start
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.process import activity, local_ranks, version
from megatron_prepo.process.command import in_one_line


@in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: a failed run, a plan that does not fit, or something that `doctor` finds missing;
    2: an error that the user can fix; 75: a run that stopped when asked to, and can be resumed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    completion.answer_shell(parser)
    options, rest = parser.parse_known_args(arguments)
    # argparse accepts no overrides after an option such as --seeds
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}{_settings_meant(rest)}")
    if rest:
        options.overrides += rest
    options.arguments, options.command = arguments, compare.command_line(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _is_reader_gone():
            raise
        return 128 + signal.SIGPIPE
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except local_ranks.RanksFailed as error:
        print(error, file=sys.stderr)
        return 2 if error.exit_code == 2 else 1


def _settings_meant(words: Sequence[str]) -> str:
    """Return a hint with the settings that unknown options may stand for, or an empty text."""
    meant = [key for word in words if word.startswith("-") for key in settings_like(word)]
    return f" (for a setting, write {'=..., '.join(meant)}=... without dashes)" if meant else ""


def _is_reader_gone() -> bool:
    """Return whether stdout is a pipe without a reader (`... | head`); it is then replaced."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _train(options: argparse.Namespace) -> int:
    if options.dry_run:
        print(start.describe(options.config, options.overrides))
        return 0
    overrides = start.without_overwriting_again(options.overrides)
    if "RANK" in os.environ:
        from megatron_prepo.run import dashboards

        code = start.train_rank(options.config, overrides)
        dashboards.leave_if_closing(code)
        return code
    start.train(options.config, overrides, options.max_restarts)
    return 0


def _resume(options: argparse.Namespace) -> int:
    from megatron_prepo.run import directory as run_directory

    if options.prove:
        return _prove(options)
    directory = options.directory
    run_directory.check_resumable(directory)
    options.config = directory / "config.yaml"
    # the saved configuration may have run.overwrite=true
    given = [f"run.dir={literal(directory)}", "run.overwrite=false"]
    options.overrides, options.dry_run = [*given, *options.overrides], False
    return _train(options)


def _prove(options: argparse.Namespace) -> int:
    from megatron_prepo.debug import resume_check as prove

    run = options.directory
    checks = prove.prove(
        run / "config.yaml" if run.is_dir() else run,
        options.overrides,
        Path(options.dir),
        before=options.steps[0],
        after=options.steps[1],
    )
    print(prove.text(checks))
    return 0 if all(check.equal for check in checks) else 1


def _replay(options: argparse.Namespace) -> int:
    from megatron_prepo.actor.model import check_layout
    from megatron_prepo.debug import replay
    from megatron_prepo.debug.dump import read

    directory, overrides = options.dump, options.overrides
    if "RANK" in os.environ:

        def rank() -> None:
            replay.run(
                directory,
                overrides,
                tolerance=options.tolerance,
                num_tensors=None if options.all else 5,
                write=options.write_gradients,
            )

        return local_ranks.run_rank(rank)
    dump = read(directory, overrides)
    check_layout(dump.config, read_hf_config(dump.config.model.hf))
    this, logs = [sys.executable, "-m", "megatron_prepo"], directory / "logs"
    if not replay.has_gradients(dump) and not options.write_gradients:
        print("the dump has no gradients: one rank computes them first", flush=True)
        first = [*this, "replay", str(directory), *replay.ONE_RANK, "--write-gradients"]
        local_ranks.start(first, 1, logs)
    local_ranks.start([*this, *options.arguments], dump.config.parallel.num_ranks, logs)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from megatron_prepo.demo import demo

    demo(Path(options.dir), options.overrides)
    return 0


def _compare(options: argparse.Namespace) -> int:
    name = options.name or Path(options.dir or options.config).stem
    directory = Path(options.dir or Path("runs") / "compare" / name)
    # the file itself: a link would be replaced by a file, and is another name to lock
    results = Path(os.path.realpath(options.results or directory / "results.jsonl"))
    compare.read_results(results)  # before anything is beside it
    results.parent.mkdir(parents=True, exist_ok=True)
    # two comparisons would each overwrite the results of the other
    with lock.held(results.with_name(f".{results.name}.lock"), str(results)):
        try:
            records = compare.compare(
                options.config,
                options.methods,
                options.seeds,
                directory,
                overrides=options.overrides,
                jobs=options.jobs,
                results=results,
                name=name,
                command=options.command,
                slurm=_slurm(options),
            )
        except compare.RunsFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    for record in records:
        print(compare.one_line(record))
    print(f"records: {results}; next: megatron-prepo report {directory}", file=sys.stderr)
    return 0


def _slurm(options: argparse.Namespace) -> array.Slurm | None:
    """Return the options of Slurm, if it runs the comparison; UserError for ignored options."""
    slurm = array.Slurm(
        account=options.account,
        partition=options.partition,
        time=options.time,
        gpus_per_node=options.gpus_per_node,
        options=tuple(options.sbatch),
    )
    if options.executor == "slurm":
        return slurm
    if slurm != array.Slurm():
        raise UserError(
            "--account, --partition, --time, --gpus-per-node and --sbatch need --executor slurm"
        )
    return None


def _evaluate(options: argparse.Namespace) -> int:
    from megatron_prepo.evaluation import suites, table
    from megatron_prepo.inputs import hub, preflight

    with activity.doing("evaluating"):
        models = [(name, str(hub.model(place))) for name, place in options.model]
        config = suites.load_settings(options.config, models, options.overrides)
        chosen = options.suite or suites.held_out(config.data)
        read = ["reward.function", *([] if options.suite else ["data.eval"])]
        preflight.check_present(config, *read)
        chosen = [(name, hub.data(place)) for name, place in chosen]
        results = suites.evaluate_models(config, models, chosen, Path(options.out))
    print(table.markdown(results), end="")
    print(f"{options.out}: results.json, table.md, completions/", file=sys.stderr)
    return 0


def _report(options: argparse.Namespace) -> int:
    from megatron_prepo.compare import report_page as page

    follow = sys.stdout.isatty() if options.follow is None else options.follow
    with activity.doing("writing the page"):
        page.follow(
            options.sources, options.out, once=not follow, log=lambda line: print(line, flush=True)
        )
    return 0


def _plan(options: argparse.Namespace) -> int:
    from megatron_prepo.inputs import hub, preflight
    from megatron_prepo.plan import layout_search as layouts
    from megatron_prepo.plan import measured_rates as measured
    from megatron_prepo.plan import planner as plan
    from megatron_prepo.plan import text as plan_text

    overrides = options.overrides
    if options.gpus and not any(word.startswith("parallel.data=") for word in overrides):
        overrides = ["parallel.data=", *overrides]  # follows from the GPUs
    config = configuration.load(options.config, overrides)
    preflight.check_present(config, "model.hf")
    config = hub.resolved(config, weights=False)
    question = plan.PlanRequest(
        gpus=options.gpus,
        gpu=options.gpu,
        gpus_per_node=options.gpus_per_node,
        server_nodes=options.server_nodes,
        engine=options.engine,
        engine_tensor=options.engine_tensor,
        prompt_tokens=options.prompt_tokens,
        response_tokens=options.response_tokens,
        eval_prompts=options.eval_prompts,
        rates=measured.read_rates(options.rates) if options.rates else None,
    )
    with activity.doing("trying layouts"):
        answer = plan.make_plan(config, question)
        suggestions = layouts.suggest(config, question)
    print((plan_text.as_json if options.json else plan_text.text)(answer, suggestions))
    return 0 if answer.fits else 1


def _doctor(options: argparse.Namespace) -> int:
    from megatron_prepo.launch import doctor

    config = configuration.load(options.config, options.overrides) if options.config else None
    with activity.doing("checking this machine and the inputs"):
        findings = doctor.examine(config)
    print(doctor.text(findings))
    return 1 if any(finding.state == "missing" for finding in findings) else 0


def _reference(options: argparse.Namespace) -> int:
    from megatron_prepo.config import reference
    from megatron_prepo.run import metrics_table

    print((metrics_table if options.of == "metrics" else reference).markdown(), end="")
    return 0


CONFIG = recipes.find
"""Type of an argument that is the name of a recipe or a YAML file."""
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-prepo",
        description="PREPO (arXiv 2511.00794): RLVR with fewer rollouts, on Megatron-Core.",
    )
    version.add_option(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_demo,
        _add_train,
        _add_resume,
        _add_replay,
        _add_compare,
        _add_evaluate,
        _add_report,
        _add_plan,
        _add_doctor,
        _add_reference,
    ):
        add(commands)
    return parser


def _add_train(commands: "Commands") -> None:
    parser = commands.add_parser("train", help="train with a configuration file")
    parser.add_argument("config", type=CONFIG, help="recipe such as qwen2.5-7b, or YAML file")
    completion.add_overrides(parser)
    _add_restarts(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be started, and what is missing"
    )
    parser.set_defaults(run=_train)


def _add_resume(commands: "Commands") -> None:
    parser = commands.add_parser("resume", help="resume an interrupted run")
    parser.add_argument("directory", type=existing(), metavar="RUN_DIR", help="the run's directory")
    proof = parser.add_argument_group("proof that a resumed run equals an uninterrupted one")
    proof.add_argument(
        "--prove",
        action="store_true",
        help="do not touch the run (a configuration file works, too): kill and resume a short run "
        "with its settings, and compare it with an uninterrupted one; exit code 0 means equal",
    )
    proof.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=(2, 2),
        metavar=("N", "M"),
        help="steps before and after the kill (default: 2 2)",
    )
    proof.add_argument(
        "--dir", default="runs/prove", help="directory of the runs (default: %(default)s)"
    )
    completion.add_overrides(parser)
    _add_restarts(parser)
    parser.set_defaults(run=_resume)


def _add_replay(commands: "Commands") -> None:
    parser = commands.add_parser(
        "replay", help="run the updates of a dumped step again, in any layout (docs/debugging.md)"
    )
    parser.add_argument(
        "dump", type=existing(), help="a directory in a run's dumps/ (debug.dump_steps)"
    )
    parser.add_argument(
        "--tolerance", type=float, help="maximum difference (default: float32 1e-4, bfloat16 0.05)"
    )
    parser.add_argument("--all", action="store_true", help="show all tensors, not only the worst")
    parser.add_argument(
        "--write-gradients",
        action="store_true",
        help="save gradients in the dump for later replays",
    )
    completion.add_overrides(parser)
    parser.set_defaults(run=_replay)


def _add_demo(commands: "Commands") -> None:
    parser = commands.add_parser("demo", help="run the laptop experiment from end to end")
    parser.add_argument("--dir", default="runs/demo", help="directory (default: %(default)s)")
    completion.add_overrides(parser)
    parser.set_defaults(run=_demo)


def _add_compare(commands: "Commands") -> None:
    parser = commands.add_parser(
        "compare", help="train with several methods and seeds on equal terms (docs/compare.md)"
    )
    parser.add_argument("config", type=CONFIG, help="YAML file that all arms share")
    methods = parser.add_argument(
        "--methods",
        required=True,
        help=f"comma-separated: {', '.join(ARMS)}; or your own, such as "
        "'mine:selection.method=prepo;weighting.clamp=2'",
    )
    methods.completer = completion.one_of_list(ARMS)  # type: ignore[attr-defined]
    parser.add_argument("--seeds", default="1-3", help="1,2,3 or 1-5 (default: %(default)s)")
    parser.add_argument("--dir", help="directory of the runs (default: runs/compare/NAME)")
    parser.add_argument("--name", help="name of the comparison (default: from --dir, or CONFIG)")
    parser.add_argument("--results", help="file of the records (default: DIR/results.jsonl)")
    parser.add_argument("--jobs", type=int, help="concurrent runs (default: as many as fit)")
    parser.add_argument(
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="run here, or each run as a job of Slurm (docs/launch.md)",
    )
    slurm = parser.add_argument_group("with --executor slurm")
    slurm.add_argument("--account", help="account")
    slurm.add_argument("--partition", help="partition")
    slurm.add_argument(
        "--time",
        default=array.Slurm.time,
        help="time limit per job of Slurm (default: %(default)s)",
    )
    slurm.add_argument("--gpus-per-node", type=int, default=array.Slurm.gpus_per_node, metavar="N")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="such as --sbatch=--mem=64G"
    )
    completion.add_overrides(parser)
    parser.set_defaults(run=_compare)


def _add_evaluate(commands: "Commands") -> None:
    parser = commands.add_parser(
        "evaluate", help="evaluate models on suites, avg@k and pass@k (docs/evaluation.md)"
    )
    parser.add_argument(
        "--model",
        action="append",
        type=partial(_named_place, kind="model"),
        required=True,
        metavar="[NAME=]DIR",
        help="Hugging Face directory or name, Megatron checkpoint or run; may be repeated",
    )
    parser.add_argument(
        "--suite",
        action="append",
        type=partial(_named_place, kind="dataset"),
        metavar="[NAME=]FILE",
        help="prompts: a file, a folder, a path with *, or a name on the hub; may be repeated "
        "(default: data.eval)",
    )
    parser.add_argument(
        "--out", required=True, help="output directory; existing results are resumed"
    )
    parser.add_argument(
        "--config", type=CONFIG, help="YAML file (default: the one of a run among the models)"
    )
    completion.add_overrides(parser)
    parser.set_defaults(run=_evaluate)


def _add_report(commands: "Commands") -> None:
    parser = commands.add_parser("report", help="write one page of runs and comparisons")
    parser.add_argument(
        "sources",
        type=existing(),
        nargs="+",
        metavar="RUN_OR_RESULTS",
        help="a run's directory, a comparison's directory or its results.jsonl",
    )
    parser.add_argument(
        "--out", default="report.html", help="file of the page (default: %(default)s)"
    )
    parser.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        help="keep the page of a run in progress up to date until the run ends (default: on a "
        "terminal)",
    )
    parser.set_defaults(run=_report)


def _add_plan(commands: "Commands") -> None:
    parser = commands.add_parser(
        "plan", help="estimate memory, seconds and layouts, without a GPU (docs/plan.md)"
    )
    parser.add_argument(
        "config",
        type=CONFIG,
        help="recipe such as qwen2.5-7b, or YAML file; of its model config.json is read",
    )
    machines = parser.add_argument_group("machines")
    machines.add_argument("--gpus", type=int, help="GPUs that train (default: the layout's ranks)")
    machines.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    machines.add_argument(
        "--server-nodes", type=int, metavar="N", help="nodes for SGLang (default: servers.nodes)"
    )
    machines.add_argument(
        "--gpu", default="h100", help="a100, h100, h200 or b200 (default: %(default)s)"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", help="embedded, sglang or elsewhere (default: rollout.engine)")
    engine.add_argument(
        "--engine-tensor",
        type=int,
        metavar="N",
        help="GPUs per SGLang server (default: servers.tensor)",
    )
    measured = parser.add_argument_group("what a run is expected to take")
    measured.add_argument(
        "--prompt-tokens", type=float, metavar="N", help="mean (default: the limit)"
    )
    measured.add_argument(
        "--response-tokens", type=float, metavar="N", help="mean (default: the limit)"
    )
    measured.add_argument(
        "--eval-prompts", type=int, metavar="N", help="per evaluation (default: data.eval's)"
    )
    measured.add_argument(
        "--rates",
        type=existing(),
        metavar="RUN",
        help="directory of a finished run (default: published rates)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    completion.add_overrides(parser)
    parser.set_defaults(run=_plan)


def _add_doctor(commands: "Commands") -> None:
    parser = commands.add_parser(
        "doctor", help="check versions, GPU, disk, ports, and a run's inputs"
    )
    parser.add_argument("config", type=CONFIG, nargs="?", help="recipe or YAML file to check, too")
    completion.add_overrides(parser)
    parser.set_defaults(run=_doctor)


def _add_reference(commands: "Commands") -> None:
    parser = commands.add_parser("reference", help="print all settings, or all metrics")
    parser.add_argument(
        "of", nargs="?", choices=("configuration", "metrics"), default="configuration"
    )
    parser.set_defaults(run=_reference)


def _named_place(word: str, *, kind: Literal["model", "dataset"]) -> tuple[str, str]:
    """Parse NAME=PLACE; the default name is the place's last component, up to a `*`.

    Raises NoSuchPath if nothing is at the place, and it is no name on the hub.
    """
    from megatron_prepo.inputs import hub

    name, equals, place = word.partition("=")
    if not equals:
        name, place = _default_name(word), word
    if hub.Name.of(place, kind) is None and not rows.exists(place):
        existing()(place)
    return name, place


def _default_name(place: str) -> str:
    """Return the name of a model or suite at a place.

    >>> [_default_name(place) for place in ("runs/a/", "b.jsonl", "c/test-*.parquet", "d/*.jsonl")]
    ['a', 'b', 'test', 'd']
    """
    path = Path(place)
    name = path.name if path.exists() else re.split(r"[*?[]", path.name)[0].rstrip("-_.")
    if not name and path != path.parent:
        return _default_name(str(path.parent))
    return name.removesuffix(".jsonl")


def _add_restarts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="resume from the last checkpoint after up to N failures (default: %(default)s)",
    )
