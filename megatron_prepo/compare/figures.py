"""The figures of a comparison: what methods cost and reach, and what happened on the way.

Every figure is drawn by a function of arms and axes.  `svg` draws it in colours that the page
defines, so that it follows light and dark; `png` in those of the light page.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_prepo.compare import analysis as comparison
from megatron_prepo.compare.analysis import BASELINE, Arm

MAIN = ("random", "prepo", "dapo", "greso", "mopps", "foresight", "oracle")
ABLATIONS = ("prepo", "ppl_only", "entropy_only", "reverse", "rho_max", "clamp", "entropy_clamp")
BOLD = ("prepo", "foresight")
CEILING = "oracle"
MANY = 7
"""With more arms, MAIN and the others go to separate figures."""
BAND_SEEDS = 3
"""From so many seeds on a mean is drawn with its interval; with fewer, the seeds are drawn."""

WRITTEN_BY = "megatron-prepo report"
"""In pictures and pages, so that a later report knows what it may replace."""
COLOURS = {  # on a light page, on a dark one, dashes
    "random": ("#59636e", "#a9b4c0", "-"),
    "prepo": ("#c2410c", "#fb923c", "-"),
    "foresight": ("#1d4ed8", "#60a5fa", "-"),
    "dapo": ("#15803d", "#4ade80", (0, (5, 1))),
    "greso": ("#7e22ce", "#c084fc", (0, (3, 1, 1, 1))),
    "mopps": ("#0e7490", "#22d3ee", (0, (7, 1, 1, 1))),
    "oracle": ("#16181d", "#f3f4f6", (0, (2, 2))),
    "ppl_only": ("#a16207", "#facc15", (0, (5, 1))),
    "entropy_only": ("#be185d", "#f472b6", (0, (3, 1, 1, 1))),
    "reverse": ("#4d7c0f", "#a3e635", (0, (1, 1))),
    "rho_max": ("#0f766e", "#2dd4bf", (0, (7, 1, 1, 1))),
    "clamp": ("#6d28d9", "#a78bfa", (0, (5, 1))),
    "entropy_clamp": ("#9f1239", "#fb7185", (0, (1, 1))),
}
OTHERS = (
    ("#0369a1", "#38bdf8", (0, (5, 1))),
    ("#a21caf", "#e879f9", (0, (3, 1, 1, 1))),
    ("#854d0e", "#fde047", (0, (7, 1, 1, 1))),
)
"""For arms of the user's own, in turn."""
INK, FAINT, PAPER = ("#1f2328", "#e6edf3"), ("#d0d7de", "#3d444d"), ("#ffffff", "#0d1117")

STAGES = {
    "perplexity": ("#0e7490", "#22d3ee"),
    "rollouts": ("#1d4ed8", "#60a5fa"),
    "old_logprobs": ("#a16207", "#facc15"),
    "update": ("#c2410c", "#fb923c"),
    "weight_sync": ("#7e22ce", "#c084fc"),
    "rewards": ("#4d7c0f", "#a3e635"),
}
"""Stages of a training step; the oracle's probes are left out, as everywhere."""

