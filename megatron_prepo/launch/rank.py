"""One training rank as a task of Slurm: `srun python -m megatron_prepo.launch.rank CONFIG`.

It translates Slurm's environment into torchrun's, waits for the job's SGLang servers if there are
any, and trains.  A finished run is not modified, so that jobs can be queued in sequence.  A run
that was stopped before the time limit is not a failure either, whether it was saved, had not
started or ran out of time to save: otherwise `srun` would kill the ranks that have not exited yet,
and a script would not requeue the job.  The run is finished if its directory has `summary.json`.

Exit code 0: see above; 69: a machine of the job does not respond (`peers.py`); otherwise the exit
code of the training.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prepo.process import stop_signals as stop

# slow imports come after the signal handlers are installed
if TYPE_CHECKING:
    from megatron_prepo.config import Config
    from megatron_prepo.launch import peers

POLL_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as one task of Slurm; returns the exit code (see above)."""
    stop.leave_when_asked(0)
    from megatron_prepo import config as configuration
    from megatron_prepo.errors import UserError
    from megatron_prepo.launch import peers
    from megatron_prepo.process import slurm as nodes
    from megatron_prepo.run import directory as run_directory

    options = parser().parse_args(arguments)
    try:
        os.environ.update(nodes.rank_environment(os.environ))
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
        nodes.choose_interface(os.environ)
        config = configuration.load(options.config, options.overrides)
        if run_directory.is_finished(config):
            if os.environ["SLURM_PROCID"] == "0":
                print(f"run.dir={config.run.dir} contains a finished run: nothing to do")
            return 0
        sign_of_life = peers.listen()
        overrides, urls = [*options.overrides], []
        if options.servers_a_node:
            urls = server_urls(options.server_nodes, options.servers_a_node)
            wait_for(urls, config)
            overrides += given_servers(urls, os.environ["MASTER_ADDR"])
    except UserError as error:
        if os.environ.get("SLURM_LOCALID", "0") == "0":  # all ranks of a node have the same error
            print(f"error: {error}", file=sys.stderr)
        return 2
    code = train(options.config, overrides)
    if code == 1:
        code = name_the_lost([*peers.ranks(), *map(server, urls)])
    if sign_of_life:
        sign_of_life.close()
    return code


def train(path: str, overrides: Sequence[str]) -> int:
    """Train and return the exit code, which is 0 if the run was stopped by a signal."""
    from megatron_prepo.launch import start
    from megatron_prepo.process.local_ranks import STOPPED_EXIT_CODE

    code = start.train_rank(path, start.without_overwriting_again(overrides))
    stopped = code == STOPPED_EXIT_CODE or (code == 1 and stop.overdue())
    return 0 if stopped else code


def name_the_lost(known: "Sequence[peers.Peer]") -> int:
    """Print the ranks and servers of the job that are not reachable, and return the exit code.

    The error of this rank may be a consequence of a lost peer, and does not name it.
    """
    from megatron_prepo.launch import peers

    found = peers.lost(known)
    for lost in found:
        print(f"rank {os.environ['SLURM_PROCID']}: {lost}", file=sys.stderr)
    return peers.UNREACHABLE_EXIT_CODE if any(lost.machine for lost in found) else 1


def server_urls(server_nodes: int, servers_a_node: int) -> list[str]:
    """Return the servers on the last `server_nodes` nodes of the job; 0: on all nodes."""
    from megatron_prepo.process import slurm as nodes

    hosts = nodes.hosts(os.environ["SLURM_JOB_NODELIST"])[-server_nodes:]
    ports = [nodes.server_port(os.environ, i) for i in range(servers_a_node)]
    return [f"http://{host}:{port}" for host in hosts for port in ports]


def given_servers(urls: Sequence[str], address: str) -> list[str]:
    """Return the overrides with which ranks use the job's servers; `address` is rank 0's."""
    return [
        "servers.nodes=0",  # a run with servers starts none
        f"servers.urls=[{','.join(urls)}]",
        f"weight_sync.address={address}",
    ]


def server(url: str) -> "peers.Peer":
    """Return the server at this address as a peer."""
    from megatron_prepo.launch import peers

    host, _, port = url.removeprefix("http://").rpartition(":")
    return peers.Peer(f"the SGLang server {url}", host, int(port))


def wait_for(urls: Sequence[str], config: "Config") -> None:
    """Wait until all servers are healthy; raises UserError naming those that miss the deadline."""
    from megatron_prepo.errors import UserError

    deadline = time.monotonic() + config.servers.start_seconds
    waiting = list(urls)
    while waiting := [url for url in waiting if not healthy(url, config)]:
        if time.monotonic() > deadline:
            raise UserError(
                f"no SGLang server at {', '.join(waiting)} within servers.start_seconds="
                f"{config.servers.start_seconds:g}; {where_they_log(config)}"
            )
        time.sleep(POLL_SECONDS)


def where_they_log(config: "Config") -> str:
    """Return a hint where to find the reason why a server of the job did not start."""
    logs = Path(config.run.dir) / "logs"
    if any(logs.glob("node_*/*")):
        return f"see {logs}/node_*"
    return "no server was started: see the output of the job's server step"


def healthy(url: str, config: "Config") -> bool:
    """Return whether the server reports that it is healthy."""
    import httpx

    try:
        answer = httpx.get(f"{url}/health", timeout=config.servers.connect_seconds, trust_env=False)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options that ranks and servers of a job share."""
    from megatron_prepo.process import version

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    version.add_option(parser)
    parser.add_argument("--servers-a-node", type=int, default=0, help="SGLang servers per node")
    parser.add_argument(
        "--server-nodes",
        type=int,
        default=0,
        help="number of nodes with servers, the last ones of the job; 0: all",
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def leave(code: int) -> None:
    """Exit the process; after a failure immediately.

    Threads of gloo and NCCL may otherwise wait for lost ranks until Slurm kills this one too, and
    its exit code is lost.
    """
    if code == 0:
        from megatron_prepo.run import dashboards

        dashboards.leave_if_closing(code)
        sys.exit()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
