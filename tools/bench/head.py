"""Measure time, memory and error of the output head, compared with matrix products and peers.

    python tools/bench/head.py --out benchmarks/results/head_NAME.json [--verl FOLDER] [--quick]
    python tools/bench/head.py --cpu --out benchmarks/results/head_cpu_NAME.json

Writes JSON after every case, and tables in Markdown next to it (explained in
docs/head_benchmark.md).  On a GPU: one process, with one rank's part of tensor parallelism.  With
--cpu: two gloo ranks, started by this script, ours compared with the naive implementation.

Tasks of all providers alternate, in random order per round, so that clock and temperature of the
machine are the same for all.  `--seconds` stops the last case early, which the result states.  The
result is written after each round, so that a process that is killed leaves all but the last one.

`--stages` adds a table of the stages of our head, and a sweep over its chunk sizes
(`head_stages.py`), for the first case, directly after it.
"""

import argparse
import itertools
import json
import os
import random
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.files.existing import existing
from megatron_prepo.process import local_ranks, machine
from megatron_prepo.process.command import in_one_line
from tools.bench import head_goals, head_stages
from tools.bench.head_case import Case, Shape, describe, make_case
from tools.bench.head_providers import PRODUCTS, Absent, Outcome, Task, available, naive_bytes

MODELS = {
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Llama-3.1-8B": (4096, 128256),
    "Qwen2.5-72B": (8192, 152064),
}
"""Shapes: hidden, vocabulary."""
TENSOR, TOKENS = (1, 2, 4, 8), (2048, 8192, 32768)
QUICK = (("Qwen2.5-7B", 1, 8192), ("Qwen2.5-7B", 1, 32768), ("Qwen2.5-1.5B", 1, 8192))
"""Cases (model, tensor, tokens); those of the goals first."""
WARM_UPS, SAMPLES = 8, 30
CPU_HIDDEN, CPU_VOCAB, CPU_TOKENS = (256, 1024), 32768, 4096
CPU_WARM_UPS, CPU_SAMPLES = 1, 5
OWN = ("bare", "ours")
"""Providers whose failure is an error of ours and stops the run."""


@in_one_line
def main() -> int:
    """Run the measurements selected on the command line."""
    options = _options()
    if options.cpu and "RANK" not in os.environ:
        with tempfile.TemporaryDirectory() as logs:
            command = [sys.executable, *sys.argv]
            local_ranks.start(command, head_goals.CPU_TENSOR, Path(logs))
        return 0
    if options.cpu:
        return local_ranks.run_rank(lambda: measure_all(options))
    if not torch.cuda.is_available():
        print("error: no CUDA device; use --cpu for measurements without one", file=sys.stderr)
        return 2
    measure_all(options)
    return 0


def measure_all(options: argparse.Namespace) -> dict:
    """Measure all cases; rank 0 writes the result after each."""
    # imported here, because the process that starts the CPU ranks does not need Megatron
    from megatron_prepo.actor import parallel
    from megatron_prepo.config import ParallelConfig

    deadline = time.monotonic() + options.seconds if options.seconds else None
    device, tensor = ("cpu", head_goals.CPU_TENSOR) if options.cpu else ("cuda", 1)
    parallel.initialize(ParallelConfig(tensor=tensor), seed=0)
    providers, absent = available(device, options.verl, epilogue=options.epilogue)
    result = {
        "command": _command(),
        "machine": machine.describe(),
        "versions": _versions("triton", "liger-kernel"),
        "device": device,
        "ranks": tensor,
        "threads": torch.get_num_threads(),
        "warm_ups": options.warm_ups,
        "samples": options.samples,
        "gradients": options.gradients,
        "absent": absent,
        "cases": [],
        "not_started": [],
    }

    def keep() -> None:
        result["goals"] = head_goals.judge(device, result["cases"])
        if dist.get_rank() == 0:
            write(result, options.out)

    for shape in options.shapes:
        if deadline and time.monotonic() > deadline:
            result["not_started"].append(f"{_title(shape)}: no time left")
            keep()
        else:
            result["cases"].append({})
            _measure_shape(shape, options, providers, deadline, result["cases"], keep)
    if dist.get_rank() == 0:
        print(markdown(result))
    parallel.shut_down()
    return result


