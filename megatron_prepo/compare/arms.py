"""The arms of a comparison: methods of prompt selection, ablations of PREPO, and the user's own."""

import re

from megatron_prepo import config as configuration
from megatron_prepo.config.schema import SELECTION_METHODS
from megatron_prepo.errors import UserError

PREPO = ["selection.method=prepo", "weighting.method=relative_entropy"]
ENTROPY = ["selection.method=random", "weighting.method=relative_entropy"]


def _unweighted(method: str) -> list[str]:
    return [f"selection.method={method}", "weighting.method=none"]


ABLATIONS = {
    "ppl_only": ["selection.method=prepo", "weighting.method=none"],
    "entropy_only": ENTROPY,
    "reverse": [*PREPO, "selection.direction=high-to-low"],
    "rho_max": [*PREPO, "selection.rho_max=0.5"],
    "clamp": [*PREPO, "weighting.clamp=1.5"],
    "entropy_clamp": [*ENTROPY, "weighting.clamp=1.5"],
    "mapp_selection": _unweighted("mapp"),
    "rl_zvp": [*_unweighted("random"), "advantage.method=rl_zvp"],
}
"""PREPO and MaPP with a part removed or changed, and Random with other advantages."""
WHOLE = {"mapp": [*_unweighted("mapp"), "advantage.method=posterior"]}
"""Methods that are more than a selection."""
ARMS = {"random": _unweighted("random"), "prepo": PREPO, **WHOLE, **ABLATIONS}
ARMS |= {method: _unweighted(method) for method in SELECTION_METHODS if method not in ARMS}
"""The settings of each known arm."""


def parse_arms(methods: str) -> dict[str, list[str]]:
    """Return the overrides of each arm that `--methods` names.

    >>> parse_arms("random, mine:selection.method=prepo;weighting.clamp=2")["mine"]
    ['selection.method=prepo', 'weighting.clamp=2']
    """
    arms = {}
    for part in filter(None, (part.strip() for part in methods.split(","))):
        name, colon, inline = part.partition(":")
        if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]", name):
            raise UserError(f"the arm name {name!r} must consist of letters, digits, _, - and dots")
        if name in arms:
            raise UserError(f"--methods names the arm {name} twice")
        if colon and name in ARMS:
            raise UserError(f"{name} is a known arm; give your own another name")
        if not colon and name not in ARMS:
            raise UserError(
                f"unknown method {name}{configuration.nearest(name, list(ARMS))}; known: "
                f"{', '.join(ARMS)}; or define one: '{name}:selection.method=prepo;...'"
            )
        arms[name] = [o.strip() for o in inline.split(";") if o.strip()] if colon else ARMS[name]
    if not arms:
        raise UserError("--methods names no arm; give some, such as random,prepo")
    return arms
