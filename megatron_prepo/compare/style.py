"""Style of the figures: matplotlib's settings, and the colours of a light and of a dark page."""

from collections.abc import Sequence
from typing import Any, TypeAlias

BOLD = ("prepo", "foresight")
"""Arms that stand out: ours."""
CEILING = "oracle"
"""The arm whose probes are not counted."""
STYLE: dict[str, Any] = {
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

Dashes: TypeAlias = str | tuple[int, tuple[int, ...]]
Look: TypeAlias = tuple[str, str, Dashes]
"""Colour on a light page, colour on a dark page, dashes."""

COLOURS: dict[str, Look] = {
    "random": ("#59636e", "#a9b4c0", "-"),
    "prepo": ("#c2410c", "#fb923c", "-"),
    "foresight": ("#1d4ed8", "#60a5fa", "-"),
    "dapo": ("#15803d", "#4ade80", (0, (5, 1))),
    "greso": ("#7e22ce", "#c084fc", (0, (3, 1, 1, 1))),
    "mopps": ("#0e7490", "#22d3ee", (0, (7, 1, 1, 1))),
    "mapp": ("#b45309", "#fbbf24", (0, (5, 1, 1, 1))),
    "kgps": ("#be123c", "#fda4af", (0, (5, 2))),
    "dps": ("#3f6212", "#bef264", (0, (2, 1, 5, 1))),
    "hive": ("#6b21a8", "#d8b4fe", (0, (1, 1, 5, 1))),
    "vip": ("#155e75", "#67e8f9", (0, (3, 2))),
    "pilot_commit": ("#9d174d", "#f9a8d4", (0, (4, 1, 2, 1))),
    "oracle": ("#16181d", "#f3f4f6", (0, (2, 2))),
    "rl_zvp": ("#831843", "#fbcfe8", (0, (5, 1, 1, 1))),
    "mapp_selection": ("#78350f", "#fde68a", (0, (1, 1))),
    "ppl_only": ("#a16207", "#facc15", (0, (5, 1))),
    "entropy_only": ("#be185d", "#f472b6", (0, (3, 1, 1, 1))),
    "reverse": ("#4d7c0f", "#a3e635", (0, (1, 1))),
    "rho_max": ("#0f766e", "#2dd4bf", (0, (7, 1, 1, 1))),
    "clamp": ("#6d28d9", "#a78bfa", (0, (5, 1))),
    "entropy_clamp": ("#9f1239", "#fb7185", (0, (1, 1))),
}
OTHERS: tuple[Look, ...] = (
    ("#0369a1", "#38bdf8", (0, (5, 1))),
    ("#a21caf", "#e879f9", (0, (3, 1, 1, 1))),
    ("#854d0e", "#fde047", (0, (7, 1, 1, 1))),
)
"""Looks of the user's arms, in turn."""
INK, FAINT, PAPER = ("#1f2328", "#e6edf3"), ("#d0d7de", "#3d444d"), ("#ffffff", "#0d1117")
"""Colours on a light and on a dark page."""

STAGES = {
    "perplexity": ("#0e7490", "#22d3ee"),
    "rollouts": ("#1d4ed8", "#60a5fa"),
    "old_logprobs": ("#a16207", "#facc15"),
    "update": ("#c2410c", "#fb923c"),
    "weight_sync": ("#7e22ce", "#c084fc"),
    "rewards": ("#4d7c0f", "#a3e635"),
}
"""Stages of a training step; the oracle's probes are excluded, as everywhere."""


class Palette:
    """Colours of the light page, or placeholders that `svg` replaces with CSS variables."""

    def __init__(self, names: Sequence[str], *, placeholders: bool) -> None:
        self.names, self.placeholders = list(names), placeholders
        keys = ["ink", "faint", "paper", *(f"stage-{s}" for s in STAGES)]
        keys += [f"arm-{i}" for i in range(len(self.names))]
        self.stand_ins = {key: f"#fe{number:04x}" for number, key in enumerate(keys, start=1)}
        self.ink, self.faint = self._colour("ink", INK), self._colour("faint", FAINT)
        self.paper = self._colour("paper", PAPER)

    def _colour(self, key: str, pair: Sequence[str]) -> str:
        return self.stand_ins[key] if self.placeholders else pair[0]

    def look(self, name: str) -> Look:
        """Return the look of an arm."""
        own = [other for other in self.names if other not in COLOURS]
        return COLOURS.get(name) or OTHERS[own.index(name) % len(OTHERS)]

    def arm(self, name: str) -> str:
        """Return an arm's colour."""
        return self._colour(f"arm-{self.names.index(name)}", self.look(name)[:2])

    def stage(self, name: str) -> str:
        """Return a stage's colour."""
        return self._colour(f"stage-{name}", STAGES[name])

    def line(self, name: str) -> dict[str, Any]:
        """Return how matplotlib draws an arm's line; those in BOLD are wider."""
        bold = name in BOLD
        return {
            "color": self.arm(name),
            "lw": 2.6 if bold else 1.5,
            "ls": self.look(name)[2],
            "zorder": 4 if bold else 3,
        }

    def css(self, dark: bool) -> str:
        """Return the values of the page's variables."""
        pairs: dict[str, Sequence[Any]] = {"ink": INK, "faint": FAINT, "paper": PAPER}
        pairs |= {f"stage-{stage}": pair for stage, pair in STAGES.items()}
        pairs |= {f"arm-{i}": self.look(name) for i, name in enumerate(self.names)}
        return " ".join(f"--{key}: {pair[dark]};" for key, pair in pairs.items())
