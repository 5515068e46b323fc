"""Time of each stage of our head, and of the complete head by the size of its chunks.

Stages are computed as the actor does, chunk by chunk over all tokens, and timed separately: the
product for the logits, with results in the inputs' type and in float32; the statistics of rows; the
gradient of rows; and the products for the gradients of hidden states (dX) and of the weight (dW).
Their sum is not the head's time, since a stage may find in a cache what the previous one wrote.

Letters: T tokens, C tokens per chunk, H hidden, V vocabulary rows of this rank.
"""

from collections.abc import Callable

import torch

from megatron_prepo.actor.lm_head import (
    chunk_tokens_within,
    equal_chunks,
    in_place,
    row_operations,
)
from megatron_prepo.models.fp32_matmul import add_product, product
from tools.bench.head_case import Case
from tools.bench.head_providers import Outcome, Task, ours_tasks

CHUNKS = (512, 1024, 1152, 2048, 4096)
"""Tokens per chunk; 1,152 rows are 9 x 128: at 128 x 256 per tile, few multiprocessors idle."""
CPU_CHUNKS = (8, 32, 128)
LOGITS, LOGITS_FP32, STATISTICS = "logits", "logits, float32", "statistics"
GRADIENT, HIDDEN, WEIGHT = "gradient of logits", "dX", "dW"
MATRIX_PRODUCTS = (LOGITS, LOGITS_FP32, HIDDEN, WEIGHT)


def stages(case: Case) -> dict[str, Task]:
    """Return one task per stage; they share workspaces of a chunk."""
    chunk_tokens = chunk_tokens_within(None, case.weight_VH)
    slices = equal_chunks(case.shape.tokens, chunk_tokens)
    weight_VH, hidden_TH = case.weight_VH.detach(), case.hidden_TH.detach()
    wide = torch.float64 if weight_VH.dtype == torch.float64 else torch.float32
    size = max(part.stop - part.start for part in slices), len(weight_VH)
    z_CV, other_CV = (weight_VH.new_empty(size, dtype=wide) for _ in range(2))
    out_CV = in_place(other_CV, weight_VH.dtype)  # rows as far apart as the head has them
    product(hidden_TH[: size[0]], weight_VH.t(), out=z_CV)
    out_CV.copy_(z_CV)
    rows = row_operations(weight_VH.device)
    lse_C = z_CV.logsumexp(dim=1)

    def statistics(part: slice, count: int) -> None:
        rows.row_statistics(z_CV[:count], case.targets_T[part], 1.0)

    def gradient(part: slice, count: int) -> None:
        per_row = (lse_C[:count], lse_C[:count], case.grad_logprobs_T[part], None)
        rows.row_gradient(z_CV[:count], case.targets_T[part], 1.0, *per_row, out_CV[:count])

    def weight_gradient(part: slice, count: int) -> None:
        add_product(case.weight_VH.main_grad, out_CV[:count].t(), hidden_TH[part])

    work: dict[str, Callable[[slice, int], object]] = {
        LOGITS: lambda part, n: torch.mm(hidden_TH[part], weight_VH.t(), out=out_CV[:n]),
        LOGITS_FP32: lambda part, n: product(hidden_TH[part], weight_VH.t(), out=z_CV[:n]),
        STATISTICS: statistics,
        GRADIENT: gradient,
        HIDDEN: lambda part, n: product(out_CV[:n], weight_VH),
        WEIGHT: weight_gradient,
    }
    return {name: _over_chunks(do, slices) for name, do in work.items()}


def _over_chunks(do: Callable[[slice, int], object], slices: list[slice]) -> Task:
    def run(case: Case) -> Outcome:
        for part in slices:
            do(part, part.stop - part.start)
        return Outcome(None, None, ())

    return run


def sweep(case: Case, chunks: list[int]) -> dict[tuple[int, str], Task]:
    """Return our tasks by the tokens per chunk, of those that a case has."""
    fitting = [chunk for chunk in chunks if chunk <= case.shape.tokens]
    return {(chunk, name): task for chunk in fitting for name, task in ours_tasks(chunk).items()}


def describe(case: Case, medians: dict, peaks: dict) -> dict:
    """Return the stages with their rates, and the sweep with its peaks of memory."""
    size, elements = case.weight_VH.element_size(), case.shape.tokens * case.shape.columns
    moved = {STATISTICS: 4 * elements, GRADIENT: (4 + size) * elements}
    table: dict[str, dict] = {}
    for name, times in medians.items():
        if isinstance(name, tuple):
            continue
        row = table[name] = {"milliseconds": times}
        if times["median"] and name in MATRIX_PRODUCTS:
            row["tflops"] = case.shape.matmul_flops(1) / times["median"] / 1e9
        elif times["median"]:
            row["gigabytes_per_second"] = moved[name] / times["median"] / 1e6
    swept = [
        {
            "chunk_tokens": name[0],
            "task": name[1],
            "milliseconds": times,
            "peak_extra_bytes": peaks[name],
        }
        for name, times in medians.items()
        if isinstance(name, tuple)
    ]
    chunk_tokens = chunk_tokens_within(None, case.weight_VH)
    return {"stages": {"chunk_tokens": chunk_tokens, "table": table}, "chunks": swept}


def markdown(case: dict) -> list[str]:
    """Return both tables of a case."""
    lines = ["", f"Stages of our head, in chunks of {case['stages']['chunk_tokens']} tokens:", ""]
    lines += ["| stage | ms | TFLOP/s | GB/s |", "|---|---|---|---|"]
    for name, row in case["stages"]["table"].items():
        rates = [f"{row[key]:.4g}" if key in row else "" for key in RATES]
        lines.append(f"| {name} | {_cell(row)} | {' | '.join(rates)} |")
    lines += ["", "| tokens per chunk | task | ms | peak extra MiB |", "|---|---|---|---|"]
    for row in case["chunks"]:
        peak = f"{row['peak_extra_bytes'] / 2**20:.1f}"
        lines.append(f"| {row['chunk_tokens']} | {row['task']} | {_cell(row)} | {peak} |")
    return lines


RATES = ("tflops", "gigabytes_per_second")


def _cell(row: dict) -> str:
    median = row["milliseconds"]["median"]
    return "-" if median is None else f"{median:.2f}"