UNITS = {
    "rollouts": "rollouts paid",
    "tokens": "tokens generated",
    "seconds": "seconds of training, without evaluation",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_prepo",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}
WIDTH, HEIGHT, LABELS_FROM = 5.2, 3.6, 0.765
"""Inches, and where the labels at the lines' ends begin."""


@dataclass(frozen=True)
class Figure:
    """One picture; `draw` fills its axes."""

    key: str
    title: str
    caption: str
    draw: Callable
    arms: list[Arm]


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """All figures for which the arms have numbers, the most important first."""
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
    for name, key, title, caption in (
        (
            "reward/zero_variance_ratio",
            "zero_variance",
            "Groups without a signal",
            "Share of paid groups whose rewards are all equal",
        ),
        ("entropy/mean", "entropy", "Entropy", "Mean token entropy of the rollouts, in nats"),
        (
            "ppl/spearman_with_reward",
            "spearman",
            "Does perplexity foretell the reward?",
            "Rank correlation of prompt perplexity and mean reward among the paid groups of a step",
        ),
    ):
        for group, suffix, what in groups(with_series(arms, name)):
            text = f"{caption}{what}; mean over seeds, running mean of 5 points."
            made.append(Figure(key + slug(suffix), title + suffix, text, series(name), group))
    for group, suffix, what in groups(with_series(arms, "ppl/selected_mean")):
        text = (
            f"Mean perplexity of the chosen prompts{what}; dotted, in the same colour: the median "
            "of the candidates."
        )
        made.append(
            Figure("window" + slug(suffix), "What is chosen" + suffix, text, draw_window, group)
        )
    of_deciles = [arm for arm in arms if any(deciles(record) for record in arm.records)]
    for group, suffix, what in groups(of_deciles):
        text = (
            "Pass rate by decile of prompt perplexity within a step, of the prompts paid for "
            f"(oracle: of all candidates){what}; mean over seeds."
        )
        made.append(
            Figure("deciles" + slug(suffix), "Easy and hard" + suffix, text, draw_deciles, group)
        )
    timed = [arm for arm in arms if any(stage_seconds(r) for r in arm.records)]
    if timed:
        text = "Seconds of training by stage, mean over seeds; without evaluation and probes."
        made.append(Figure("stages", "Where the time goes", text, draw_stages, timed))
    return made


def groups(arms: Sequence[Arm]) -> list[tuple[list[Arm], str, str]]:
    """The arms of each figure, with what its title and caption say of them."""
    names = {arm.name for arm in arms}
    if len(arms) <= MANY or not names & set(MAIN):
        return [(list(arms), "", "")] if arms else []
    main = [arm for arm in arms if arm.name in MAIN]
    others = [arm for arm in arms if arm.name not in MAIN]
    beside = [arm for arm in main if arm.name in (BASELINE, "prepo")]
    if not others:
        return [(main, "", "")]
    return [(main, "", ""), ([*beside, *others], ": ablations", ", ablations")]


def pass_rate(axis: str, all_arms: Sequence[Arm]) -> Callable:
    """Pass rate against what was paid; targets from the baseline of the whole comparison."""

    def draw(figure, arms: Sequence[Arm], palette: "Palette") -> None:
        axes = panel(figure, palette, UNITS[axis], "held-out pass rate")
        ends, means = [], []
        for arm in arms:
            curves = arm.curves(axis)
            x_M, mean_M, half_M = comparison.mean_and_band(curves)
            colour, means = palette.arm(arm.name), [*means, mean_M]
            if len(curves) >= BAND_SEEDS:
                low, high = mean_M - half_M, mean_M + half_M
                axes.fill_between(x_M, low, high, color=colour, alpha=0.10, lw=0)
            elif len(curves) > 1:
                for x, y in curves:
                    axes.plot(x, y, color=colour, lw=0.7, alpha=0.5)
            axes.plot(x_M, mean_M, **palette.line(arm.name))
            ends.append((arm.name, x_M[-1], mean_M[-1]))
        values = np.concatenate(means)
        margin = max(0.12 * (values.max() - values.min()), 0.01)
        axes.set_ylim(values.min() - margin, values.max() + margin)
        axes.set_xlim(0)
        draw_targets(axes, all_arms, axis, palette)
        label_ends(axes, ends, palette)

    return draw


def draw_targets(axes, all_arms: Sequence[Arm], axis: str, palette: "Palette") -> None:
    """Dashed lines at the targets that savings are measured at."""
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
        # left of where the first line passes, or under all of them
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


def series(name: str) -> Callable:
    """A metric of the steps against rollouts paid."""

    def draw(figure, arms: Sequence[Arm], palette: "Palette") -> None:
        axes = panel(figure, palette, UNITS["rollouts"], LABELS[name])
        ends = []
        for arm in arms:
            x_M, y_M = mean_series(arm, name)
            axes.plot(x_M, y_M, **palette.line(arm.name))
            ends.append((arm.name, x_M[-1], y_M[-1]))
        axes.set_xlim(0)
        low, high = axes.get_ylim()
        if name.startswith("ppl/spearman") and high > -0.02:
            axes.axhline(0, color=palette.ink, lw=0.7)
        axes.set_ylim(low, high)
        label_ends(axes, ends, palette)

    return draw


LABELS = {
    "reward/zero_variance_ratio": "zero-variance ratio",
    "entropy/mean": "mean token entropy",
    "ppl/spearman_with_reward": "Spearman's correlation",
}


def draw_window(figure, arms: Sequence[Arm], palette: "Palette") -> None:
    """What each arm chose, against what there was to choose from."""
    axes = panel(figure, palette, UNITS["rollouts"], "prompt perplexity")
    ends = []
    for arm in arms:
        x_M, y_M = mean_series(arm, "ppl/selected_mean")
        axes.plot(x_M, y_M, **palette.line(arm.name))
        ends.append((arm.name, x_M[-1], y_M[-1]))
        if with_series([arm], "ppl/candidates_q50"):
            x_M, y_M = mean_series(arm, "ppl/candidates_q50")
            axes.plot(x_M, y_M, color=palette.arm(arm.name), lw=1, ls=(0, (1, 2)), alpha=0.8)
    axes.set_xlim(0)
    label_ends(axes, ends, palette)


def draw_deciles(figure, arms: Sequence[Arm], palette: "Palette") -> None:
    """From the lowest perplexities to the highest."""
    axes = panel(figure, palette, "decile of perplexity within the step", "pass rate")
    ends = []
    for arm in arms:
        rows = [deciles(record) for record in arm.records if deciles(record)]
        rates = np.array(rows, dtype=float)
        known = ~np.isnan(rates).all(axis=0)  # with fewer than ten groups a step, some are empty
        x, y = np.arange(1, 11)[known], np.nanmean(rates[:, known], axis=0)
        axes.plot(x, y, marker="o", ms=3, **palette.line(arm.name))
        ends.append((arm.name, x[-1], y[-1]))
    axes.set_xticks(range(1, 11))
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    label_ends(axes, ends, palette)


def draw_stages(figure, arms: Sequence[Arm], palette: "Palette") -> None:
    """Stacked bars; a stage's name stands in the legend, in the order of the bars."""
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
            look = {"color": colour, "edgecolor": palette.paper, "lw": 0.5, "hatch": hatch}
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


def panel(figure, palette: "Palette", x_label: str, y_label: str):
    """Axes with room for labels on the right."""
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


def label_ends(axes, ends: Sequence[tuple[str, float, float]], palette: "Palette") -> None:
    """Names at the lines' ends, moved apart where they would cover each other."""
    low, high = axes.get_ylim()
    height = axes.get_position().height * axes.figure.get_size_inches()[1] * 72
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
                "relpos": (0, 0.5),  # to the name's beginning: lines to its middle would cross
            },
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the same order, near those wanted (which ascend).

    >>> [round(place, 2) for place in spread([0.5, 0.5, 0.9], 0.2)]
    [0.4, 0.6, 0.9]
    """
    clusters: list[list[float]] = []  # of wanted places; a cluster stands centred on their mean
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


def mean_series(arm: Arm, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A metric of the steps over the seeds that have it, against rollouts without probes."""
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
    """Arms that have this metric at all."""

    def has(record: dict) -> bool:
        return any(v is not None for v in record.get("steps", {}).get(name, ()))

    return [arm for arm in arms if any(has(record) for record in arm.records)]


