"""The result of a finished run, as a plot and as a few lines of text."""

from pathlib import Path
from typing import Any

from megatron_prepo.files.atomic import naming, read_lines
from megatron_prepo.run.metrics_table import read_steps

PICTURE = "pass_rate.png"


def plot(directory: str | Path, summary: dict[str, Any]) -> Path:
    """Plot held-out pass rate and the window's mean perplexity by rollouts, as `pass_rate.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory = Path(directory)
    steps = list(read_steps(directory))
    evaluations = list(read_lines(directory / "evaluations.jsonl"))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    rollouts = [e["rollouts"] for e in evaluations]
    rate = [e["pass_rate"] for e in evaluations]
    low, high = zip(*(e["pass_rate_ci95"] for e in evaluations), strict=True)
    axes.fill_between(rollouts, low, high, color="tab:blue", alpha=0.15, lw=0)
    axes.plot(rollouts, rate, "o-", color="tab:blue", label="held-out pass rate, 95 % interval")
    axes.set(xlabel="rollouts generated", ylabel="pass rate")
    axes.yaxis.label.set_color("tab:blue")
    axes.spines[["top"]].set_visible(False)
    window = [
        (s["rollout/paid"], s["ppl/selected/mean"]) for s in steps if "ppl/selected/mean" in s
    ]
    if window:
        other = axes.twinx()
        other.plot(*zip(*window, strict=True), color="tab:orange", lw=1.2)
        other.set_ylabel("mean perplexity of the selected window")
        other.yaxis.label.set_color("tab:orange")
        other.spines[["top"]].set_visible(False)
    axes.set_title(
        f"{summary['method']}, weights {summary['weighting']}: "
        f"{change(summary)} on {summary['held_out_prompts']} held-out prompts",
        fontsize=11,
    )
    path = directory / PICTURE
    aside = directory / f"{PICTURE}.partial"
    with naming(aside):
        figure.savefig(aside, dpi=120, format="png")
    pyplot.close(figure)
    aside.replace(path)
    return path


def change(summary: dict[str, Any]) -> str:
    """Return the pass rate before and after a run, or of one of its sets.

    >>> change({"pass_rate_before": 0.25, "pass_rate_after": 0.5})
    '0.250 -> 0.500'
    >>> change({"pass_rate_before": None, "pass_rate_after": 0.5})
    '0.500'
    """
    rates = (summary["pass_rate_before"], summary["pass_rate_after"])
    return " -> ".join(f"{rate:.3f}" for rate in rates if rate is not None)


def why_unknown(summary: dict[str, Any]) -> str:
    """Return why a summary has no gain."""
    if summary["pass_rate_before"] is None:
        return "not measured: eval.before=false"
    return "not known: eval.temperature was changed in the run"


def text(summary: dict[str, Any]) -> str:
    """Format the result in a few lines."""

    def rate(when: str) -> str:
        if summary[when] is None:
            return why_unknown(summary)
        low, high = summary[f"{when}_ci95"]
        return f"{summary[when]:.3f}  (95 % interval {low:.3f} to {high:.3f})"

    sets = [
        f"  {name:<26}{change(of_set)}  ({of_set['held_out_prompts']} prompts)"
        for name, of_set in summary.get("sets", {}).items()
    ]
    seconds = summary["seconds"]
    stages = [f"{name} {value:.0f}" for name, value in seconds.items() if value >= 0.5]
    stages.append(f"together {sum(seconds.values()):.0f}")
    return "\n".join(
        [
            f"held-out pass rate before   {rate('pass_rate_before')}",
            f"held-out pass rate after    {rate('pass_rate_after')}",
            f"gain, prompt by prompt      {rate('gain')}",
            f"                            avg@{summary['samples_per_prompt']} over "
            f"{summary['held_out_prompts']} prompts",
            *sets,
            f"rollouts, tokens generated  {summary['rollouts']:,}, {summary['tokens']:,}",
            f"seconds by stage            {', '.join(stages)}",
        ]
    )
