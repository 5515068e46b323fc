"""Check of this machine for a run, with a remedy for each problem: `megatron-prepo doctor`.

Packages are imported, since a build for another CUDA or torch fails only then.  Nothing is started,
written or downloaded.  The requirements depend on the run: without a configuration they are torch,
megatron-core and transformers.
"""

import dataclasses
import errno
import importlib
import importlib.util
import os
import shutil
import socket
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_prepo import internals
from megatron_prepo.config import CheckpointConfig, Config, RunConfig, ServersConfig
from megatron_prepo.errors import UserError
from megatron_prepo.files import rows
from megatron_prepo.launch import versions
from megatron_prepo.process import ports
from megatron_prepo.process import slurm as nodes
from megatron_prepo.records import Prompt
from megatron_prepo.rollout import placement
from megatron_prepo.rollout.placement import Placement
from megatron_prepo.run import best, dashboards

GIB = 2**30
WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """A row of the table."""

    what: str
    state: Literal["ok", "note", "missing"]
    """`missing`: the run cannot start; `note`: it can, but something may need attention."""
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Package:
    """A package to import."""

    module: str
    distributions: tuple[str, ...]
    """Names of its distributions; the first installed one gives the version."""
    remedy: str


PACKAGES = {
    "torch": Package("torch", ("torch",), "pip install torch, the build for your CUDA"),
    "megatron-core": Package(
        "megatron.core", ("megatron-core",), "pip install -c constraints.txt -e ."
    ),
    "transformers": Package(
        "transformers", ("transformers",), "pip install -c constraints.txt -e ."
    ),
    "TransformerEngine": Package(
        "transformer_engine.pytorch",
        ("transformer-engine", "transformer_engine"),
        'pip install -e ".[te]" --no-build-isolation (needs nvcc), or set model.layers=torch',
    ),
    "apex": Package("apex", ("apex",), "optional: fuses weight gradients; build it from source"),
    "SGLang": Package("sglang", ("sglang",), 'pip install -e ".[sglang]"'),
    "math-verify": Package(
        "math_verify",
        ("math-verify",),
        "pip install -c constraints.txt -e . (reward.function=math)",
    ),
    "TensorBoard": Package(
        "torch.utils.tensorboard",
        ("tensorboard",),
        'pip install -e ".[tensorboard]", or remove run.tensorboard',
    ),
    "Weights & Biases": Package(
        "wandb", ("wandb",), 'pip install -e ".[wandb]", or remove run.wandb_project'
    ),
    "MLflow": Package(
        "mlflow",
        ("mlflow", "mlflow-skinny"),
        'pip install -e ".[mlflow]", or remove run.mlflow_experiment',
    ),
    "SwanLab": Package(
        "swanlab", ("swanlab",), 'pip install -e ".[swanlab]", or remove run.swanlab_project'
    ),
    "Trackio": Package(
        "trackio", ("trackio",), 'pip install -e ".[trackio]", or remove run.trackio_project'
    ),
    "NeMo-Run": Package(
        "nemo_run", ("nemo_run",), 'pip install -e ".[launch]", only where you launch from'
    ),
}


def examine(config: Config | None = None) -> list[Finding]:
    """Examine the machine and, given a configuration, the requirements of its run."""
    needed = _needed(config)
    findings = [_python()]
    findings += [_package(name, package, name in needed) for name, package in PACKAGES.items()]
    findings += [*_versions(), *_internals(), *_gpus(config), _shared_memory(), _port()]
    if config and config.rollout.engine == "sglang":
        findings += _servers_here(config)
        distributed = config.weight_sync.transport == "distributed"
        findings += [_weight_sync(config)] if distributed else []
    if config:
        findings += _dashboards(config.run)
    return findings + (examine_inputs(config) if config else [])


def _needed(config: Config | None) -> set[str]:
    """Return the names of the PACKAGES that the run requires."""
    needed = {"torch", "megatron-core", "transformers"}
    if config:
        asked = {
            "TransformerEngine": config.model.layers == "te",
            "SGLang": config.rollout.engine == "sglang" and not _servers_are_apart(config),
            "math-verify": config.reward.function == "math",
        }
        needed |= {name for name, wanted in asked.items() if wanted}
        needed |= dashboards.wanted(config.run).keys()
    return needed


