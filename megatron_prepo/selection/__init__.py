"""Which prompts are rolled out: one file a method, all with the same two verbs.

A selector is made from the section `selection`, the number of steps, the seed, and the reward from
which on a completion passes.  It has

- `choose(candidates, step)`: before the rollouts: positions of the selected candidates.  A method
  that `refills` is asked again within the step, after `observe`, until it answers with nothing;
  the step then trains on the first K groups with an advantage.
- `observe(prompts, rewards_KG)`: after them,
- `needs_scores`, `needs_pass_rates`: what is to be found out about the candidates first,
- `metrics()`: what to log of the step,
- `state_dict()` and `load_state_dict(state)`: between two steps.

All are the same on every rank: what is random follows from seed, step and observations.
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