def _measure_shape(shape: Shape, options, providers, deadline, cases: list[dict], keep) -> None:
    """Measure the last of the cases; it is replaced after each round."""
    case = make_case(
        shape,
        "cpu" if options.cpu else "cuda",
        torch.float32 if options.cpu else torch.bfloat16,
        entropy_gradient=options.gradients == "both",
        group=dist.group.WORLD,
    )

    def replace(measured: dict) -> None:
        cases[-1] = measured
        keep()

    measured = measure(case, providers, options.warm_ups, options.samples, deadline, replace)
    if options.stages and len(cases) == 1:
        swept = head_stages.sweep(case, options.chunks)
        peaks = {name: peak_extra_bytes(case, task) for name, task in swept.items()}
        tasks = head_stages.stages(case) | swept

        def with_stages(times: dict) -> None:
            medians = {name: summary(milliseconds) for name, milliseconds in times.items()}
            replace(measured | head_stages.describe(case, medians, peaks))

        with_stages(take_turns(case, tasks, 1, options.samples, deadline, with_stages))


def measure(
    case: Case,
    providers: dict[str, dict[str, Task]],
    warm_ups: int,
    samples: int,
    deadline: float | None = None,
    keep: Callable[[dict], None] = lambda measured: None,
) -> dict:
    """Measure errors, then peak memory, then times of all providers' tasks, in separate passes.

    `keep` is called with the result so far after each round of samples.
    """
    runs, absent = {}, {}
    for provider, tasks in providers.items():
        for task, run in tasks.items():
            try:
                if provider == "naive":
                    _require_memory(case, naive_bytes(case))
                runs.setdefault(provider, {})[task] = first_run(case, run)
            except Absent as reason:
                absent[f"{provider}, {task}"] = str(reason)
            except _peer_failures() as error:
                if provider in OWN:
                    raise
                absent[f"{provider}, {task}"] = _reason(error)
    tasks = {(p, t): providers[p][t] for p in runs for t in runs[p]}

    def with_times(times: dict) -> dict:
        for (provider, task), milliseconds in times.items():
            runs[provider][task] |= {"milliseconds": summary(milliseconds)}
        for task, run in runs["bare"].items():
            median = run["milliseconds"]["median"]
            flops = case.shape.matmul_flops(PRODUCTS[task])
            run["tflops"] = flops / median / 1e9 if median else None
        rounds = min(map(len, times.values()))
        cut = f"after {rounds} of {samples} samples" if rounds < samples else None
        return {"shape": describe(case), "absent": absent, "cut": cut, "runs": runs}

    keep(with_times({name: [] for name in tasks}))
    kept = take_turns(case, tasks, warm_ups, samples, deadline, lambda t: keep(with_times(t)))
    keep(measured := with_times(kept))
    return measured


def first_run(case: Case, task: Task) -> dict:
    """Return errors of the first call and then peak memory, when workspaces are allocated."""
    errors = errors_of(case, task(case))
    return {"errors": errors, "peak_extra_bytes": peak_extra_bytes(case, task)}


def errors_of(case: Case, outcome: Outcome) -> dict:
    """Return absolute errors compared with float64, for all values that a provider computes."""
    exact = case.exact
    pairs = {
        "logprob": (outcome.logprobs_T, exact.logprobs_R),
        "entropy": (outcome.entropy_T, exact.entropy_R),
    }
    return {
        name: _error((measured_T.detach()[exact.rows_R].double() - exact_R).abs())
        for name, (measured_T, exact_R) in pairs.items()
        if measured_T is not None
    }


