"""The command `megatron-prepo`.

megatron-prepo demo                              the laptop experiment, in runs/demo
megatron-prepo train CONFIG [key=value ...]      a run; under torchrun, one of its ranks
megatron-prepo reference                         the configuration reference, in Markdown
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prepo import config as configuration
from megatron_prepo import local_ranks
from megatron_prepo.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 for a failed run, 2 for something that the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except local_ranks.RanksFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def train_command(path: str, overrides: Sequence[str]) -> None:
    """Check the configuration and its inputs, start the ranks, wait for them."""
    from megatron_prepo import preflight
    from megatron_prepo.run import check_free

    config = configuration.load(path, overrides)
    check_free(config)
    preflight.check(config)
    parallel = config.parallel
    local_ranks.start(
        [sys.executable, "-m", "megatron_prepo", "train", str(path), *overrides],
        num_ranks=parallel.tensor * parallel.pipeline * (parallel.data or parallel.smallest_data),
        log_directory=Path(config.run.dir) / "logs",
    )


def _train(options: argparse.Namespace) -> int:
    if "RANK" not in os.environ:
        train_command(options.config, options.overrides)
        return 0

    def as_rank() -> None:
        from megatron_prepo import report
        from megatron_prepo.train import train

        summary = train(configuration.load(options.config, options.overrides))
        if os.environ["RANK"] == "0":
            print(report.text(summary))

    return local_ranks.run_rank(as_rank)


def _demo(options: argparse.Namespace) -> int:
    from megatron_prepo.demo import demo

    demo(Path(options.dir), options.overrides)
    return 0


def _reference(options: argparse.Namespace) -> int:
    print(configuration.reference(), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-prepo",
        description="PREPO (arXiv 2511.00794): RLVR with fewer rollouts, on Megatron-Core.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train as a configuration file says")
    train.add_argument("config", help="YAML file, such as examples/laptop/prepo.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    train.set_defaults(run=_train)
    demo = commands.add_parser("demo", help="the laptop experiment from end to end")
    demo.add_argument("--dir", default="runs/demo", help="where it goes (default: %(default)s)")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    demo.set_defaults(run=_demo)
    reference = commands.add_parser("reference", help="print the configuration reference")
    reference.set_defaults(run=_reference)
    return parser
