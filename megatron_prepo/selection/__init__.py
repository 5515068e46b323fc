"""Selection of the prompts to roll out: one file per method, with a common interface.

A selector is constructed from the section `selection`, the number of steps, the seed, and the
smallest reward at which a completion passes.  It has

- `choose(candidates, step)`, called before the rollouts: positions of the selected candidates.  A
  method that `refills` is called again within the step, after `observe`, until it returns an empty
  list; the step then trains on the first K groups with an advantage.
- `observe(prompts, rewards_KG)`, called after the rollouts,
- `needs_scores`, `needs_pass_rates`: quantities to compute for the candidates first,
- `metrics()`: values to log per step,
- `state_dict()` and `load_state_dict(state)`, called between two steps.

Results are identical on every rank: randomness is derived from seed, step and observations.
"""

from megatron_prepo.selection.dapo import DynamicSampling
from megatron_prepo.selection.foresight import Foresight
from megatron_prepo.selection.greso import GRESO
from megatron_prepo.selection.mopps import PosteriorSampling
from megatron_prepo.selection.oracle import Oracle
from megatron_prepo.selection.prepo import PerplexityWindow
from megatron_prepo.selection.random import RandomChoice

METHODS = {
    "prepo": PerplexityWindow,
    "random": RandomChoice,
    "greso": GRESO,
    "dapo": DynamicSampling,
    "mopps": PosteriorSampling,
    "foresight": Foresight,
    "oracle": Oracle,
}
