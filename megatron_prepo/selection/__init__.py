"""Selection of the prompts to roll out: one file per method; `base.py` has their interface."""

from megatron_prepo.selection import user_class
from megatron_prepo.selection.base import Candidates, Selector
from megatron_prepo.selection.dapo import DynamicSampling
from megatron_prepo.selection.dps import MarkovChain
from megatron_prepo.selection.foresight import Foresight
from megatron_prepo.selection.greso import GRESO
from megatron_prepo.selection.hive import HistoryAndEntropy
from megatron_prepo.selection.kgps import KalmanFilter
from megatron_prepo.selection.mapp import PosteriorPredictive
from megatron_prepo.selection.mopps import PosteriorSampling
from megatron_prepo.selection.oracle import Oracle
from megatron_prepo.selection.pilot_commit import PilotCommit
from megatron_prepo.selection.prepo import PerplexityWindow
from megatron_prepo.selection.random import RandomChoice
from megatron_prepo.selection.vip import VarianceInformed

__all__ = ["METHODS", "Candidates", "Selector", "load"]

METHODS: dict[str, type[Selector]] = {
    "prepo": PerplexityWindow,
    "random": RandomChoice,
    "greso": GRESO,
    "dapo": DynamicSampling,
    "mopps": PosteriorSampling,
    "mapp": PosteriorPredictive,
    "kgps": KalmanFilter,
    "dps": MarkovChain,
    "hive": HistoryAndEntropy,
    "vip": VarianceInformed,
    "pilot_commit": PilotCommit,
    "foresight": Foresight,
    "oracle": Oracle,
}


def load(method: str) -> type[Selector]:
    """Return the class of `selection.method`: one of METHODS, or the user's `FILE.py:CLASS`.

    Raises UserError for a file that fails, and for anything but a selector.
    """
    return METHODS[method] if method in METHODS else user_class.load(method)