def text(findings: Sequence[Finding]) -> str:
    """Format the table, at most 100 columns wide, with remedies below the rows."""
    lines = []
    for finding in findings:
        lines += textwrap.wrap(
            f"{finding.state:<8}{finding.what:<18} {finding.found}",
            WIDTH,
            subsequent_indent=" " * 27,
        )
        if finding.state != "ok" and finding.remedy:
            lines += textwrap.wrap(
                f"{' ' * 27}-> {finding.remedy}", WIDTH, subsequent_indent=" " * 30
            )
    missing = sum(finding.state == "missing" for finding in findings)
    lines += ["", f"{missing} missing" if missing else "nothing that is needed is missing"]
    return "\n".join(lines)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info < (3, 14):
        return Finding("Python", "ok", version)
    return Finding("Python", "missing", version, "use Python 3.10 to 3.13")


def _package(name: str, package: Package, needed: bool) -> Finding:
    absent: Literal["missing", "note"] = "missing" if needed else "note"
    try:
        importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        if error.name and package.module.split(".")[0] == error.name.split(".")[0]:
            return Finding(name, absent, "not installed", package.remedy)
        return Finding(name, absent, f"import fails: {error}", package.remedy)
    except (ImportError, OSError) as error:  # a library for another CUDA or torch, or a missing one
        return Finding(name, absent, f"import fails: {error}", package.remedy)
    return Finding(name, "ok", _version(package))


def _internals() -> list[Finding]:
    """Find internals that actor and engine replace and an installed release has changed."""
    remedy = "pip install -c constraints.txt -e ."
    try:
        for module in ("megatron_prepo.actor.actor", "megatron_prepo.rollout.transformers_engine"):
            importlib.import_module(module)
    except UserError as error:
        return [Finding("internals", "missing", str(error), remedy)]
    except ImportError as error:  # a library that is not installed has a row already
        changed = internals.explain(error)
        return [Finding("internals", "missing", str(changed), remedy)] if changed else []
    return []


def _versions() -> list[Finding]:
    """Find installed versions that are incompatible with ours or with each other."""
    wrong = [Finding("versions", "missing", *problem) for problem in versions.problems()]
    return wrong or [Finding("versions", "ok", "compatible")]


def _version(package: Package) -> str:
    for distribution in package.distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "version unknown"


def _gpus(config: Config | None) -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        wants = config is not None and (
            config.model.layers == "te" or config.servers.release_memory
        )
        built = torch.version.cuda or "none"
        return [
            Finding(
                "GPU",
                "missing" if wants else "note",
                f"none visible to torch (torch built for CUDA {built}); runs on the CPU",
                "install the driver and torch's build for its CUDA, or run this on the GPU machine",
            )
        ]
    count, properties = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    free, total = torch.cuda.mem_get_info(0)
    findings = [
        Finding("GPU", "ok", f"{count} x {properties.name}, {total / GIB:.0f} GiB"),
        Finding("NCCL", "ok", nccl),
    ]
    if free < 0.9 * total:
        findings.append(
            Finding(
                "GPU memory",
                "note",
                f"{free / GIB:.0f} of {total / GIB:.0f} GiB free on the first",
                "another process uses it: see nvidia-smi",
            )
        )
    if config and config.parallel.tensor > count:
        findings.append(
            Finding(
                "tensor parallelism",
                "note",
                f"parallel.tensor={config.parallel.tensor} over machines of {count} GPUs",
                "its all-reduces leave NVLink; lower parallel.tensor",
            )
        )
    return findings


def _enough_gpus(where: Placement) -> list[Finding]:
    """Compare the GPUs of this machine, if it has any, with those that a node of the run needs."""
    import torch

    count, needed = torch.cuda.device_count(), where.gpus_per_node
    if not count or needed <= count:
        return []
    return [
        Finding(
            "GPUs per node",
            "note",
            f"{count} here, and {needed} are needed by ranks and engines of a node",
            "use nodes with more GPUs, or launch with --gpus-per-node",
        )
    ]


def _describe_placement(where: Placement) -> str:
    return (
        f"{where.ranks} rank{'s' * (where.ranks > 1)} on {where.nodes} "
        f"node{'s' * (where.nodes > 1)}; engines: {where.engines_in_words}"
    )


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("shared memory", "note", "no /dev/shm")
    size = shutil.disk_usage(path).total
    found = f"/dev/shm of {size / GIB:.1f} GiB"
    if size >= GIB:
        return Finding("shared memory", "ok", found)
    return Finding("shared memory", "note", found, "NCCL may fail: docker run --shm-size=16g")


