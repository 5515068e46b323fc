"""The figures of a comparison: cost and pass rate of the methods, and metrics of their training.

Each figure is drawn by a function of figure, arms and palette.  `svg` uses colours that the page
defines, so that they follow its light or dark mode; `png` uses those of the light page.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_prepo.compare import analysis as comparison
from megatron_prepo.compare.analysis import BASELINE, Arm, Floats
from megatron_prepo.compare.record import Record
from megatron_prepo.compare.style import BOLD, CEILING, PAPER, STAGES, STYLE, Palette
from megatron_prepo.config.schema import SELECTION_METHODS as METHODS

MANY = 7
"""Number of arms beyond which methods and other arms go to separate figures."""
BAND_SEEDS = 3
"""Seeds from which a mean is drawn with its interval; with fewer, the seeds are drawn."""

WRITTEN_BY = "megatron-prepo report"
"""Marks pictures and pages, so that a later report recognises what it may replace."""
UNITS = {
    "rollouts": "rollouts generated",
    "tokens": "tokens generated",
    "seconds": "seconds of training, without evaluation",
}


class Metric(NamedTuple):
    """A figure of one metric of the steps."""

    key: str
    title: str
    caption: str
    label: str


METRICS = {
    "reward/zero_variance_ratio": Metric(
        "zero_variance",
        "Groups without a signal",
        "Fraction of groups whose rewards are all equal",
        "zero-variance ratio",
    ),
    "entropy/mean": Metric(
        "entropy",
        "Entropy",
        "Mean token entropy of the rollouts, in nats",
        "mean token entropy",
    ),
    "ppl/spearman_with_reward": Metric(
        "spearman",
        "Does perplexity predict the reward?",
        "Rank correlation of prompt perplexity and mean reward among the groups of a step",
        "Spearman's correlation",
    ),
}
WIDTH, HEIGHT, LABELS_FROM = 5.2, 3.6, 0.765
"""Inches, and the fraction of the width at which the labels of the lines begin."""


Draw: TypeAlias = Callable[[Canvas, Sequence[Arm], Palette], None]
End: TypeAlias = tuple[str, float, float]
"""The name of a line, and where it ends."""


@dataclass(frozen=True)
class Figure:
    """One picture; `draw` adds its axes to the canvas."""

    key: str
    title: str
    caption: str
    draw: Draw
    arms: list[Arm]


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """Return all figures for which the arms have data, the most important first."""
    return [
        *pass_rate_figures(arms),
        *metric_figures(arms),
        *window_figures(arms),
        *decile_figures(arms),
        *stage_figures(arms),
    ]


def pass_rate_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Return the figures of pass rate against each axis of cost."""
    made = []
    for axis in comparison.AXES:
        for group, suffix, what in groups(arms):
            caption = f"Held-out pass rate against {UNITS[axis]}{what}; {band_words(group)}"
            if BASELINE in {arm.name for arm in arms}:
                caption += "; dashed: 50, 75 and 100 % of random's gain"
            if any(arm.name == CEILING for arm in group):
                caption += ". The oracle is a ceiling: its probes are not counted"
            key = "pass_rate" if axis == "rollouts" else f"pass_rate_{axis}"
            title = f"Pass rate by {axis}{suffix}"
            made.append(
                Figure(key + slug(suffix), title, caption + ".", pass_rate(axis, arms), group)
            )
    return made


def metric_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Return the figures of the metrics in METRICS."""
    made = []
    for name, (key, title, caption, _) in METRICS.items():
        for group, suffix, what in groups(with_series(arms, name)):
            text = f"{caption}{what}; mean over seeds, running mean of 5 points."
            made.append(Figure(key + slug(suffix), title + suffix, text, series(name), group))
    return made


def window_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Return the figures of the perplexity of the selected prompts."""
    made = []
    for group, suffix, what in groups(with_series(arms, "ppl/selected/mean")):
        text = (
            f"Mean perplexity of the selected prompts{what}; dotted, in the same colour: the "
            "median of the candidates."
        )
        made.append(
            Figure("window" + slug(suffix), "What is selected" + suffix, text, draw_window, group)
        )
    return made