def peak_extra_bytes(case: Case, task: Task) -> int:
    """Return peak memory in use, minus the memory in use before and minus the gradients.

    Gradients are the requested output, for any provider; they exist at the end, so the result is
    never below 0.  On a GPU: the peak of the allocator.  On a CPU: the running sum of allocations
    and frees of torch's allocator, as its profiler records them, including temporaries inside an
    operator; not the size of the process, which depends more on malloc than on the task.  The
    maximum over ranks.
    """
    peak, outcome = (_cuda_peak if _on_cuda(case) else _cpu_peak)(case, task)
    made = [g for g in outcome.gradients if g is not case.weight_VH.main_grad]
    return _largest(peak - sum(gradient.nbytes for gradient in made), case)


def take_turns(
    case: Case,
    tasks: dict[Any, Task],
    warm_ups: int,
    samples: int,
    deadline: float | None,
    keep: Callable[[dict], None] = lambda times: None,
) -> dict[Any, list[float]]:
    """Return milliseconds of every sample without warm-ups; fewer if the time limit is reached.

    `keep` is called with those so far after each round.
    """
    order, names = random.Random(1), list(tasks)
    times: dict[Any, list[float]] = {name: [] for name in names}
    slowest = times
    for number in range(warm_ups + samples):
        if deadline and time.monotonic() > deadline:
            break
        for name in order.sample(names, len(names)):
            milliseconds = _milliseconds(case, tasks[name])
            if number >= warm_ups:
                times[name].append(milliseconds)
        if number >= warm_ups:
            slowest = {name: _slowest_rank(values, case) for name, values in times.items()}
            keep(slowest)
    return slowest


def summary(milliseconds: list[float]) -> dict:
    """Return median and the 10th and 90th percentile, with the samples."""
    p10, median, p90 = np.percentile(milliseconds, [10, 50, 90]) if milliseconds else [None] * 3
    return {
        "median": median,
        "p10": p10,
        "p90": p90,
        "samples": [round(value, 4) for value in milliseconds],
    }


def write(result: dict, out: Path) -> None:
    """Write the result so far, as JSON and as Markdown."""
    out.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    durable.write_text(out.with_suffix(".md"), markdown(result) + "\n")


def markdown(result: dict) -> str:
    """Return the goals, then one table per case, then the absent providers."""
    about = result["machine"]
    where = (
        about["gpu"] if result["device"] == "cuda" else f"{about['processor']}, {_ranks(result)}"
    )
    lines = [
        f"{where}; torch {about['torch']}; `{result['command']}`; {result['warm_ups']} warm-ups, "
        f"{result['samples']} samples",
        "",
        "| goal | bound | measured | |",
        "|---|---|---|---|",
    ]
    for row in result["goals"]:
        measured = "-" if row["measured"] is None else f"{row['measured']:.4g}"
        verdict = row["verdict"] + (f" ({cut})" if (cut := row["cut"]) else "")
        lines.append(f"| {row['goal']} | {row['bound']} | {measured} | {verdict} |")
    for case in result["cases"]:
        lines += ["", *_case_table(case)]
    reasons = [f"- {name}: absent, {reason}" for name, reason in result["absent"].items()]
    lines += ["", *reasons, *(f"- not measured: {text}" for text in result["not_started"])]
    return "\n".join(lines).rstrip()


