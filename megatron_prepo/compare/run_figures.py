"""The figures of one run: its metrics by step, as logged, with a running mean over them.

Drawn like those of a comparison (`figures.py`), whose record keeps only means over several steps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from megatron_prepo.compare.analysis import Arm, Floats
from megatron_prepo.compare.figures import Figure, decile_figures, panel, stage_figures
from megatron_prepo.compare.style import Palette

Rows: TypeAlias = Sequence[Mapping[str, Any]]
"""Steps or evaluations, as a run logs them."""

SMOOTHED_FROM = 20
"""Number of steps from which a running mean is drawn over the values."""
LOG_FROM = 30
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""

Paint: TypeAlias = Callable[[Axes, str, Palette], None]
"""Draws on axes in the run's colour."""


def run_figures(arm: Arm, steps: Rows, evaluations: Rows) -> list[Figure]:
    """Return the figures for which the run has values, the most important first."""
    made = [
        pass_rate(arm, evaluations),
        window(arm, steps),
        *(
            curve(arm, steps, *words)
            for words in (
                ("reward", "Reward", "reward/mean", reward_words(steps)),
                ("zero_variance", "Groups without a signal", "reward/zero_variance_ratio", ZERO),
                ("length", "Length", "rollout/length", "Mean tokens of a completion"),
            )
        ),
        entropy(arm, steps),
        weights(arm, steps),
        gradient(arm, steps),
        mismatch(arm, steps),
        curve(arm, steps, "spearman", "Does perplexity predict the reward?", *SPEARMAN),
    ]
    return [*filter(None, made), *decile_figures([arm]), *stage_figures([arm])]


ZERO = "Share of groups whose rewards are all equal"
SPEARMAN = (
    "ppl/spearman_with_reward",
    "Rank correlation of prompt perplexity and mean reward among the groups of a step",
)


def reward_words(steps: Rows) -> str:
    """Return the caption of the reward, which a window that moves makes fall."""
    words = "Mean reward of the rollouts that the step generated"
    if known(steps, "selection/window_first"):
        words += (
            ". It may fall while the model improves, since the window moves to harder prompts: "
            "judge by the held-out pass rate"
        )
    return words


def pass_rate(arm: Arm, evaluations: Rows) -> Figure:
    """Return the figure of all evaluations, as measured, with their intervals."""

    def paint(axes: Axes, colour: str, palette: Palette) -> None:
        x_E, y_E = column(evaluations, "step"), column(evaluations, "pass_rate")
        low_E, high_E = np.array([e["pass_rate_ci95"] for e in evaluations], dtype=float).T
        axes.fill_between(x_E, low_E, high_E, color=colour, alpha=0.15, lw=0)
        axes.plot(x_E, y_E, "o-", ms=4, lw=1.6, color=colour)

    words = "Held-out pass rate of each evaluation, not smoothed; band: 95 % interval over prompts."
    return made(arm, "pass_rate", "Held-out pass rate", words, "pass rate", paint)


def window(arm: Arm, steps: Rows) -> Figure | None:
    """Return the figure of the perplexities of candidates and of the chosen prompts."""
    if not known(steps, "ppl/selected/mean"):
        return None

    def paint(axes: Axes, colour: str, palette: Palette) -> None:
        x_M = column(steps, "step")
        extremes = (column(steps, f"ppl/candidates/{end}") for end in ("min", "max"))
        axes.fill_between(x_M, *extremes, color=palette.ink, alpha=0.10, lw=0)
        chosen = (column(steps, f"ppl/selected/{end}") for end in ("min", "max"))
        axes.fill_between(x_M, *chosen, color=colour, alpha=0.30, lw=0)
        axes.plot(x_M, column(steps, "ppl/selected/mean"), color=colour, lw=1.6)

    words = (
        "Prompt perplexity in each step, not smoothed. Grey: all candidates; coloured: the prompts "
        "rolled out, the line their mean."
    )
    return made(arm, "window", "Window", words, "perplexity", paint)


def curve(arm: Arm, steps: Rows, key: str, title: str, name: str, words: str) -> Figure | None:
    """Return the figure of one metric."""
    if not known(steps, name):
        return None

    def paint(axes: Axes, colour: str, palette: Palette) -> None:
        draw_values(axes, column(steps, "step"), column(steps, name), colour)

    return made(arm, key, title, f"{words}{smoothing(steps)}", name, paint)


def entropy(arm: Arm, steps: Rows) -> Figure | None:
    """Return the figure of token entropies, with the spread of the rollouts' means."""
    if not known(steps, "entropy/mean"):
        return None

    def paint(axes: Axes, colour: str, palette: Palette) -> None:
        x_M = column(steps, "step")
        middle = (column(steps, f"entropy/sequence/{q}") for q in ("q25", "q75"))
        axes.fill_between(x_M, *middle, color=colour, alpha=0.15, lw=0)
        draw_values(axes, x_M, column(steps, "entropy/mean"), colour)

    words = "Mean entropy of a token, in nats; band: the middle half of the rollouts"
    return made(arm, "entropy", "Entropy", words + smoothing(steps), "entropy/mean", paint)