def deciles(record: dict) -> list[float | None] | None:
    """Pass rate by perplexity: of all candidates where known, else of the prompts paid for."""
    return record.get("candidates_ppl_deciles") or record.get("ppl_deciles")


def stage_seconds(record: dict) -> dict[str, float]:
    """Seconds of the stages that are shown."""
    return {stage: s for stage, s in record.get("seconds", {}).items() if stage in STAGES}


def band_words(arms: Sequence[Arm]) -> str:
    """What the shades around a mean are."""
    counts = {len(arm.records) for arm in arms}
    if max(counts) == 1:
        return "one run each"
    if min(counts) >= BAND_SEEDS:
        return "mean over seeds with its pointwise 95 % interval"
    return "mean over seeds, with a 95 % interval from 3 seeds on, thin lines for fewer"


def slug(text: str) -> str:
    """As part of a file's name."""
    word = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")
    return f"_{word}" if word else ""


def short(value: float, _=None) -> str:
    """Ticks: 5k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


class Palette:
    """Colours: those of the light page, or placeholders that `svg` replaces by CSS variables."""

    def __init__(self, names: Sequence[str], *, placeholders: bool):
        self.names, self.placeholders = list(names), placeholders
        keys = ["ink", "faint", "paper", *(f"stage-{s}" for s in STAGES)]
        keys += [f"arm-{i}" for i in range(len(self.names))]
        self.stand_ins = {key: f"#fe{number:04x}" for number, key in enumerate(keys, start=1)}
        self.ink, self.faint = self._colour("ink", INK), self._colour("faint", FAINT)
        self.paper = self._colour("paper", PAPER)

    def _colour(self, key: str, pair: Sequence[str]) -> str:
        return self.stand_ins[key] if self.placeholders else pair[0]

    def look(self, name: str) -> tuple:
        """Light colour, dark colour and dashes of an arm."""
        own = [other for other in self.names if other not in COLOURS]
        return COLOURS.get(name) or OTHERS[own.index(name) % len(OTHERS)]

    def arm(self, name: str) -> str:
        """An arm's colour."""
        return self._colour(f"arm-{self.names.index(name)}", self.look(name))

    def stage(self, name: str) -> str:
        """A stage's colour."""
        return self._colour(f"stage-{name}", STAGES[name])

    def line(self, name: str) -> dict:
        """How an arm's line is drawn: the boldest are ours."""
        bold = name in BOLD
        return {
            "color": self.arm(name),
            "lw": 2.6 if bold else 1.5,
            "ls": self.look(name)[2],
            "zorder": 4 if bold else 3,
        }

    def css(self, dark: bool) -> str:
        """The variables' values."""
        pairs = {"ink": INK, "faint": FAINT, "paper": PAPER}
        pairs |= {f"stage-{stage}": pair for stage, pair in STAGES.items()}
        pairs |= {f"arm-{i}": self.look(name) for i, name in enumerate(self.names)}
        return " ".join(f"--{key}: {pair[dark]};" for key, pair in pairs.items())


def svg(figure: Figure, names: Sequence[str]) -> str:
    """The figure as an SVG element whose colours are the page's variables."""
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
    """The figure as a picture on white."""
    palette, written_by = Palette(names, placeholders=False), {"Software": WRITTEN_BY}
    _save(figure, palette, path, format="png", dpi=200, metadata=written_by)


def _save(figure: Figure, palette: Palette, to, **options) -> None:
    with matplotlib.rc_context(STYLE):
        drawn = pyplot.figure(figsize=(WIDTH, HEIGHT))
        figure.draw(drawn, figure.arms, palette)
        transparent = options["format"] == "svg"
        back = "none" if transparent else PAPER[0]
        drawn.savefig(to, transparent=transparent, facecolor=back, **options)
        pyplot.close(drawn)