def decile_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Return the figures of pass rate by decile of perplexity."""
    made = []
    of_deciles = [arm for arm in arms if any(deciles(record) for record in arm.records)]
    for group, suffix, what in groups(of_deciles):
        text = (
            "Pass rate by decile of prompt perplexity within a step, of the prompts rolled out "
            f"(oracle: of all candidates){what}; mean over seeds."
        )
        made.append(
            Figure("deciles" + slug(suffix), "Easy and hard" + suffix, text, draw_deciles, group)
        )
    return made


def stage_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Return the figure of the seconds per stage, if any arm has them."""
    timed = [arm for arm in arms if any(stage_seconds(r) for r in arm.records)]
    if not timed:
        return []
    text = "Seconds of training by stage, mean over seeds; without evaluation and probes."
    return [Figure("stages", "Where the time goes", text, draw_stages, timed)]


def groups(arms: Sequence[Arm]) -> list[tuple[list[Arm], str, str]]:
    """Return the arms of each figure, with additions to its title and to its caption."""
    names = {arm.name for arm in arms}
    if len(arms) <= MANY or not names & set(METHODS):
        return [(list(arms), "", "")] if arms else []
    main = [arm for arm in arms if arm.name in METHODS]
    others = [arm for arm in arms if arm.name not in METHODS]
    compared = [arm for arm in main if arm.name in (BASELINE, "prepo")]
    if not others:
        return [(main, "", "")]
    return [(main, "", ""), ([*compared, *others], ": ablations", ", ablations")]


def pass_rate(axis: str, all_arms: Sequence[Arm]) -> Draw:
    """Draw pass rate against cost, with the targets of the complete comparison."""

    def draw(figure: Canvas, arms: Sequence[Arm], palette: Palette) -> None:
        axes = panel(figure, palette, UNITS[axis], "held-out pass rate")
        ends: list[End] = []
        means: list[Floats] = []
        for arm in arms:
            curves = arm.curves(axis)
            x_M, mean_M, half_M = comparison.mean_and_band(curves)
            colour = palette.arm(arm.name)
            means.append(mean_M)
            if half_M is not None and len(curves) >= BAND_SEEDS:
                low, high = mean_M - half_M, mean_M + half_M
                axes.fill_between(x_M, low, high, color=colour, alpha=0.10, lw=0)
            elif len(curves) > 1:
                for x, y in curves:
                    axes.plot(x, y, color=colour, lw=0.7, alpha=0.5)
            axes.plot(x_M, mean_M, **palette.line(arm.name))
            ends.append((arm.name, float(x_M[-1]), float(mean_M[-1])))
        values = np.concatenate(means)
        margin = max(0.12 * (values.max() - values.min()), 0.01)
        axes.set_ylim(values.min() - margin, values.max() + margin)
        axes.set_xlim(0)
        draw_targets(axes, all_arms, axis, palette)
        label_ends(axes, ends, palette)

    return draw


def draw_targets(axes: Axes, all_arms: Sequence[Arm], axis: str, palette: Palette) -> None:
    """Draw dashed lines at the targets at which savings are measured."""
    baseline = next((arm for arm in all_arms if arm.name == BASELINE), None)
    if baseline is None or len(all_arms) < 2:
        return
    base = comparison.base_pass_rate([record for arm in all_arms for record in arm.records])
    if baseline.finals_S.mean() <= base:
        return
    means = [comparison.mean_and_band(arm.curves(axis))[:2] for arm in all_arms]
    for quota in comparison.QUOTAS:
        level = comparison.target(base, baseline.finals_S.mean(), quota)
        reached = [comparison.first_reached(x, y[None], np.array([level]))[0] for x, y in means]
        # to the left of all curves at this level if there is room, else to the right below them
        left = np.nanmin(reached) > 0.14 * axes.get_xlim()[1]
        axes.axhline(level, color=palette.ink, lw=0.7, ls=(0, (4, 4)), alpha=0.7, zorder=1)
        axes.annotate(
            f"{quota * 100:g} %",
            (0 if left else 1, level),
            xycoords=axes.get_yaxis_transform(),
            xytext=(3, 2) if left else (-1, -2),
            textcoords="offset points",
            ha="left" if left else "right",
            va="bottom" if left else "top",
            fontsize=8,
            color=palette.ink,
        )


def series(name: str) -> Draw:
    """Draw a metric of the steps against rollouts."""

    def draw(figure: Canvas, arms: Sequence[Arm], palette: Palette) -> None:
        axes = panel(figure, palette, UNITS["rollouts"], METRICS[name].label)
        ends: list[End] = []
        for arm in arms:
            x_M, y_M = mean_series(arm, name)
            axes.plot(x_M, y_M, **palette.line(arm.name))
            ends.append((arm.name, float(x_M[-1]), float(y_M[-1])))
        axes.set_xlim(0)
        low, high = axes.get_ylim()
        if name.startswith("ppl/spearman") and high > -0.02:
            axes.axhline(0, color=palette.ink, lw=0.7)
        axes.set_ylim(low, high)
        label_ends(axes, ends, palette)

    return draw


