"""The SGLang servers of one node, as a task of Slurm beside the ranks or on a node of its own.

    srun --ntasks-per-node=1 python -m megatron_prepo.launch.servers --servers-a-node=4 CONFIG

They have the command line that servers of a run have, listen on all the node's addresses, and get
their weights from the trainer.  One that ends is started anew, and taken back by the run at its
next weight sync.  The task itself ends when the job does.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# what takes long to import comes after the signals are listened to

POLL_SECONDS = 1.0
MAX_STARTS = 5
"""Of one server; one that ends so often ends the task, and with it the job."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start them and watch them; 0 when the job ends them, or the run is finished already; 1 if
    one does not stay."""
    # the signal before the time limit is for the ranks; the servers inherit that it is ignored
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    from megatron_prepo import config as configuration
    from megatron_prepo.errors import UserError
    from megatron_prepo.launch.rank import parser
    from megatron_prepo.process import slurm as nodes
    from megatron_prepo.rollout.sglang.launch import OwnServer, check
    from megatron_prepo.run import directory as run_directory

    options = parser().parse_args(arguments)
    nodes.choose_interface(os.environ)
    try:
        config = configuration.load(
            options.config, [*options.overrides, "servers.host=0.0.0.0", "servers.first_device=0"]
        )
        if run_directory.is_finished(config):
            return 0
        check(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import torch

    logs = Path(config.run.dir) / "logs" / f"node_{os.environ['SLURM_NODEID']}"
    cuda, slurm = torch.cuda.is_available(), os.environ
    servers = [
        OwnServer(config, i, logs, cuda=cuda, port=nodes.server_port(slurm, i))
        for i in range(options.servers_a_node)
    ]
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
