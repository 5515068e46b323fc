"""SGLang servers of one node, as a task of Slurm on a node of the ranks or on a separate node.

    srun --ntasks-per-node=1 python -m megatron_prepo.launch.servers --servers-a-node=4 CONFIG

They have the same command line as servers that a run starts, listen on all addresses of the node,
and get their weights from the trainer.  A server that exits is restarted, and the run uses it again
after its next weight sync.  The task itself ends when the job does.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# slow imports come after the signal handlers are installed

POLL_SECONDS = 1.0
MAX_STARTS = 5
"""Maximum number of starts per server; one more exit ends the task, and with it the job."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start and monitor the servers; returns the exit code.

    0: the job ends them, or the run is already finished; 1: a server keeps exiting; 2: invalid
    settings.
    """
    # the signal before the time limit is for the ranks; the servers inherit this handler
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    from megatron_prepo import config as configuration
    from megatron_prepo.errors import UserError
    from megatron_prepo.inputs import hub
    from megatron_prepo.launch.rank import parser
    from megatron_prepo.process import slurm as nodes
    from megatron_prepo.rollout.sglang import launch
    from megatron_prepo.run import directory as run_directory

    options = parser().parse_args(arguments)
    nodes.choose_interface(os.environ)
    try:
        config = configuration.load(
            options.config, [*options.overrides, "servers.host=0.0.0.0", "servers.first_device=0"]
        )
        if run_directory.is_finished(config):
            return 0
        config = hub.resolved(config)
        launch.check(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import torch

    logs = Path(config.run.dir) / "logs" / f"node_{os.environ['SLURM_NODEID']}"
    cuda, slurm = torch.cuda.is_available(), os.environ
    ports = [nodes.server_port(slurm, i) for i in range(options.servers_a_node)]
    servers = launch.start_servers(config, logs, ports, cuda=cuda)
    starts = [1] * len(servers)
    while not asked:
        for i, server in enumerate(servers):
            if ended := server.ended():
                print(f"{server.url} {ended}", file=sys.stderr, flush=True)
                if starts[i] == MAX_STARTS:
                    return 1
                server.start()
                starts[i] += 1
        time.sleep(POLL_SECONDS)
    for server in servers:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
