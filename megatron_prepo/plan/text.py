"""A plan as a table of at most 100 columns, or as JSON."""

import dataclasses
import json
import textwrap
from collections.abc import Sequence

from megatron_prepo.plan.gpus import GIB
from megatron_prepo.plan.layout_search import Layout
from megatron_prepo.plan.planner import Plan, RankMemory

WIDTH = 100
COLUMNS = (
    ("weights", "weights"),
    ("grads", "gradients"),
    ("Adam", "optimizer_split"),
    ("unsplit", "optimizer_whole"),
    ("activ.", "activations"),
    ("head", "head"),
    ("engine", "engine_weights"),
    ("KV", "kv_cache"),
    ("total", "total"),
)


def text(plan: Plan, layouts: Sequence[Layout] | None) -> str:
    """Return the plan as tables; layouts that were not looked for are None."""
    parts = [_title(plan), _memory(plan), _engine(plan), _step(plan), _run(plan)]
    if plan.problems:
        parts.append("\n".join(_wrapped("problem: " + problem) for problem in plan.problems))
    if plan.cautions:
        parts.append("\n".join(_wrapped("caution: " + caution) for caution in plan.cautions))
    if layouts is not None:
        parts.append(_layouts(layouts))
    return "\n\n".join(parts)


def as_json(plan: Plan, layouts: Sequence[Layout]) -> str:
    """Return the plan as JSON: bytes, seconds and counts, unrounded."""
    tree = dataclasses.asdict(plan) | {"fits": plan.fits}
    for rank, row in zip(plan.ranks, tree["ranks"], strict=True):
        row |= {"actor": rank.actor, "total": rank.total}
    tree["layouts"] = [dataclasses.asdict(layout) for layout in layouts]
    return json.dumps(tree, indent=2)


def _title(plan: Plan) -> str:
    names = ["tensor", "pipeline", *["context"] * (plan.layout["context"] > 1), "data"]
    sizes = " x ".join(f"{name} {plan.layout[name]}" for name in names)
    if plan.layout["expert"] > 1:
        sizes += f", expert {plan.layout['expert']}"
    if plan.layout["sequence"]:
        sizes += ", sequence parallel"
    active = plan.parameters != plan.active_parameters
    beside = plan.where.gpus - plan.gpus
    lines = [
        f"{plan.model}: {plan.parameters:,} parameters"
        + (f", {plan.active_parameters:,} active per token" if active else ""),
        f"{plan.gpus} {plan.gpu} of {plan.memory / GIB:.1f} GiB: {sizes}"
        + (f"; {beside} more that do not train" if beside else ""),
        *(f"divides: {division}" for division in plan.divisions),
    ]
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    """Return the memory table, with one line for equal stages."""
    split = plan.ranks[0].distributed
    lines = [
        f"GiB per rank, micro-batches of {plan.token_budget:,} tokens; optimizer "
        + ("distributed" if split else "not distributed"),
        f"{'stage':>7}{'layers':>7}{'parameters':>16}"
        + "".join(f"{title:>{_width(title)}}" for title, _ in COLUMNS),
    ]
    for group in _alike(plan.ranks):
        first, last = group[0], group[-1]
        stage = str(first.stage) if first is last else f"{first.stage}-{last.stage}"
        fullest = max(group, key=lambda rank: rank.total)
        lines.append(
            f"{stage:>7}{first.layers:>7}{first.parameters:>16,}"
            + "".join(
                f"{getattr(fullest, field) / GIB:>{_width(title)}.1f}" for title, field in COLUMNS
            )
        )
    if host := max(rank.optimizer_host for rank in plan.ranks):
        lines.append(f"in host memory, of the offloaded optimizer: {host / GIB:.1f} GiB per rank")
    most = max(rank.total for rank in plan.ranks)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    if plan.problems and most + plan.reserve <= plan.memory:
        verdict = "ranks fit, ENGINES DO NOT (problem below)"
    lines.append(
        f"{verdict}: {most / GIB:.1f} GiB at most, and "
        f"{plan.reserve / GIB:.1f} GiB reserved (our guess), of {plan.memory / GIB:.1f} GiB"
    )
    return "\n".join(lines)


def _engine(plan: Plan) -> str:
    engine, where = plan.engine, plan.where
    if where.started_by == "user":
        return _wrapped(f"engines: {where.engines_in_words}, nor in the seconds")
    return _wrapped(
        f"engines ({engine.name}): {where.engines_in_words}; a cache holds "
        f"{engine.sequences_at_once:,} of the {engine.sequences_wanted:,} sequences of "
        f"{plan.sequence_tokens:,} tokens that an engine generates per step"
    )


def _step(plan: Plan) -> str:
    lines = ["predicted seconds per step"]
    for stage, (fast, slow) in plan.seconds.items():
        lines.append(f"  {stage:<14}{fast:>9.1f} to {slow:.1f}")
    fast, slow = (sum(both[i] for both in plan.seconds.values()) for i in (0, 1))
    lines.append(f"  {'all':<14}{fast:>9.1f} to {slow:.1f}")
    lines += [_wrapped("rates " + source) for source in plan.rates]
    return "\n".join(lines)


def _run(plan: Plan) -> str:
    def both(values: tuple[float, float], form: str) -> str:
        least, most = (format(value, form) for value in values)
        return least if least == most else f"{least} to {most}"

    steps = (
        f"run: {plan.steps:,} steps, {both(plan.rollouts, ',')} rollouts, "
        f"{both(plan.gpu_hours, ',.0f')} GPU hours"
    )
    if plan.evaluations is None:
        return f"{steps}\nevaluations are not counted: data.eval is not here (--eval-prompts N)"
    return (
        f"{steps}\n{plan.evaluations.number:,} evaluations: {plan.evaluations.completions:,} "
        f"completions, {both(plan.evaluation_hours, ',.0f')} GPU hours more; without grading"
    )


def _layouts(layouts: Sequence[Layout]) -> str:
    if not layouts:
        return (
            "no layout fits these GPUs: use more or larger ones, a smaller "
            "rollout.max_new_tokens,\nor rollout.engine=sglang and a larger servers.tensor"
        )
    lines = ["layouts that fit, best first: GiB, predicted seconds of scoring and update"]
    for layout in layouts:
        settings = " ".join(layout.settings) or "as configured"
        lines.append(
            _wrapped(f"{layout.total / GIB:>6.1f}{layout.seconds:>9.1f}  {settings}", indent=17)
        )
    return "\n".join(lines)


def _alike(ranks: Sequence[RankMemory]) -> list[list[RankMemory]]:
    """Group adjacent stages of equal parameters and head; their activations decrease by stage."""
    groups: list[list[RankMemory]] = []
    for rank in ranks:
        same = groups and all(
            getattr(groups[-1][0], name) == getattr(rank, name)
            for name in ("layers", "parameters", "head")
        )
        if same:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return groups


def _width(title: str) -> int:
    return max(7, len(title) + 1)


def _wrapped(line: str, indent: int = 4) -> str:
    return "\n".join(
        textwrap.wrap(
            line,
            WIDTH,
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
            drop_whitespace=True,
        )
    )