def _port() -> Finding:
    """Check the rendezvous port of torchrun; in a Slurm job, all ports that `launch` uses."""
    if "SLURM_JOB_ID" in os.environ:
        own = nodes.ports(os.environ)
        for port in own:
            if trouble := _trouble("", port):
                remedy = (
                    "ports depend on the job's number: submit it again, or stop the other process"
                )
                return Finding("ports", "missing", f"{port} is {trouble}", remedy)
        return Finding("ports", "ok", f"{own[0]} to {own[-1]}, this job's, are free")
    port = int(os.environ.get("MASTER_PORT", "29500"))
    if trouble := _trouble("", port):
        remedy = "torchrun --master-port another, or set MASTER_PORT"
        return Finding("port", "note", f"{port} is {trouble}", remedy)
    return Finding("port", "ok", f"{port} is free")


def _trouble(host: str, port: int) -> str | None:
    """Return why no program can listen on the port; None if one can."""
    try:
        ports.try_to_listen(host, port)
    except OSError as error:
        return "taken" if error.errno == errno.EADDRINUSE else error.strerror
    return None


def _place_here(config: Config) -> Placement:
    import torch

    where = placement.place_here(config)
    if torch.cuda.is_available():
        placement.check_transport(config.weight_sync.transport, where)
    return where


def _servers_here(config: Config) -> list[Finding]:
    """Check what servers that the run starts here, or their connections, take of this machine."""
    import torch

    servers, ranks = config.servers, config.parallel.num_ranks
    if servers.urls:
        return [_open_files(servers, len(servers.urls))]
    if servers.nodes:
        return []
    try:
        count = placement.servers_here(servers, cuda=torch.cuda.is_available(), ranks=ranks)
    except UserError as error:
        return [Finding("servers", "missing", str(error))]
    return [_open_files(servers, count), _server_ports(servers.host, count)]


def _server_ports(host: str, count: int) -> Finding:
    """Check that free ports exist: each server of the run takes one when it starts."""
    if trouble := _trouble(host, 0):
        found = f"servers.host={host} is not an address of this machine: {trouble}"
        remedy = "use 127.0.0.1, or another address of this machine"
        return Finding("server ports", "missing", found, remedy)
    return Finding("server ports", "ok", f"{count} free at {host}")


def _open_files(servers: ServersConfig, count: int) -> Finding:
    """Check that the limit of open files allows a connection per concurrent completion."""
    from megatron_prepo.rollout.sglang import open_files

    try:
        open_files.make_room(servers, count)
    except UserError as error:
        return Finding("open files", "missing", str(error))
    return Finding("open files", "ok", f"room for {servers.concurrency:,} per server")


def _weight_sync(config: Config) -> Finding:
    """Check that servers could reach a rank 0 on this machine by `weight_sync.address`."""
    address = config.weight_sync.address
    hosts = {urlsplit(url).hostname for url in config.servers.urls}
    remedy = "set weight_sync.address to an address at which the servers reach this machine"
    if _is_here(address) and not all(map(_is_here, hosts)):
        found = (
            f"servers at {', '.join(sorted(map(str, hosts)))} would look for rank 0 on themselves: "
        )
        found += f"weight_sync.address={address}"
        return Finding("weight sync", "missing", found, remedy)
    both = socket.has_dualstack_ipv6()  # as torch's store does
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=both) as store:
        where = (address, store.getsockname()[1])
        try:
            socket.create_connection(where, timeout=config.servers.connect_seconds).close()
        except OSError as error:
            found = f"this machine is not reachable at weight_sync.address={address}: {error}"
            return Finding("weight sync", "missing", found, remedy)
    return Finding("weight sync", "ok", f"rank 0 answers at {address}")


def _dashboards(run: RunConfig) -> list[Finding]:
    """Check the logins of the dashboards, if all are installed."""
    found, wanted = _Findings(), dashboards.wanted(run)
    if wanted and all(importlib.util.find_spec(kind.package) for kind in wanted.values()):
        found.look("dashboards", lambda: dashboards.check(run), lambda _: ", ".join(wanted))
    return found


def _is_here(host: str | None) -> bool:
    """Return whether the name stands for the local machine, on every machine."""
    return host in ("localhost", "127.0.0.1", "::1")


class _Findings(list[Finding]):
    """A list of findings; `look` adds one."""

    def look(
        self,
        what: str,
        check: Callable[[], Any],
        found: Callable[[Any], str] = lambda _: "",
        remedy: str = "",
    ) -> Any:
        """Return the result of `check` and add a finding; None if it raises UserError."""
        try:
            result = check()
        except UserError as error:
            self.append(Finding(what, "missing", str(error), remedy))
            return None
        self.append(Finding(what, "ok", found(result)))
        return result


