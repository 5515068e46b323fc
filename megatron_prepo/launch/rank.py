"""One rank of the training, as a task of Slurm: `srun python -m megatron_prepo.launch.rank CONFIG`.

It translates Slurm's environment into torchrun's, waits for the job's SGLang servers if there are
any, and trains.  A run that is finished already is left alone, so that jobs can be queued one
behind the other.  One that was saved before the time limit is no failure either: `srun` would kill
the ranks that have not left yet.  Whether the run has ended is in its directory: `summary.json`.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

import httpx

from megatron_prepo import cli, run_directory
from megatron_prepo import config as configuration
from megatron_prepo.config import Config
from megatron_prepo.errors import UserError
from megatron_prepo.launch import nodes
from megatron_prepo.local_ranks import STOPPED_EXIT_CODE

POLL_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the run ended, now or earlier, or was saved to go on; else the training's exit code."""
    options = parser().parse_args(arguments)
    says = os.environ.get("SLURM_PROCID", "0") == "0"
    try:
        os.environ.update(nodes.rank_environment(os.environ))
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
        config = configuration.load(options.config, options.overrides)
        if run_directory.is_finished(config):
            if says:
                print(f"run.dir={config.run.dir} holds a finished run: nothing to do")
            return 0
        overrides = [*options.overrides]
        if options.servers_a_node:
            urls = server_urls(options.server_nodes, options.servers_a_node)
            wait_for(urls, config)
            overrides += [
                f"servers.urls=[{','.join(urls)}]",
                f"weight_sync.address={os.environ['MASTER_ADDR']}",
            ]
    except UserError as error:
        if says:
            print(f"error: {error}", file=sys.stderr)
        return 2
    code = cli.main(["train", options.config, *overrides])
    return 0 if code == STOPPED_EXIT_CODE else code


def server_urls(server_nodes: int, servers_a_node: int) -> list[str]:
    """The servers on the last so many nodes of the job; 0: on all."""
    hosts = nodes.hosts(os.environ["SLURM_JOB_NODELIST"])[-server_nodes:]
    ports = [nodes.server_port(os.environ, i) for i in range(servers_a_node)]
    return [f"http://{host}:{port}" for host in hosts for port in ports]


def wait_for(urls: Sequence[str], config: Config) -> None:
    """Until all servers are healthy; UserError that names those which are not by the deadline."""
    deadline = time.monotonic() + config.servers.start_seconds
    waiting = list(urls)
    while waiting := [url for url in waiting if not healthy(url, config)]:
        if time.monotonic() > deadline:
            raise UserError(
                f"no SGLang server at {', '.join(waiting)} within servers.start_seconds="
                f"{config.servers.start_seconds:g}; see {config.run.dir}/logs/node_*"
            )
        time.sleep(POLL_SECONDS)


def healthy(url: str, config: Config) -> bool:
    """Whether the server answers that it is well."""
    try:
        answer = httpx.get(f"{url}/health", timeout=config.servers.connect_seconds, trust_env=False)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


def parser() -> argparse.ArgumentParser:
    """The options that ranks and servers of a job have in common."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers-a-node", type=int, default=0, help="SGLang servers of a node")
    parser.add_argument(
        "--server-nodes", type=int, default=0, help="the last so many nodes have them; 0: all"
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