def draw_window(figure: Canvas, arms: Sequence[Arm], palette: Palette) -> None:
    """Draw the perplexity of what each arm selected, and of its candidates."""
    axes = panel(figure, palette, UNITS["rollouts"], "prompt perplexity")
    ends: list[End] = []
    for arm in arms:
        x_M, y_M = mean_series(arm, "ppl/selected/mean")
        axes.plot(x_M, y_M, **palette.line(arm.name))
        ends.append((arm.name, float(x_M[-1]), float(y_M[-1])))
        if with_series([arm], "ppl/candidates/q50"):
            x_M, y_M = mean_series(arm, "ppl/candidates/q50")
            axes.plot(x_M, y_M, color=palette.arm(arm.name), lw=1, ls=(0, (1, 2)), alpha=0.8)
    axes.set_xlim(0)
    label_ends(axes, ends, palette)


def draw_deciles(figure: Canvas, arms: Sequence[Arm], palette: Palette) -> None:
    """Draw pass rates from the lowest perplexities to the highest."""
    axes = panel(figure, palette, "decile of perplexity within the step", "pass rate")
    ends: list[End] = []
    for arm in arms:
        rows = [deciles(record) for record in arm.records if deciles(record)]
        rates = np.array(rows, dtype=float)
        known = ~np.isnan(rates).all(axis=0)  # empty with fewer than ten groups per step
        x, y = np.arange(1, 11)[known], np.nanmean(rates[:, known], axis=0)
        axes.plot(x, y, marker="o", ms=3, **palette.line(arm.name))
        ends.append((arm.name, float(x[-1]), float(y[-1])))
    axes.set_xticks(range(1, 11))
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    label_ends(axes, ends, palette)


def draw_stages(figure: Canvas, arms: Sequence[Arm], palette: Palette) -> None:
    """Draw stacked bars; the legend has the stages in the order of the bars."""
    height = 1.15 + 0.27 * len(arms)
    figure.set_size_inches(WIDTH, height)
    axes = panel(figure, palette, "seconds", "")
    figure.subplots_adjust(left=0.24, right=0.97, top=1 - 0.55 / height, bottom=0.48 / height)
    rows = range(len(arms))
    left = np.zeros(len(arms))
    hatches = ("", "////", "", "....", "", "\\\\\\\\")
    for (stage, _), hatch in zip(STAGES.items(), hatches, strict=True):
        seconds = np.array(
            [np.mean([stage_seconds(r).get(stage, 0.0) for r in arm.records]) for arm in arms]
        )
        if seconds.any():
            colour = palette.stage(stage)
            look: dict[str, Any] = {
                "color": colour,
                "edgecolor": palette.paper,
                "lw": 0.5,
                "hatch": hatch,
            }
            axes.barh(rows, seconds, left=left, height=0.7, label=stage, **look)
        left += seconds
    axes.set_yticks(rows, [arm.name for arm in arms])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    legend = figure.legend(
        loc="upper center", ncols=3, frameon=False, fontsize=8.5, labelcolor=palette.ink
    )
    legend.set_in_layout(False)


def panel(figure: Canvas, palette: Palette, x_label: str, y_label: str) -> Axes:
    """Add axes with room for labels on the right."""
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.145, right=LABELS_FROM, top=0.97, bottom=0.145)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=palette.faint, lw=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.tick_params(colors=palette.ink)
    for side in axes.spines.values():
        side.set_color(palette.ink)
    axes.xaxis.label.set_color(palette.ink)
    axes.yaxis.label.set_color(palette.ink)
    return axes