def _case_table(case: dict) -> list[str]:
    shape = case["shape"]
    lines = [
        f"**{shape['model']}**, hidden {shape['hidden']}, vocabulary {shape['vocab']} / "
        f"{shape['tensor']}, N = {shape['tokens']}, {shape['dtype']}; entropy "
        f"{shape['entropy_mean']:.2f}, largest logit {shape['logit_abs_max']:.1f}"
        + (f"; cut {case['cut']}" if case["cut"] else ""),
        "",
        "| provider | task | ms (p10 to p90) | x bare | peak extra MiB "
        "| logprob error mean, max | entropy error mean, max |",
        "|---|---|---|---|---|---|---|",
    ]
    for provider, tasks in case["runs"].items():
        for task, run in tasks.items():
            bare = case["runs"]["bare"][task]["milliseconds"]["median"]
            errors = (_error_cell(run["errors"].get(name)) for name in ("logprob", "entropy"))
            lines.append(
                f"| {provider} | {task} | {_time_cell(run['milliseconds'], bare)} | "
                f"{run['peak_extra_bytes'] / 2**20:.1f} | {' | '.join(errors)} |"
            )
    absent = [f"- {name}: absent, {why}" for name, why in case["absent"].items()]
    lines += ["", *absent] if absent else []
    return lines + (head_stages.markdown(case) if "stages" in case else [])


def _time_cell(times: dict, bare: float | None) -> str:
    if times["median"] is None:
        return "- | -"
    interval = f"{times['median']:.2f} ({times['p10']:.2f} to {times['p90']:.2f})"
    return f"{interval} | {times['median'] / bare:.2f}"


def _error_cell(error: dict | None) -> str:
    if error is None:
        return "-"
    bad = f", {error['not_finite']} not finite" if error["not_finite"] else ""
    return f"{error['mean']:.1e}, {error['max']:.1e}{bad}"


def _error(error_R: torch.Tensor) -> dict:
    finite = error_R[error_R.isfinite()]
    if not len(finite):
        return {"mean": 0.0, "max": 0.0, "not_finite": len(error_R)}
    return {
        "mean": finite.mean().item(),
        "max": finite.max().item(),
        "not_finite": len(error_R) - len(finite),
    }


def _milliseconds(case: Case, task: Task) -> float:
    if _on_cuda(case):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        task(case)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    dist.barrier()
    begin = time.perf_counter()
    task(case)
    return (time.perf_counter() - begin) * 1e3


def _cuda_peak(case: Case, task: Task) -> tuple[int, Outcome]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outcome = task(case)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, outcome


def _cpu_peak(case: Case, task: Task) -> tuple[int, Outcome]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        outcome = task(case)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0)), outcome


def _require_memory(case: Case, num_bytes: int) -> None:
    """Raise Absent if the GPU has less free memory: an attempt would empty the cache of all."""
    if not _on_cuda(case):
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if num_bytes > free:
        raise Absent(f"needs about {num_bytes / 1e9:.0f} GB, {free / 1e9:.0f} are free")


def _peer_failures() -> tuple[type[Exception], ...]:
    """Exceptions with which a peer rejects a case on this machine; the first is out of memory."""
    failures = (RuntimeError, ImportError, AssertionError, TypeError, ValueError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return failures
    return (*failures, TritonError)


def _reason(error: Exception) -> str:
    """Return the error message, or the failing line for an assertion without message."""
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__}: {str(error).strip()[:300] or line}"


def _slowest_rank(milliseconds: list[float], case: Case) -> list[float]:
    """Return the maximum over ranks: a step ends when the last rank does."""
    slowest = torch.tensor(milliseconds, dtype=torch.float64)
    if case.group.size() > 1:
        dist.all_reduce(slowest, dist.ReduceOp.MAX, case.group)
    return slowest.tolist()


def _largest(value: int, case: Case) -> int:
    largest = torch.tensor(value)
    if case.group.size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, case.group)
    return int(largest)


def _on_cuda(case: Case) -> bool:
    return case.hidden_TH.is_cuda


def _title(shape: Shape) -> str:
    return f"{shape.model}, tensor parallel {shape.tensor}, N = {shape.tokens}"


def _ranks(result: dict) -> str:
    return f"{result['ranks']} ranks of {result['threads']} thread(s)"


def _versions(*packages: str) -> dict[str, str]:
    found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {name: found.get(name, "not installed") for name in packages}


