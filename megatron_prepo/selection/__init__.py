"""Selection of the prompts to roll out: one file per method; `base.py` has their interface."""

from megatron_prepo.selection.base import Selector
from megatron_prepo.selection.dapo import DynamicSampling
from megatron_prepo.selection.foresight import Foresight
from megatron_prepo.selection.greso import GRESO
from megatron_prepo.selection.mopps import PosteriorSampling
from megatron_prepo.selection.oracle import Oracle
from megatron_prepo.selection.prepo import PerplexityWindow
from megatron_prepo.selection.random import RandomChoice

METHODS: dict[str, type[Selector]] = {
    "prepo": PerplexityWindow,
    "random": RandomChoice,
    "greso": GRESO,
    "dapo": DynamicSampling,
    "mopps": PosteriorSampling,
    "foresight": Foresight,
    "oracle": Oracle,
}
