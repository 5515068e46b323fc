"""What a run tells its user: at its start what it is about to do, at its end what to do next."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_prepo.config import CheckpointConfig, Config, DataConfig, LoraConfig, ParallelConfig
from megatron_prepo.records import Prompt
from megatron_prepo.rewards import FUNCTIONS
from megatron_prepo.rewards.output import OUTPUT
from megatron_prepo.rollout import placement


def text(config: Config, *, num_ranks: int, launched: bool, num_servers: int | None = None) -> str:
    """Describe a run from its settings alone, before its inputs are read.

    `launched`: whether `process/local_ranks.py` starts the ranks, whose output goes to `logs/`;
    `num_servers`: SGLang servers that the run starts; default: those of this machine.
    """
    run, selection, budget = Path(config.run.dir), config.selection, config.train.rollout_budget
    logs = (
        f"; output of all but rank 0: {run}/logs/rank_N.log" if launched and num_ranks > 1 else ""
    )
    rows = {
        "run": f"{run}",
        "model": f"{config.model.megatron or config.model.hf}, {config.model.dtype}",
        "ranks": f"{num_ranks}: {layout(config.parallel, num_ranks)}{logs}",
        "engine": engine(config, num_ranks if launched else None, num_servers),
        "steps": f"{config.train.total_steps} of {selection.num_selected} prompts, by "
        f"{selection.name} out of {selection.num_candidates}, x "
        f"{config.rollout.samples_per_prompt} rollouts"
        f"{f'; at most {budget:,} rollouts' if budget else ''}",
        "reward": f"{config.reward.function}{_output(config.reward.function, run)}",
        "checkpoints": checkpoints(config.checkpoint),
    }
    return "\n".join(f"{name:<12} {row}" for name, row in rows.items())


def checkpoints(settings: CheckpointConfig) -> str:
    """Return when a run saves, and what it keeps for good."""
    best = f"; the best by {settings.keep_best} is kept" if settings.keep_best else ""
    intervals = [f"{settings.every} steps"] if settings.every else []
    intervals += [f"{settings.every_minutes:g} minutes"] if settings.every_minutes else []
    if intervals:
        return f"every {' or '.join(intervals)}, and at the end{best}"
    if settings.every is None and settings.optimizer:
        return f"after the first step, then whenever saving takes less than 5 % of the time{best}"
    return f"at the end only{best}"


def layout(parallel: ParallelConfig, num_ranks: int) -> str:
    """Return the sizes of a layout, without those that are 1 where another is larger."""
    sizes = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "data": num_ranks // (parallel.tensor * parallel.pipeline * parallel.context),
    }
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1] or ["one GPU or CPU"]
    experts = f", expert {parallel.expert}" if parallel.expert > 1 else ""
    return f"{' x '.join(words)}{experts}"


def engine(config: Config, num_ranks: int | None, num_servers: int | None = None) -> str:
    """Return what generates the rollouts, and where it logs; `num_ranks` are on this machine."""
    servers, logs = config.servers, Path(config.run.dir) / "logs"
    if config.rollout.engine == "embedded":
        return "transformers, in the ranks"
    if servers.urls:
        return f"SGLang servers that run already: {', '.join(servers.urls)}"
    import torch  # takes seconds, which only servers need here

    cuda = torch.cuda.is_available()
    count = num_servers or placement.servers_here(servers, cuda=cuda, ranks=num_ranks)
    return (
        f"{count} SGLang server{'s' if count > 1 else ''} of tensor "
        f"{servers.tensor}, which may take minutes to start; output: {logs}/sglang_N.log"
    )


def prompts(
    data: DataConfig,
    train: Sequence[Prompt],
    held_out: Mapping[str, Sequence[Prompt]],
    dropped: Mapping[str, int],
) -> str:
    """Describe the prompts that were read: `held_out` by set, `dropped` numbers by setting."""
    sets = ", ".join(
        f"{name} {len(held_out[name]):,} of {file}".lstrip()
        for name, file in data.eval_files.items()
    )
    read = f"{'prompts':<12} {len(train):,} of {data.train}; held out {sets}"
    if not dropped:
        return read
    numbers = ", ".join(f"{number:,} of {name}" for name, number in dropped.items())
    return (
        f"{read}\n{'dropped':<12} {numbers}: longer than data.max_prompt_tokens="
        f"{data.max_prompt_tokens}"
    )


def next_steps(run: str, lora: LoraConfig) -> str:
    """Return the files of a finished run, a directory, and the commands that continue with them."""
    adapter = f"adapter                     {run}/adapter, for peft; merged into the model"
    return "\n".join(
        [
            f"results                     {run}: summary.json, pass_rate.png, metrics.jsonl, "
            "ledger.jsonl",
            f"model                       {run}/hf, in Hugging Face format",
            *([adapter] if lora.rank else []),
            f"next                        megatron-prepo report {run}",
            f"                            megatron-prepo evaluate --model {run} --out "
            f"{run}-evaluation",
        ]
    )


def to_resume(directory: Path, steps: Sequence[int]) -> str:
    """Return what an unfinished run has saved and how to resume it.

    `steps`: numbers of steps that its checkpoints include.
    """
    saved = f"a checkpoint of {max(steps)} steps" if steps else "no checkpoint yet"
    return (
        f"{directory} has {saved}, and the rollouts since; to resume: "
        f"megatron-prepo resume {directory}"
    )


def _output(function: str, run: Path) -> str:
    return "" if function in FUNCTIONS else f"; what it prints: {run / 'logs' / OUTPUT}"