def _command() -> str:
    """Return the command line without local folders."""
    names = (Path(word).name if os.sep in word else word for word in sys.argv[1:])
    return shlex.join(["python", "tools/bench/head.py", *names])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=ownership.new_file(".md"), required=True, help="JSON file to write"
    )
    parser.add_argument("--cpu", action="store_true", help="two gloo ranks, no GPU")
    parser.add_argument("--quick", action="store_true", help="only the cases needed for the goals")
    parser.add_argument(
        "--verl", type=existing(), help="folder verl/utils/kernel of a verl checkout"
    )
    parser.add_argument(
        "--gradients",
        choices=("logprobs", "both"),
        default="logprobs",
        help="inputs of the loss: log-probabilities (as in PREPO), or entropies as well",
    )
    parser.add_argument("--seconds", type=float, help="approximate time limit")
    parser.add_argument("--stages", action="store_true", help="stages and chunk sizes of our head")
    parser.add_argument("--epilogue", action="store_true", help="with a kernel that no run uses")
    parser.add_argument("--chunks", help=f"default: {_list(head_stages.CHUNKS)}")
    parser.add_argument("--models", help=f"on a GPU, default: {','.join(MODELS)}")
    parser.add_argument("--tensor", help=f"on a GPU, default: {_list(TENSOR)}")
    parser.add_argument("--tokens", help=f"default: {_list(TOKENS)}; with --cpu {CPU_TOKENS}")
    parser.add_argument("--hidden", help=f"with --cpu, default: {_list(CPU_HIDDEN)}")
    parser.add_argument("--vocab", help=f"with --cpu, default: {CPU_VOCAB}")
    parser.add_argument("--warm-ups", type=int, help=f"default: {WARM_UPS}; --cpu {CPU_WARM_UPS}")
    parser.add_argument("--samples", type=int, help=f"default: {SAMPLES}; --cpu {CPU_SAMPLES}")
    options = parser.parse_args()
    foreign = ("models", "tensor", "verl", "seconds") if options.cpu else ("hidden", "vocab")
    for name in foreign:
        if getattr(options, name) is not None:
            parser.error(f"--{name} has no effect {'with' if options.cpu else 'without'} --cpu")
    if options.quick and (options.cpu or options.models or options.tensor or options.tokens):
        parser.error("--quick selects its cases itself, and is for a GPU")
    if options.warm_ups is None:
        options.warm_ups = CPU_WARM_UPS if options.cpu else WARM_UPS
    if options.samples is None:
        options.samples = CPU_SAMPLES if options.cpu else SAMPLES
    if options.chunks and not options.stages:
        parser.error("--chunks has no effect without --stages")
    options.chunks = _numbers(
        options.chunks, head_stages.CPU_CHUNKS if options.cpu else head_stages.CHUNKS
    )
    options.shapes = _shapes(options)
    return options


def _shapes(options: argparse.Namespace) -> list[Shape]:
    """Return the cases, small ones first, so that an early stop completes as many as possible."""
    if options.quick:
        return [Shape(m, *MODELS[m], tensor, tokens) for m, tensor, tokens in QUICK]
    tokens = _numbers(options.tokens, (CPU_TOKENS,) if options.cpu else TOKENS)
    if options.cpu:
        (vocab,) = _numbers(options.vocab, (CPU_VOCAB,))
        hidden = _numbers(options.hidden, CPU_HIDDEN)
        ranks = head_goals.CPU_TENSOR
        return [Shape("CPU", h, vocab, ranks, n) for n, h in itertools.product(tokens, hidden)]
    models = options.models.split(",") if options.models else list(MODELS)
    tensor = _numbers(options.tensor, TENSOR)
    return [
        Shape(model, *MODELS[model], size, n)
        for n, model, size in itertools.product(tokens, models, tensor)
    ]


def _numbers(text: str | None, default: tuple[int, ...]) -> list[int]:
    return [int(word) for word in text.split(",")] if text else list(default)


def _list(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


if __name__ == "__main__":
    sys.exit(main())
