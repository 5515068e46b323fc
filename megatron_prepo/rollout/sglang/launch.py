"""SGLang servers that a run starts: command line, environment and process."""

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from megatron_prepo.config import Config, ServersConfig
from megatron_prepo.errors import UserError, one_line
from megatron_prepo.process import ports
from megatron_prepo.process.local_ranks import MEETING_FILE

HERE = Path(__file__).resolve().parent
STAND_INS = HERE / "on_cpu"
GUARD = str(HERE / "guard.py")
ARGUMENTS_CHECK = HERE / "arguments_check.py"
LAST_LINES = 25
OURS = ("model_path", "host", "port", "tp_size", "tp", "tensor_parallel_size")
"""Arguments that follow from other settings."""
OF_THE_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of the trainer's job, which would mislead a server."""


def check(config: Config) -> None:
    """Raise UserError for an interpreter without SGLang or an invalid setting of `sglang`."""
    refused = [key for key in config.sglang if key.replace("-", "_") in OURS]
    if refused:
        raise UserError(
            f"sglang.{refused[0]} is not passed through: it follows from model.hf, servers.host, "
            "servers.tensor and a free port"
        )
    python = interpreter(config.servers)
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('sglang') is None)"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"servers.python={python} does not run: {error}") from error
    if found.returncode:
        raise UserError(
            f"{python} has no SGLang; name an interpreter that has in servers.python "
            "(`make sglang-cpu` sets one up in .venv-sglang), or running servers in servers.urls"
        )
    # takes seconds, so it runs once, and not again in the ranks
    if config.sglang and os.environ.get("RANK", "0") == "0" and MEETING_FILE not in os.environ:
        _check_arguments(config, python)


def _check_arguments(config: Config, python: str) -> None:
    """Raise UserError unless SGLang's own parser accepts the servers' command line."""
    import torch

    cuda = torch.cuda.is_available()
    words = arguments(config, 0, port=1, cuda=cuda)
    command = [python, "-c", ARGUMENTS_CHECK.read_text(), json.dumps(config.sglang)]
    try:
        done = subprocess.run(
            [*command, json.dumps(words)],
            env=environment(config.servers, 0, cuda=cuda, base=os.environ),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=config.servers.start_seconds,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{python} did not import SGLang within servers.start_seconds="
            f"{config.servers.start_seconds:g}; raise the deadline"
        ) from None
    if done.returncode:
        last = one_line(" ".join(done.stderr.splitlines()[-1:]))
        raise UserError(f"the SGLang of {python} cannot be imported: {last}")
    if mistake := json.loads(done.stdout.splitlines()[-1]):
        raise UserError(one_line(mistake))


def check_host(settings: ServersConfig) -> None:
    """Raise UserError unless this machine, rank 0's, can listen on `servers.host`."""
    host = settings.host
    try:
        ports.try_to_listen(host, 0)
    except OSError as error:
        raise UserError(
            f"servers.host={host} is no address to listen at here: {error.strerror or error}; set "
            "127.0.0.1 for servers of the run, or another address of rank 0's machine"
        ) from error


def check_given(settings: ServersConfig) -> None:
    """Raise UserError, on rank 0, for a server of `servers.urls` that does not respond."""
    if os.environ.get("RANK", "0") != "0":
        return
    for url in settings.urls:
        where = f"{url.rstrip('/')}/health"
        try:
            status = httpx.get(where, timeout=settings.connect_seconds, trust_env=False).status_code
        except httpx.HTTPError as error:
            raise UserError(f"servers.urls: no answer from {where}: {error}") from error
        if status != 200:
            raise UserError(
                f"servers.urls: {where} answers {status}, but a healthy server answers 200"
            )


def interpreter(settings: ServersConfig) -> str:
    """Return the Python interpreter that runs the servers."""
    return settings.python or sys.executable


def fp32_lm_head(config: Config) -> bool | None:
    """Return whether the servers' logits must be float32, as the actor's unless `sglang` differs.

    None for a float32 model, whose logits are not rounded.
    """
    if config.model.dtype == "float32":
        return None
    own = {} if config.servers.urls else config.sglang
    named = {key.replace("-", "_"): value for key, value in own.items()}
    return bool(named.get("enable_fp32_lm_head", config.model.fp32_lm_head))