WHOLE_MODEL = "model.hf=DIR, the complete model from Hugging Face (`hf download NAME`)"


def examine_inputs(config: Config, where: Placement | None = None) -> list[Finding]:
    """Check the inputs of a run; checks that need an input that is invalid are skipped.

    The machine is not examined, except its disk: a login node, which runs nothing, uses this, too.
    `where`: a job's placement, which has been checked; default: on this machine.
    """
    from megatron_prepo.inputs import hub, preflight
    from megatron_prepo.models.hf_config import read_hf_config
    from megatron_prepo.rewards import pool
    from megatron_prepo.run import directory as run_directory

    findings = _Findings()
    if names := hub.names(config.model, config.data):
        found = findings.look("hub", lambda: hub.resolved(config), lambda _: ", ".join(names))
        config = found or config
    hf = findings.look(
        "model",
        lambda: read_hf_config(config.model.hf),
        lambda hf: f"{hf['model_type']}, {hf['num_hidden_layers']} layers of {hf['hidden_size']}",
    )
    if hf:
        _examine_model(findings, config, hf)
    where = where or findings.look("placement", lambda: _place_here(config), _describe_placement)
    findings += _enough_gpus(where) if where else []
    tokenizer = _examine_tokenizer(findings, config, hf)
    takes = findings.look(
        "reward", lambda: pool.check(config.reward), lambda _: config.reward.function
    )
    _examine_prompts(findings, config, tokenizer, needs_answer="answer" in (takes or ()))
    if config.selection.is_custom:
        findings.look(
            "selector",
            lambda: preflight.check_selector(config),
            lambda _: config.selection.method,
        )
    if metric := config.checkpoint.keep_best:
        sections = (config.checkpoint, config.eval, config.data, config.selection)
        findings.look("best checkpoint", lambda: best.check(*sections), lambda _: metric)
    if config.rollout.engine == "sglang" and _servers_are_apart(config):
        _examine_servers(findings, config)
    findings.look("run.dir", lambda: run_directory.check(config), lambda _: config.run.dir)
    findings.append(_disk(config, hf))
    return findings


def _examine_model(findings: _Findings, config: Config, hf: dict[str, Any]) -> None:
    from megatron_prepo.actor import tiny_instance
    from megatron_prepo.actor.model import check_layout, transformer_config
    from megatron_prepo.inputs.preflight import most_tokens

    parallel = config.parallel
    # TransformerEngine has a separate row
    torch_native = dataclasses.replace(config.model, layers="torch")

    def split() -> None:
        check_layout(config, hf)
        transformer_config(hf, torch_native, parallel, config.megatron)

    findings.look(
        "layout",
        split,
        lambda _: (
            f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
            + (f" x context {parallel.context}" if parallel.context > 1 else "")
        ),
    )
    findings.look(
        "logits",
        lambda: tiny_instance.check(config.model.hf),
        lambda d: f"a tiny model with these settings differs from transformers by {d.ours:.0e}",
    )
    limit, of_what = most_tokens(config.rollout, hf)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    findings.append(
        Finding(
            "length",
            "ok" if longest <= limit else "note",
            f"up to {longest:,} tokens of the model's {limit:,} {of_what}",
            "such prompts would be rejected: lower data.max_prompt_tokens or max_new_tokens",
        )
    )
    findings.look(
        "weights",
        lambda: _check_weights(config, hf),
        lambda _: _weights(config),
        "" if config.model.megatron else WHOLE_MODEL,
    )


def _examine_tokenizer(findings: _Findings, config: Config, hf: dict[str, Any] | None) -> Any:
    from megatron_prepo.inputs import preflight
    from megatron_prepo.rollout.stopping import unused_end_token

    tokenizer = findings.look(
        "tokenizer",
        lambda: preflight.read_tokenizer(config.model.hf),
        lambda tokenizer: f"{len(tokenizer):,} tokens",
        WHOLE_MODEL,
    )
    if tokenizer and hf:
        stops = findings.look(
            "stop tokens",
            lambda: preflight.check_stop_tokens(config.model.hf, hf, tokenizer, config.rollout),
            lambda tokens: ", ".join(map(str, sorted(tokens))),
        )
        if stops and (unused := unused_end_token(stops, tokenizer)):
            findings.append(Finding("end token", "note", *unused))
    if tokenizer and hf and len(tokenizer) > hf["vocab_size"]:
        findings.append(
            Finding(
                "vocabulary",
                "note",
                f"the tokenizer has {len(tokenizer):,} tokens, the model {hf['vocab_size']:,}",
                "check that it is this model's tokenizer",
            )
        )
    return tokenizer