def weights(arm: Arm, steps: Rows) -> Figure | None:
    """Return the figure of the relative-entropy weights; None if all are 1."""
    if not np.nan_to_num(column(steps, "weight/std")).any() or not known(steps, "weight/q50"):
        return None

    def paint(axes: Axes, colour: str, palette: Palette) -> None:
        x_M = column(steps, "step")
        for low, high, alpha in (("min", "max", 0.12), ("q25", "q75", 0.25)):
            ends = (column(steps, f"weight/{end}") for end in (low, high))
            axes.fill_between(x_M, *ends, color=colour, alpha=alpha, lw=0)
        draw_values(axes, x_M, column(steps, "weight/q50"), colour)

    words = (
        "Relative-entropy weights of the rollouts, whose mean is 1; line: median, bands: the "
        "middle half, and all"
    )
    return made(arm, "weights", "Weights", words + smoothing(steps), "weight", paint)


def gradient(arm: Arm, steps: Rows) -> Figure | None:
    """Return the figure of the gradient's norm, with ticks at steps that skipped an update."""
    if not known(steps, "loss/grad_norm"):
        return None
    skipped = [row["step"] for row in steps if row.get("loss/skipped_updates")]

    def paint(axes: Axes, colour: str, palette: Palette) -> None:
        y_M = column(steps, "loss/grad_norm")
        draw_values(axes, column(steps, "step"), y_M, colour)
        use_log_scale(axes, y_M)
        bottom = axes.get_xaxis_transform()
        axes.plot(skipped, [0.03] * len(skipped), "x", color=palette.ink, transform=bottom)

    words = "Norm of the gradient before clipping, mean over the step's updates"
    words += f"; crosses: {len(skipped)} steps with a skipped update" if skipped else ""
    return made(arm, "grad_norm", "Gradient norm", words + smoothing(steps), "norm", paint)


def mismatch(arm: Arm, steps: Rows) -> Figure | None:
    """Return the figure of the differences between engine and actor; None if they are all 0."""
    names = [f"mismatch/logprob_abs/{name}" for name in ("mean", "max")]
    if not all(np.nan_to_num(column(steps, name)).any() for name in names):
        return None

    def paint(axes: Axes, colour: str, palette: Palette) -> None:
        x_M = column(steps, "step")
        for name, look in zip(names, (colour, palette.ink), strict=True):
            y_M = column(steps, name)
            draw_values(axes, x_M, np.where(y_M > 0, y_M, np.nan), look)
        axes.set_yscale("log")

    words = (
        "Difference of the engine's and the actor's log-probability of a token: mean (coloured) "
        "and largest (black or white)"
    )
    return made(arm, "mismatch", "Engine and actor", words + smoothing(steps), "nats", paint)


def made(arm: Arm, key: str, title: str, caption: str, label: str, paint: Paint) -> Figure:
    """Return a figure with the step on its axis."""

    def draw(figure: Canvas, _: Sequence[Arm], palette: Palette) -> None:
        axes = panel(figure, palette, "step", label)
        figure.subplots_adjust(right=0.97)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        paint(axes, palette.arm(arm.name), palette)

    return Figure(key, title, caption, draw, [arm])


def draw_values(axes: Axes, x_M: Floats, y_M: Floats, colour: str) -> None:
    """Draw the values; if there are many, thin, and their running mean over them."""
    width = smoothed_over(len(y_M))
    if width == 1:
        axes.plot(x_M, y_M, "o-", ms=3, lw=1.6, color=colour)
        return
    axes.plot(x_M, y_M, ".-", ms=3, lw=0.6, color=colour, alpha=0.45)
    axes.plot(x_M, running_mean(y_M, width), lw=2.2, color=colour)


def running_mean(y_M: Floats, width: int) -> Floats:
    """Return the mean over up to `width` values around each, without those that are missing.

    >>> running_mean(np.array([1.0, 2.0, np.nan, 6.0]), 3).tolist()
    [1.5, 1.5, 4.0, 6.0]
    """
    there, kernel = ~np.isnan(y_M), np.ones(width)
    sums = np.convolve(np.where(there, y_M, 0.0), kernel, "same")
    counts = np.convolve(there.astype(float), kernel, "same")
    return np.divide(sums, counts, out=np.full(len(y_M), np.nan), where=counts > 0)


def smoothed_over(num_steps: int) -> int:
    """Return the width of the running mean, odd, about a tenth of the steps; 1: none.

    >>> [smoothed_over(n) for n in (19, 20, 80, 1000)]
    [1, 5, 9, 101]
    """
    return 1 if num_steps < SMOOTHED_FROM else max(5, num_steps // 20 * 2 + 1)


def smoothing(steps: Rows) -> str:
    """Return the end of a caption: how values and running mean are drawn."""
    width = smoothed_over(len(steps))
    return "." if width == 1 else f". Thin: each step; bold: running mean of {width} steps."


def use_log_scale(axes: Axes, y_M: Floats) -> None:
    """Make the axis logarithmic if positive values differ by orders of magnitude."""
    y_M = y_M[~np.isnan(y_M)]
    if y_M.min() > 0 and y_M.max() / y_M.min() > LOG_FROM:
        axes.set_yscale("log")


def column(rows: Rows, name: str) -> Floats:
    """Return a metric of all steps; NaN where it is missing."""
    values = (row.get(name) for row in rows)
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def known(rows: Rows, name: str) -> bool:
    """Return whether any step has the metric."""
    return any(row.get(name) is not None for row in rows)