def label_ends(axes: Axes, ends: Sequence[End], palette: Palette) -> None:
    """Write names at the ends of the lines, moved apart so that they do not overlap."""
    low, high = axes.get_ylim()
    canvas = axes.figure
    assert isinstance(canvas, Canvas), "axes of a subfigure"
    height = axes.get_position().height * canvas.get_size_inches()[1] * 72
    gap = 11 / height
    order = sorted(ends, key=lambda end: end[2])
    wanted = [min(max((y - low) / (high - low), 0.0), 1.0) for _, _, y in order]
    for (name, x, y), place in zip(order, spread(wanted, gap), strict=True):
        text = f"{name} (ceiling)" if name == CEILING else name
        colour = palette.arm(name)
        axes.annotate(
            text,
            (x, y),
            xytext=(1.045, place),
            textcoords="axes fraction",
            fontsize=9,
            fontweight="bold" if name in BOLD else "normal",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "lw": 0.6,
                "color": colour,
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0, 0.5),  # at the start of the name: lines to its middle would cross
            },
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return places at least `gap` apart, in the same order, near those wanted (which ascend).

    >>> [round(place, 2) for place in spread([0.5, 0.5, 0.9], 0.2)]
    [0.4, 0.6, 0.9]
    """
    clusters: list[list[float]] = []  # of wanted places; a cluster is centred on their mean
    for place in wanted:
        clusters.append([place])
        while len(clusters) > 1 and _top(clusters[-2], gap) + gap > _bottom(clusters[-1], gap):
            last = clusters.pop()
            clusters[-1] += last
    places = [_bottom(c, gap) + gap * i for c in clusters for i in range(len(c))]
    if not places:
        return []
    shift = max(0.0, -places[0])
    shift -= max(0.0, places[-1] + shift - 1.0)
    return [place + shift for place in places]


def _bottom(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _top(cluster: Sequence[float], gap: float) -> float:
    return _bottom(cluster, gap) + gap * (len(cluster) - 1)


def mean_series(arm: Arm, name: str) -> comparison.Curve:
    """Return a metric's mean over the seeds that have it, against rollouts without probes."""
    curves = []
    for record in arm.records:
        steps = record.get("steps", {})
        if name not in steps:
            continue
        paid = np.array(steps["rollout/paid"], dtype=float)
        seen = record["evaluations"]
        probes = [e.get("probes", 0) for e in seen]
        x = paid - np.interp(paid, [e["rollouts"] for e in seen], probes)
        y = np.array(steps[name], dtype=float)
        known = ~np.isnan(y)
        curves.append((x[known], y[known]))
    x_M, y_SM = comparison.on_common_grid([c for c in curves if len(c[0])])
    y_M, width = y_SM.mean(axis=0), min(5, y_SM.shape[1])
    kernel = np.ones(width)
    return x_M, np.convolve(y_M, kernel, "same") / np.convolve(np.ones_like(y_M), kernel, "same")


def with_series(arms: Sequence[Arm], name: str) -> list[Arm]:
    """Return the arms that have this metric."""

    def has(record: Record) -> bool:
        return any(v is not None for v in record.get("steps", {}).get(name, ()))

    return [arm for arm in arms if any(has(record) for record in arm.records)]


def deciles(record: Record) -> list[float | None] | None:
    """Return pass rates by perplexity: of all candidates if known, else of those rolled out."""
    return record.get("candidates_ppl_deciles") or record.get("ppl_deciles")


def stage_seconds(record: Record) -> dict[str, float]:
    """Return the seconds of the stages that figures show."""
    return {stage: s for stage, s in record.get("seconds", {}).items() if stage in STAGES}


def band_words(arms: Sequence[Arm]) -> str:
    """Describe what is drawn around a mean."""
    counts = {len(arm.records) for arm in arms}
    if max(counts) == 1:
        return "one run each"
    if min(counts) >= BAND_SEEDS:
        return "mean over seeds with its pointwise 95 % interval"
    return "mean over seeds, with a 95 % interval from 3 seeds on, thin lines for fewer"


def slug(text: str) -> str:
    """Return text as part of a file's name, after an underscore."""
    word = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")
    return f"_{word}" if word else ""


def short(value: float, _: object = None) -> str:
    """Return a number as ticks show it: 5k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def svg(figure: Figure, names: Sequence[str]) -> str:
    """Return the figure as an SVG element whose colours are the page's variables."""
    palette = Palette(names, placeholders=True)
    buffer = io.StringIO()
    _save(figure, palette, buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    for key, colour in palette.stand_ins.items():
        text = text.replace(colour, f"var(--{key})")
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', text, count=1)


def png(figure: Figure, names: Sequence[str], path: Path) -> None:
    """Save the figure as a picture on white."""
    palette, written_by = Palette(names, placeholders=False), {"Software": WRITTEN_BY}
    _save(figure, palette, path, format="png", dpi=200, metadata=written_by)


def _save(figure: Figure, palette: Palette, to: IO[Any] | Path, **options: Any) -> None:
    with matplotlib.rc_context(STYLE):
        drawn = pyplot.figure(figsize=(WIDTH, HEIGHT))
        figure.draw(drawn, figure.arms, palette)
        transparent = options["format"] == "svg"
        back = "none" if transparent else PAPER[0]
        drawn.savefig(to, transparent=transparent, facecolor=back, **options)
        pyplot.close(drawn)