def arguments(config: Config, index: int, *, port: int, cuda: bool) -> list[str]:
    """Return the arguments of `python -m sglang.launch_server` for the server with this index.

    Weights come from the weight sync only (`load_format: dummy`): a tensor that was not sent would
    stay random and fail the comparison with the actor.
    """
    settings: dict[str, Any] = {
        "model_path": config.model.hf,
        "host": config.servers.host,
        "port": port,
        "tp_size": config.servers.tensor,
        "dtype": config.model.dtype,
        "load_format": "dummy",
        "random_seed": config.train.seed + index,
        "skip_tokenizer_init": not config.rollout.stop,
        "skip_server_warmup": True,
        "enable_fp32_lm_head": bool(fp32_lm_head(config)),
        "enable_return_routed_experts": config.rollout.router_replay,
    }
    if not cuda:
        settings |= {
            "device": "cpu",
            "attention_backend": "torch_native",
            "disable_cuda_graph": True,
            "enable_deterministic_inference": True,
            "max_total_tokens": 65536,
            "sleep_on_idle": True,
        }
    elif config.servers.release_memory:
        settings["enable_memory_saver"] = True
    settings |= {key.replace("-", "_"): value for key, value in config.sglang.items()}
    words = []
    for key, value in settings.items():
        if value is None or value is False:
            continue
        words.append("--" + key.replace("_", "-"))
        if isinstance(value, list):
            words += map(_word, value)
        elif value is not True:
            words.append(_word(value))
    return words


def _word(value: object) -> str:
    """Return a text as it is, and any other value as JSON, which SGLang parses."""
    return value if isinstance(value, str) else json.dumps(value)


def environment(
    servers: ServersConfig, index: int, *, cuda: bool, base: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of the server with this index; `base` is the trainer's.

    Servers use consecutive devices from `servers.first_device` on, as the trainer numbers them.
    Raises UserError if there are too few.
    """
    own = {name: value for name, value in base.items() if name not in OF_THE_RANK}
    tensor = servers.tensor
    if cuda:
        first = servers.first_device + index * tensor
        devices = [str(device) for device in range(first, first + tensor)]
        if visible := base.get("CUDA_VISIBLE_DEVICES"):
            devices = visible.split(",")[first : first + tensor]
        if len(devices) < tensor:
            raise UserError(
                f"server {index} needs {tensor} devices from number {first} on "
                f"(servers.first_device, servers.tensor), and CUDA_VISIBLE_DEVICES={visible}"
            )
        return own | {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STAND_INS), base.get("PYTHONPATH")]))
    own |= {
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": base.get("OMP_NUM_THREADS", "1"),
        # seeded sampling is compiled at first use, which takes a minute
        "TORCH_COMPILE_DISABLE": "1",
    }
    if tensor > 1:  # SGLang then requires the cores of each rank
        cores = os.cpu_count() or 1
        own["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            str((index * tensor + rank) % cores) for rank in range(tensor)
        )
    return own


def start_servers(
    config: Config, log_directory: Path, at_ports: Sequence[int | None], *, cuda: bool
) -> "list[OwnServer]":
    """Start one server per port; at one that is free when it starts where the port is None."""
    return [
        OwnServer(config, index, log_directory, cuda=cuda, port=port)
        for index, port in enumerate(at_ports)
    ]


class OwnServer:
    """A server's process, stopped by `stop`, at exit, and when the trainer is killed."""

    def __init__(
        self,
        config: Config,
        index: int,
        log_directory: Path,
        *,
        cuda: bool,
        port: int | None = None,
    ) -> None:
        """Start the server at a port; None chooses a free one at each start."""
        self.config, self.index, self.cuda, self.port = config, index, cuda, port
        self.log = Path(log_directory) / f"sglang_{index}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        self.start()

    def start(self) -> None:
        """Start or restart it."""
        port = self.port or ports.free_port(self.config.servers.host)
        self.url = ports.url(self.config.servers.host, port)
        python = interpreter(self.config.servers)
        words = arguments(self.config, self.index, port=port, cuda=self.cuda)
        if not {"nccl_port", "nccl-port"} & self.config.sglang.keys():
            # SGLang would choose one that Linux may give away before its ranks listen there
            words += ["--nccl-port", str(ports.free_port())]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [python, GUARD, str(os.getpid()), python, "-m", "sglang.launch_server", *words],
                env=environment(self.config.servers, self.index, cuda=self.cuda, base=os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is for the trainer
            )
        self._finalizer = weakref.finalize(self, _end, self.process)

    def ended(self) -> str | None:
        """Return its exit status and the last lines of its log; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        how = f"code {code}" if code <= 128 else signal.Signals(code - 128).name
        return f"ended with {how}; {self.last_lines()}"

    def last_lines(self) -> str:
        """Return the last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        # SGLang prints all its settings in one line
        return "\n".join([f"the last lines of {self.log}:", *(line[:500] for line in lines)])

    def stop(self) -> None:
        """Stop it and all its processes; does nothing if it has exited."""
        self._finalizer()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