def _examine_prompts(
    findings: _Findings, config: Config, tokenizer: Any, *, needs_answer: bool
) -> None:
    from megatron_prepo.inputs import preflight

    load = partial(preflight.load_prompts, config.data, config.run, needs_answer=needs_answer)
    prompts = {"data.train": config.data.train, **config.data.eval_settings}
    shots = {"data.few_shot": config.data.few_shot} if config.data.few_shot else {}
    absent = [name for name, file in prompts.items() if not rows.exists(file)]
    absent += [name for name, file in shots.items() if not Path(file).is_file()]
    for name in absent:
        remedy = f"{name}=FILE; tools/data/prepare.py creates such files (docs/data.md)"
        file = (shots | prompts)[name]
        findings.append(Finding(name, "missing", f"no such file: {file}", remedy))
    for name, file in prompts.items():
        if tokenizer and name not in absent and not shots.keys() & absent:
            dropped: list[str] = []
            findings.look(
                name,
                partial(load, tokenizer, file, dropped),
                partial(_describe_prompts, dropped),
            )


def _describe_prompts(dropped: list[str], prompts: list[Prompt]) -> str:
    too_long = f", {len(dropped):,} too long and dropped" if dropped else ""
    return f"{len(prompts):,} prompts{too_long}"


def _examine_servers(findings: _Findings, config: Config) -> None:
    from megatron_prepo.rollout.sglang import launch

    given = config.servers.urls
    findings.look(
        "servers",
        lambda: launch.check_given(config.servers) if given else launch.check(config),
        lambda _: ", ".join(given) or f"SGLang in {config.servers.python}",
    )


def _servers_are_apart(config: Config) -> bool:
    """Return whether SGLang runs outside of the trainer's environment."""
    return bool(config.servers.urls or config.servers.python)


def _check_weights(config: Config, hf: dict[str, Any]) -> None:
    """Raise UserError unless the run can read its weights and the files that it exports."""
    from megatron_prepo.inputs import preflight
    from megatron_prepo.models.hf_files import other_files
    from megatron_prepo.run import directory as run_directory

    other_files(config.model.hf)
    if run_directory.needs_initial_weights(config):
        preflight.check_weights(config.model, hf)


def _weights(config: Config) -> str:
    from megatron_prepo.run import directory as run_directory

    if not run_directory.needs_initial_weights(config):
        return "in the run's own checkpoint"
    return f"{_weight_bytes(config) / GIB:.1f} GiB in {config.model.megatron or config.model.hf}"


def _weight_bytes(config: Config) -> int:
    folder = Path(config.model.megatron or config.model.hf)
    kinds = ("*.distcp",) if config.model.megatron else ("*.safetensors",)
    return sum(path.stat().st_size for kind in kinds for path in folder.rglob(kind))


def _disk(config: Config, hf: dict[str, Any] | None) -> Finding:
    """Check disk space for checkpoints and exports, by the size of the weights.

    `hf`: the model's settings, which determine the size of adapters; None if they are invalid.
    """
    from megatron_prepo.models.shape import Shape
    from megatron_prepo.plan.memory import adapter_parameters

    folder = Path(config.run.dir)
    while not folder.exists():
        folder = folder.parent
    free, weights = shutil.disk_usage(folder).free, _weight_bytes(config)
    # the weights are bfloat16, and Adam's state takes 12 bytes per trained parameter
    adapters = adapter_parameters(Shape.of(hf), config.lora) if hf else 0
    trained = adapters if config.lora.rank else weights // 2
    state = 12 * trained if config.checkpoint.optimizer else 0
    kept = _checkpoints_at_once(config.checkpoint)
    wanted = kept * state + (kept + 1) * (weights + 2 * adapters)
    found = f"{free / GIB:.0f} GiB free at {folder}"
    if not weights:
        return Finding("disk", "ok", found)
    found += f"; {kept} checkpoint{'s' * (kept > 1)} and the exported model take about "
    found += f"{wanted / GIB:.1f} GiB"
    if free > wanted:
        return Finding("disk", "ok", found)
    return Finding(
        "disk", "missing", found, "choose another run.dir, or checkpoint.optimizer=false"
    )


def _checkpoints_at_once(settings: CheckpointConfig) -> int:
    """Return the checkpoints on disk while one is written; of those kept for good, one."""
    best = 1 if settings.keep_best else 0
    if settings.every == 0 and settings.every_minutes is None:
        return 1 + best
    kept = settings.keep_last or (2 if settings.every is None else 1)
    return kept + 1 + best
